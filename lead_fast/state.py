"""The operators of the engine's state: schemas and fake rules (torch.ops.lead_fast.observe, step, rank, ...).

What each computes and the layout of its tensors is in `lead_fast.reference_state`, which also serves every device that no
library does; the extension brings kernels for the CPU and for CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lead_fast import extension as _extension  # noqa: F401, its import loads the C++ and CUDA kernels
from lead_fast import reference_state as reference

_TABLE = "Tensor(a!) values, Tensor(b!) seen, Tensor(c!) flags"

SCHEMAS = {
    "observe": "(Tensor rows, Tensor loss, Tensor num_tokens, Tensor grad_norm_sq, Tensor? now, Tensor position, Tensor arm, "
    f"{_TABLE}, Tensor(d!) left, Tensor(e!) counters, Tensor clock, Tensor unit, Tensor(f!)? pairs, Tensor(g!)? totals, "
    "Tensor? fit, float adam_beta1, int max_uses, int num_choosable, Tensor(h!)? before=None) -> ()",
    "step": "(Tensor lr, Tensor num_items, Tensor arms, Tensor(a!) clock, Tensor(b!) counters, Tensor(c!) unit) -> ()",
    "step_by_numbers": "(float lr, float num_items, Tensor arms, Tensor(a!) clock, Tensor(b!) counters, Tensor(c!) unit) -> ()",
    "grad_norm_coefficients": "(Tensor clock, Tensor counters, Tensor unit, Tensor fit, float adam_beta1, int num_steps) "
    "-> Tensor",
    "utility": "(Tensor rows, Tensor position, Tensor arm, Tensor values, Tensor seen, Tensor coefficients, bool by_round, "
    "float smoothing) -> (Tensor idu, Tensor loss)",
    "calibrate": "(Tensor pairs, Tensor totals, Tensor(a!) fit, float prior_pairs, float min_pairs) -> ()",
    "rank": "(Tensor arm_drawn, Tensor group_offsets, Tensor arm_groups, Tensor rows, Tensor values, Tensor seen, "
    "Tensor flags, Tensor coefficients, bool by_round, Tensor? utility, Tensor? num_tokens, float smoothing, float rate, "
    "int cap, float token_budget, float exclude_top, int choose, float temperature, int seed, int round, int max_uses, "
    "int max_arm_rows, int capacity) -> (Tensor rows, Tensor utility, Tensor uses)",
    "exp3_probs": "(Tensor log_w, Tensor mask, float gamma) -> Tensor",
    "exp3_draw": "(Tensor probs, Tensor uniforms) -> Tensor",
    "exp3_update": "(Tensor log_w, Tensor mask, Tensor arms, Tensor rewards, Tensor probs, float gamma, int variant, "
    "float share) -> Tensor",
    "scale_rewards": "(Tensor(a!) scale, Tensor rewards) -> Tensor",
    "bandit_draw": "(Tensor log_w, Tensor counts, Tensor sums, Tensor mask, Tensor uniforms, float gamma, int variant) "
    "-> (Tensor arms, Tensor arm_probs, Tensor probs)",
    "bandit_update": "(Tensor(a!) log_w, Tensor(b!) scale, Tensor(c!) counts, Tensor(d!) sums, Tensor mask, Tensor arms, "
    "Tensor rewards, Tensor probs, float gamma, int variant, float share) -> Tensor",
    "mark_chosen": "(Tensor rows, Tensor position, Tensor arm, Tensor(a!) flags, Tensor(b!) left, int max_uses) -> ()",
    "end_round": "(Tensor rows, Tensor begin_idu, Tensor? drop, Tensor arms, Tensor position, Tensor arm, "
    "Tensor(a!) values, Tensor seen, Tensor flags, Tensor coefficients, bool by_round, float smoothing, "
    "bool fall_of_utility, Tensor(b!) counters, Tensor(c!) unit) -> (Tensor rewards, Tensor summary, Tensor quarantined)",
}


def _fake_nothing(*_: Any) -> None:
    """Of operators that only move their arguments."""


def _fake_coefficients(clock: Tensor, counters: Tensor, unit: Tensor, fit: Tensor, beta1: float, num_steps: int) -> Tensor:
    return clock.new_empty(2, clock.shape[1] - reference.ARM_LR_SUM, num_steps + 1)


def _fake_utility(rows: Tensor, position: Tensor, arm: Tensor, values: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return values.new_empty(rows.shape), values.new_empty(rows.shape)


def _fake_rank(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    arm_drawn, _, _, _, values, _, flags, *_, capacity = arguments
    return arm_drawn.new_empty(capacity), values.new_empty(capacity), flags.new_empty(capacity)


def _fake_probs(log_w: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(log_w)


def _fake_draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    return uniforms.new_empty(uniforms.shape, dtype=torch.int64)


def _fake_scale(scale: Tensor, rewards: Tensor) -> Tensor:
    return torch.empty_like(rewards)


def _fake_bandit_draw(
    log_w: Tensor, counts: Tensor, sums: Tensor, mask: Tensor, uniforms: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_draw(log_w, uniforms), torch.empty_like(uniforms), torch.empty_like(log_w)


def _fake_bandit_update(*arguments: Any) -> Tensor:
    rewards = arguments[6]
    return torch.empty_like(rewards)


def _fake_end_round(
    rows: Tensor, begin_idu: Tensor, drop: Tensor | None, arms: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    unit = rest[-1]
    return unit.new_empty(arms.shape), unit.new_empty(2), torch.empty_like(rows, dtype=torch.bool)


_FAKES: dict[str, Callable[..., Any]] = {
    "observe": _fake_nothing,
    "step": _fake_nothing,
    "step_by_numbers": _fake_nothing,
    "grad_norm_coefficients": _fake_coefficients,
    "utility": _fake_utility,
    "calibrate": _fake_nothing,
    "rank": _fake_rank,
    "exp3_probs": _fake_probs,
    "exp3_draw": _fake_draw,
    "exp3_update": _fake_probs,
    "scale_rewards": _fake_scale,
    "bandit_draw": _fake_bandit_draw,
    "bandit_update": _fake_bandit_update,
    "mark_chosen": _fake_nothing,
    "end_round": _fake_end_round,
}

_library = torch.library.Library("lead_fast", "FRAGMENT")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    # The catch-all below explicit CPU and CUDA kernels.
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"lead_fast::{_name}", _FAKES[_name], lib=_library)
