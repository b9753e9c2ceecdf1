"""Batches for the tests of the fused loss, and the double-precision truth to compare with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from lead_fast import reference

IGNORE = -100
OUTPUTS = ("loss", "nll", "d_hidden", "d_weight", "d_bias", "sample_stats", "bad_labels")


@dataclass(frozen=True)
class Batch:
    """Arguments of the fused loss."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    cu_seqlens: Tensor
    token_scale: Tensor
    softcap: float = 0.0
    logit_scale: float = 1.0

    def run(
        self, forward, *, hidden_grad: bool = True, weight_grad: bool = True, stats: int = reference.STATS_ALL
    ) -> dict[str, Tensor]:
        """Outputs of `forward` by name."""
        outputs = forward(
            self.hidden, self.weight, self.bias, self.labels, self.cu_seqlens, self.token_scale,
            IGNORE, self.softcap, self.logit_scale,
            hidden_grad, weight_grad, weight_grad and self.bias is not None, stats,
        )  # fmt: skip
        return dict(zip(OUTPUTS, outputs, strict=True))

    def truth(self, **options) -> dict[str, Tensor]:
        """The specification in double precision, of the same (rounded) inputs."""
        double = replace(
            self,
            hidden=self.hidden.double(),
            weight=self.weight.double(),
            bias=None if self.bias is None else self.bias.double(),
            token_scale=self.token_scale.double(),
        )
        return double.run(reference.linear_cross_entropy, **options)


def make_batch(
    lengths: list[int],
    hidden_size: int,
    vocab: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    ignored: float = 0.3,
    bias: bool = False,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    seed: int = 0,
) -> Batch:
    """Random samples of the given lengths; a share `ignored` of their tokens has no supervision."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = sum(lengths)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    labels = torch.randint(vocab, (num_tokens,), generator=generator)
    labels[torch.rand(num_tokens, generator=generator) < ignored] = IGNORE
    scale = torch.rand(num_tokens, generator=generator) * (labels != IGNORE) / max(num_tokens, 1)
    return Batch(
        hidden=randn(num_tokens, hidden_size).to(device, dtype),
        weight=(2 * randn(vocab, hidden_size) / hidden_size**0.5).to(device, dtype),
        bias=randn(vocab).to(device, dtype) if bias else None,
        labels=labels.to(device),
        cu_seqlens=torch.tensor([0, *lengths], device=device).cumsum(0),
        token_scale=scale.to(device),
        softcap=softcap,
        logit_scale=logit_scale,
    )


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """Every output within `tolerance` of the largest entry of the truth, each column of the statistics on its own."""
    for name in OUTPUTS:
        assert got[name].shape == want[name].shape, name
        _assert_scaled(name, got[name].double(), want[name].double(), tolerance)
    for column, (g, w) in enumerate(zip(got["sample_stats"].T, want["sample_stats"].T, strict=True)):
        _assert_scaled(f"sample_stats[:, {column}]", g.double(), w.double(), tolerance)


def _assert_scaled(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    finite = want[want.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() > 0 else 1.0
    torch.testing.assert_close(
        got, want, rtol=0, atol=tolerance * scale, equal_nan=True, msg=lambda message: f"{name}: {message}"
    )


def gradient_statistics(batch: Batch) -> Tensor:
    """Columns 2 to 4 of the statistics by autograd in double precision, one token and one sample at a time."""
    weight = batch.weight.double()
    bias = 0 if batch.bias is None else batch.bias.double()
    rows = []
    for start, end in pairwise(batch.cu_seqlens.tolist()):
        tokens = [t for t in range(start, end) if batch.labels[t] != IGNORE]
        # A linear map at the last hidden state.
        probe = torch.eye(weight.shape[1], dtype=torch.float64, requires_grad=True)
        loss, logit_sq, hidden_sq = torch.zeros((), dtype=torch.float64), 0.0, 0.0
        for t in tokens:
            hidden = probe @ batch.hidden[t].double()
            logits = batch.logit_scale * (weight @ hidden + bias)
            if batch.softcap > 0:
                logits = batch.softcap * torch.tanh(logits / batch.softcap)
            nll = torch.nn.functional.cross_entropy(logits[None], batch.labels[t][None])
            d_logits, d_hidden = torch.autograd.grad(nll, (logits, hidden), retain_graph=True)
            logit_sq += float(d_logits.square().sum())
            hidden_sq += float(d_hidden.square().sum())
            loss = loss + nll
        grad_sq = float(torch.autograd.grad(loss, probe)[0].square().sum()) if tokens else 0.0
        count = max(len(tokens), 1)
        rows.append([logit_sq / count, hidden_sq / count, grad_sq])
    return torch.tensor(rows, dtype=torch.float64)
