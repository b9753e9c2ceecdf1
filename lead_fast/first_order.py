"""Experimental: first-order loss changes of LoRA fine-tuning, from sketched per-sample gradients (section 4, `first_order`).

    dL_i = <g_i, theta_end - theta_seen>        g_i: gradient of sample i's mean nll at theta_seen, over the LoRA weights

A LoRA pair adds z = B u, u = A x to a frozen layer (z is scaled afterwards). With f_t the gradient of the loss at z_t and
v_t = B^T f_t that at u_t, sample i's gradients are sums over its own tokens, and the backward pass computes f and v anyway:

    B: sum_t f_t u_t^T  [out, r]        S_B = sum_t (P f_t) u_t^T  [k, r]        <g_B, dB> ~ <S_B, P dB>
    A: sum_t v_t x_t^T  [r, in]         S_A = sum_t v_t (Q x_t)^T  [r, k]        <g_A, dA> ~ <S_A, dA Q^T>

| symbol | meaning |
|---|---|
| x_t, u_t | input of the pair, `in` numbers; input of B, r numbers |
| P, Q | random signs / sqrt(k), [k, out] and [k, in], of their own in every layer; E P^T P = I, so each product is unbiased |
| k | rows of P and Q; the identity, and so exact, where k is at least the width |
| M | numbers kept of a sample: k * (r of B + r of A), summed over all pairs |

No second forward pass: forward hooks keep Q x_t and u_t (k + r numbers a token and pair, never x_t), tensor hooks add to the
sketches as the gradients pass. Work a pair and token: 2 k (in + out) + 4 k r multiplications and additions, 0.1% of a
frozen 4096 x 4096 layer's own at k = 4; the launches cost more than the work. Weights enter as P B and A Q^T, M numbers a
step. Variance of dL: at most 2 / k times the sum over pairs of ||dB G_B^T||_F^2 + ||dA^T G_A||_F^2.

Memory, for 32 layers of 7 pairs at r = 64, k = 4: 114,688 numbers a sample, 229 MB for 1,000 samples in bf16; 30 kB a token
while a micro-batch is in flight, nearly all of it u, which is held for backward anyway unless layers are checkpointed.

Accuracy beside cost, measured on small Llamas on one CPU core (benchmarks/results/first_order.md): Spearman with the true
change .78 to .82 at k = 4 for 10% to 13% of a step, .91 to .95 unsketched; `grad_norm` .38 to .52 for next to nothing. First
order overestimates the fall, by a quarter of the mean change. Its cost on a GPU was never measured.

Gradient checkpointing: reentrant, hooks skip the pass without gradients; non-reentrant, the recomputed pass projects once
more and its tensor hooks never run. Autocast: products run in the layer's own dtype, sums over tokens in fp32.

Source: this project; the probe of a trace by random signs is Hutchinson's, Commun. Stat. Simul. Comput. 1990.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lead_fast.device import to_device
from lead_fast.reference_state import last_occurrence
from lead_fast.rng import philox_uniform
from lead_fast.utility import Clocks, LossChangeEstimator, UtilityTable, register_estimator

# The stream of the signs of P and Q; the engine's own streams are small numbers.
STREAM_SIGNS = 64
# Tokens of a tile: samples are summed tile by tile, so that few long samples and many short ones cost the same.
_TILE = 64


class SampleTiles:
    """The tokens of a packed batch, cut into tiles of one sample each.

    Args:
        cu_seqlens: [S + 1], sample boundaries; on the CPU, or it is copied there.
        device: of the tensors to be summed.
    """

    def __init__(self, cu_seqlens: Tensor, device: torch.device) -> None:
        bounds = cu_seqlens.to("cpu", torch.int64)
        self.num_samples = len(bounds) - 1
        tiles = (bounds.diff() + _TILE - 1) // _TILE
        owner = torch.repeat_interleave(torch.arange(self.num_samples), tiles)
        first = torch.arange(len(owner)) - (tiles.cumsum(0) - tiles)[owner]
        index, end = (bounds[owner] + first * _TILE)[:, None] + torch.arange(_TILE), bounds[owner + 1][:, None]
        # A sample's last tile is filled with its own last token, times 0: no sample sees another's NaN.
        self.index = to_device(torch.minimum(index, end - 1), device)
        self.inside = to_device((index < end).float()[:, :, None], device)
        self.tiles = to_device(tiles, device)

    def outer_sums(self, left: Tensor, right: Tensor) -> Tensor:
        """sum_t left_t right_t^T over each sample's tokens.

        Args:
            left, right: [T, a] and [T, b], any floating dtype.

        Returns:
            fp32 [S, a, b], 0 for a sample without tokens. Deterministic: tiles are added in order, without atomics.
        """
        tiles = (left[self.index].float() * self.inside).transpose(1, 2) @ right[self.index].float()
        return torch.segment_reduce(tiles, "sum", lengths=self.tiles, axis=0, unsafe=True)


@dataclass(frozen=True)
class _Adapter:
    """One trained linear map of a LoRA pair and its place in the sketch."""

    module: nn.Linear
    projection: Tensor  # fp32 [k, width of the wide side]
    wide_input: bool  # A: the input is wide; B: the output
    start: int  # of its numbers in a sample's sketch

    @property
    def shape(self) -> tuple[int, int]:
        """Of its part of the sketch: [r, k] for A, [k, r] for B."""
        k = len(self.projection)
        return (self.module.out_features, k) if self.wide_input else (k, self.module.in_features)

    @property
    def end(self) -> int:
        return self.start + self.shape[0] * self.shape[1]

    def project(self, wide: Tensor) -> Tensor:
        """[T, width] to [T, k]. fp16 is widened first: a sum of scaled gradients may pass its largest number."""
        wide = wide.float() if wide.dtype == torch.float16 else wide
        return wide @ self.projection.to(wide.dtype).T

    def project_weight(self) -> Tensor:
        """A Q^T or P B, in fp32."""
        weight = self.module.weight.detach().float()
        return weight @ self.projection.T if self.wide_input else self.projection @ weight


class LoraSketch:
    """Sketches of per-sample gradients, and of the weights, over all LoRA pairs that a model trains.

    Args:
        model: a peft model whose trained parameters are LoRA weights of linear layers, on the device it trains on.
        k: rows of each projection; see the module's table for what it costs.
        seed: of the projections. Equal seeds give equal projections on every device.

    Attributes:
        num_numbers: M, numbers of one sample's sketch.

    Raises:
        ValueError: k is not positive, or the model trains something else: what is not sketched would be left out of dL.
    """

    def __init__(self, model: nn.Module, k: int = 4, seed: int = 0) -> None:
        if k < 1:
            raise ValueError(f"LoraSketch: `k` must be at least 1, got {k}")
        linears = list(_lora_linears(model))
        _check_coverage(model, linears)
        self.adapters: list[_Adapter] = []
        self.num_numbers = 0
        for number, (module, wide_input) in enumerate(linears):
            width = module.in_features if wide_input else module.out_features
            signs = _projection(min(k, width), width, seed, number, module.weight.device)
            self.adapters.append(_Adapter(module, signs, wide_input, self.num_numbers))
            self.num_numbers = self.adapters[-1].end

    @torch.no_grad()
    def snapshot(self) -> Tensor:
        """The projected weights now, fp32 [M]: linear, so a change is the difference of two snapshots."""
        return torch.cat([adapter.project_weight().flatten() for adapter in self.adapters])

    @contextmanager
    def collect(self, cu_seqlens: Tensor) -> Iterator[Tensor]:
        """Sketches the gradient of whatever loss is run forward and backward inside, sample by sample.

        Args:
            cu_seqlens: [S + 1], boundaries of the packed batch that runs inside; on the CPU it costs no synchronisation.

        Yields:
            fp32 [S, M], filled as backward passes: <row i, snapshot change> estimates what sample i's part of that loss
            would change by. Divide by the loss's weight of a sample to have that of its own mean nll.
        """
        device = self.adapters[0].module.weight.device
        tiles = SampleTiles(cu_seqlens, device)
        sketches = torch.zeros(tiles.num_samples, self.num_numbers, device=device)
        with ExitStack() as hooks:
            for adapter in self.adapters:
                handle = adapter.module.register_forward_hook(_forward_hook(adapter, tiles, sketches))
                hooks.callback(handle.remove)
            yield sketches


class FirstOrderRound:
    """Loss changes of a round's samples from where each was seen to now. One object a round.

    Args:
        sketch: of the model that trains.
        dtype: in which sketches are kept: bfloat16 halves the memory, and its rounding is far below a sketch's own error.
    """

    def __init__(self, sketch: LoraSketch, dtype: torch.dtype = torch.float32) -> None:
        self.sketch, self.dtype = sketch, dtype
        self._seen: list[tuple[Tensor, list[tuple[Tensor, Tensor]]]] = []  # snapshot, [(rows [S], sketches [S, M])]
        self._stepped = True

    def add(self, rows: Tensor, sketches: Tensor, num_tokens: Tensor, upstream: float | Tensor) -> None:
        """Takes a micro-batch, before the optimizer step that uses it.

        Args:
            rows: int64 [S].
            sketches: fp32 [S, M], from `collect`.
            num_tokens: [S], supervised tokens of each sample; one without any has no gradient.
            upstream: the gradient that each supervised token's nll had in that loss: 1 / num_items, times the gradient
                scaler's factor where there is one.
        """
        if self._stepped:
            self._seen.append((self.sketch.snapshot(), []))
            self._stepped = False
        weight = upstream * num_tokens.to(sketches.device).clamp_min(1).float()
        self._seen[-1][1].append((rows, (sketches / weight[:, None]).to(self.dtype)))

    def step(self) -> None:
        """After an optimizer step: what is added next was seen at the new weights."""
        self._stepped = True

    def state_dict(self) -> dict[str, Any]:
        """Nested dicts of tensors."""
        return {
            str(step): {"snapshot": seen, **{f"{kind}.{i}": part[j] for i, part in enumerate(parts)
                                             for j, kind in enumerate(("rows", "sketches"))}}
            for step, (seen, parts) in enumerate(self._seen)
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`, taken between optimizer steps."""
        self._seen, self._stepped = [], True
        device = self.sketch.snapshot().device
        for step in sorted(state, key=int):
            entry = {name: tensor.to(device) for name, tensor in state[step].items()}
            parts = [(entry[f"rows.{i}"], entry[f"sketches.{i}"]) for i in range(len(entry) // 2)]
            self._seen.append((entry["snapshot"], parts))

    def loss_changes(self) -> tuple[Tensor, Tensor]:
        """Rows in the order they were added, int64 [R], and dL of each to the weights as they are now, fp32 [R]."""
        now, rows, changes = self.sketch.snapshot(), [], []
        for seen, parts in self._seen:
            moved = now - seen
            for part_rows, sketches in parts:
                rows.append(part_rows)
                changes.append(sketches.float() @ moved)
        if not rows:
            return torch.empty(0, dtype=torch.int64), now.new_empty(0)
        return torch.cat(rows), torch.cat(changes)


@register_estimator
class FirstOrder(LossChangeEstimator):
    """The estimator `first_order`: a row's fall from where it was seen to its round's end, and none after that.

    It needs the gradients themselves, so the training loop hands it each micro-batch: `lead-fast train` does; another loop
    calls `follow` once, wraps forward and backward in `collect`, and calls `stepped` after each optimizer step. Ranking
    evaluates it for every row, and each micro-batch pays for the sketches: see the head of this file.
    """

    name = "first_order"

    def __init__(self, num_arms: int, adam_beta1: float, device: torch.device) -> None:
        super().__init__(num_arms, adam_beta1, device)
        self.sketch: LoraSketch | None = None
        self.round: FirstOrderRound | None = None
        self.fall = torch.zeros(0, dtype=torch.float32, device=device)  # [N + 1] by position, from the first observation on
        self._table: UtilityTable | None = None

    def follow(self, model: nn.Module, k: int = 4, seed: int = 0) -> None:
        """Sketches the gradients of `model`, a peft model with LoRA; arguments as of `LoraSketch`."""
        self.sketch = LoraSketch(model, k, seed)
        self.round = FirstOrderRound(self.sketch)

    @contextmanager
    def collect(self, rows: Tensor, cu_seqlens: Tensor, num_tokens: Tensor, upstream: float | Tensor) -> Iterator[None]:
        """Sketches the packed micro-batch whose forward and backward run inside; arguments as of `FirstOrderRound.add`."""
        if self.sketch is None or self.round is None:
            raise RuntimeError("first_order: follow(model) must be called before training")
        with self.sketch.collect(cu_seqlens) as sketches:
            yield
        self.round.add(rows, sketches, num_tokens, upstream)

    def stepped(self) -> None:
        """After an optimizer step."""
        if self.round is not None:
            self.round.step()

    def drop(self, table: UtilityTable, clocks: Clocks, at: Tensor) -> Tensor:
        return self.fall[at] if len(self.fall) else torch.zeros(at.shape, dtype=torch.float32, device=self.device)

    def pair(self, table: UtilityTable, clocks: Clocks, at: Tensor, loss: Tensor, valid: Tensor) -> None:
        if self.sketch is None:
            raise RuntimeError("first_order: follow(model) must be called before training")
        self._table = table
        if not len(self.fall):
            self.fall = torch.zeros(len(table.rows) + 1, dtype=torch.float32, device=self.device)
        self.fall[at] = 0.0  # seen now: what it falls by until the round's end is not known yet

    def end_round(self, clocks: Clocks, arms: Tensor, first_step: int, weight_change: Tensor | None) -> None:
        if self.round is None or self.sketch is None or self._table is None:
            return
        rows, changes = self.round.loss_changes()
        known = (rows >= 0) & torch.isfinite(changes.to(rows.device))
        counts = known & last_occurrence(torch.where(known, rows, -1))  # of a row seen twice the last visit counts
        rows, changes = rows[counts].to(self.device), changes[counts.to(changes.device)].to(self.device)
        self.fall[self._table.position[rows].long()] = -changes
        self.round = FirstOrderRound(self.sketch)

    def state_dict(self) -> dict[str, Any]:
        """Between rounds; inside one, what was sketched so far as well."""
        return {"fall": self.fall.clone(), "round": {} if self.round is None else self.round.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.fall = state["fall"].to(self.device).clone()
        if self.round is not None:
            self.round.load_state_dict(state["round"])


def _forward_hook(adapter: _Adapter, tiles: SampleTiles, sketches: Tensor) -> Any:
    place, shape = sketches[:, adapter.start : adapter.end], adapter.shape

    @torch.no_grad()
    def forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad:  # the pass of reentrant checkpointing that will be run again
            return
        given = inputs[0].detach().flatten(0, -2)
        kept = adapter.project(given) if adapter.wide_input else given

        @torch.no_grad()
        def backward(gradient: Tensor) -> None:
            gradient = gradient.flatten(0, -2)
            left = gradient if adapter.wide_input else adapter.project(gradient)
            # Adds: a module may run more than once in a forward pass.
            place.add_(tiles.outer_sums(left, kept).view(-1, shape[0] * shape[1]))

        output.register_hook(backward)

    return forward


def _projection(k: int, width: int, seed: int, number: int, device: torch.device) -> Tensor:
    if k == width:
        return torch.eye(width, device=device)
    counters = torch.arange(k * width).view(k, width)
    signs = torch.where(philox_uniform(seed, STREAM_SIGNS, number, counters) < 0.5, -1.0, 1.0)
    return (signs / math.sqrt(k)).float().to(device)


def _lora_linears(model: nn.Module) -> Iterator[tuple[nn.Linear, bool]]:
    """Every trained A and B of the model's LoRA layers, and whether its wide side is the input."""
    for name, module in model.named_modules():
        if not (isinstance(getattr(module, "lora_A", None), nn.ModuleDict) and hasattr(module, "lora_B")):
            continue
        layer: Any = module
        for adapter, a in layer.lora_A.items():
            b = layer.lora_B[adapter]
            if not any(p.requires_grad for p in (*a.parameters(), *b.parameters())):
                continue
            if adapter in getattr(layer, "lora_variant", {}):
                kind = type(layer.lora_variant[adapter]).__name__
                raise ValueError(f"LoraSketch: `model` must have plain LoRA layers, got {kind} in {name}")
            if type(a) is not nn.Linear or type(b) is not nn.Linear:
                raise ValueError(f"LoraSketch: `model` must have LoRA on linear layers, got {type(a).__name__} in {name}")
            yield from ((linear, wide) for linear, wide in ((a, True), (b, False)) if linear.weight.requires_grad)


def _check_coverage(model: nn.Module, linears: list[tuple[nn.Linear, bool]]) -> None:
    if not linears:
        raise ValueError(f"LoraSketch: `model` must train LoRA weights, got {type(model).__name__} without any")
    sketched = {id(linear.weight) for linear, _ in linears}
    left = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in sketched]
    if left:
        raise ValueError(f"LoraSketch: `model` must train LoRA weights only, got {len(left)} other parameters, first {left[0]}")
