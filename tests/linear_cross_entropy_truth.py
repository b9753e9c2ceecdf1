"""What the tests of `linear_cross_entropy` share: cases, the truth by autograd, and the tolerance rule.

The truth shares no formula with the package: PyTorch's own cross-entropy on full logits, and autograd one sample at a
time.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lead_fast.ops import SampleStats, linear_cross_entropy

BACKENDS = [
    pytest.param(("reference", "cpu"), id="reference"),
    pytest.param(("cpp", "cpu"), id="cpp"),
    pytest.param(("triton", "cuda"), id="triton", marks=pytest.mark.cuda),
]
DTYPES = {
    "reference": (torch.float32, torch.bfloat16, torch.float16),
    "cpp": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}
# What a kernel may add to the error of plain PyTorch in the same dtype, relative to the largest true value. 16 bits:
# the hidden gradient is rounded under unit upstream gradient and once more after scaling.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
GRADIENTS = ("hidden", "weight", "bias")


@dataclass(frozen=True)
class Case:
    """Inputs of one call, kept in fp64 with values that the dtype under test can hold."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    cu_seqlens: Tensor
    bias: Tensor | None = None
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)

    def at(self, dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
        """Keyword arguments of the operator; the floating ones as fresh leaves."""
        leaves = {name: getattr(self, name) for name in GRADIENTS if getattr(self, name) is not None}
        leaves = {name: leaf.detach().to(device, dtype).requires_grad_() for name, leaf in leaves.items()}
        moved = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in self.options.items()}
        return {**leaves, "labels": self.labels.to(device), "cu_seqlens": self.cu_seqlens.to(device), **moved}

    def with_options(self, **options: Any) -> Case:
        return replace(self, options={**self.options, **options})


def make_case(
    lengths: tuple[int, ...] = (7, 0, 1, 23, 6),
    width: int = 24,
    vocab: int = 131,
    *,
    ignored: float = 0.3,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    spread: float = 1.0,
    **options: Any,
) -> Case:
    """Random inputs: samples of the given lengths, a share of tokens ignored, logits of standard deviation `spread`."""

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype).double()

    tokens = sum(lengths)
    labels = torch.randint(vocab, (tokens,))
    labels[torch.rand(tokens) < ignored] = -100
    return Case(
        hidden=random(tokens, width),
        weight=random(vocab, width, scale=spread / width**0.5),
        labels=labels,
        cu_seqlens=torch.tensor((0, *lengths)).cumsum(0),
        bias=random(vocab) if bias else None,
        dtype=dtype,
        options=options,
    )


def plain_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None = None, logit_scale: float = 1.0
) -> Tensor:
    logits = logit_scale * F.linear(hidden, weight, bias)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def plain_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor,
    bias: Tensor | None = None,
    *,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    token_weights: Tensor | None = None,
    token_index: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """The same loss in plain PyTorch; `token_index` changes nothing when it lists every supervised token."""
    logits = plain_logits(hidden, weight, bias, softcap, logit_scale)
    nll = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="none")
    weighted = nll if token_weights is None else nll * token_weights
    supervised = labels != -100
    if reduction == "none":
        return weighted
    if reduction == "sum":
        return weighted.sum()
    if reduction == "mean":
        return weighted.sum() / (supervised.sum() if num_items is None else int(num_items))
    bounds = [slice(a, b) for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)]
    means = [weighted[tokens].sum() / supervised[tokens].sum() for tokens in bounds if supervised[tokens].any()]
    return torch.stack(means).mean()


def plain_stats(case: Case, dtype: torch.dtype) -> SampleStats:
    """Statistics by autograd, one sample at a time; G_i as the gradient of a map inserted at the hidden states."""
    given = case.at(dtype)
    options = {name: case.options[name] for name in ("softcap", "logit_scale") if name in case.options}
    rows = []
    for start, end in zip(case.cu_seqlens[:-1].tolist(), case.cu_seqlens[1:].tolist(), strict=True):
        labels = case.labels[start:end]
        kept = labels != -100
        n = int(kept.sum())
        if n == 0:
            rows.append(torch.zeros(5, dtype=torch.float64))
            continue
        hidden = given["hidden"].detach()[start:end][kept].requires_grad_()
        extra = torch.zeros(hidden.shape[1], hidden.shape[1], dtype=dtype, requires_grad=True)
        logits = plain_logits(hidden + hidden @ extra.T, given["weight"].detach(), given.get("bias"), **options)
        nll = F.cross_entropy(logits.to(torch.promote_types(dtype, torch.float32)), labels[kept], reduction="sum")
        gradients = torch.autograd.grad(nll, (logits, hidden, extra))
        per_logit, per_hidden, per_map = (gradient.double().square().sum() for gradient in gradients)
        count = torch.tensor(n, dtype=torch.float64)
        rows.append(torch.stack([nll.detach().double() / n, count, per_logit / n, per_hidden / n, per_map]))
    return SampleStats(*torch.stack(rows).unbind(1))


def run(case: Case, backend: tuple[str, str], upstream: Tensor | None = None) -> tuple[dict[str, Tensor], SampleStats]:
    """Loss and gradients of the operator under `upstream` (ones by default), and its statistics, in fp64 on the CPU."""
    name, device = backend
    given = case.at(case.dtype, device)
    out = linear_cross_entropy(**given, backend=name)
    assert out.samples is not None
    return _loss_and_gradients(out.loss, given, upstream), SampleStats(*(s.double().cpu() for s in out.samples))


def run_plain(case: Case, dtype: torch.dtype, upstream: Tensor | None = None) -> dict[str, Tensor]:
    given = case.at(dtype)
    return _loss_and_gradients(plain_loss(**given), given, upstream)


def _loss_and_gradients(loss: Tensor, given: dict[str, Any], upstream: Tensor | None) -> dict[str, Tensor]:
    names = [name for name in GRADIENTS if name in given]
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss)
    gradients = torch.autograd.grad(loss, [given[name] for name in names], upstream)
    found = {"loss": loss, **dict(zip(names, gradients, strict=True))}
    return {name: value.detach().double().cpu() for name, value in found.items()}


def assert_as_good(name: str, found: Tensor, same_dtype: Tensor, truth: Tensor, tolerance: float) -> None:
    """|found - truth| <= |same_dtype - truth| + tolerance * |truth|, each in its largest entry."""
    assert found.shape == truth.shape, name
    if truth.numel() == 0:
        return
    error, plain_error = (found - truth).abs().max(), (same_dtype - truth).abs().max()
    bound = plain_error + tolerance * truth.abs().max()
    assert error <= bound, f"{name}: error {error:.3e}, plain PyTorch's {plain_error:.3e}, allowed {bound:.3e}"
