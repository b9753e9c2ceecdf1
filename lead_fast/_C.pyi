"""The C++ core of lead_fast for NumPy arrays, read in place: wrong dtypes and layouts are refused, never converted."""

from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

class BuildInfo(TypedDict):
    version: str
    compiler: str
    cpp_standard: int
    instruction_sets: list[str]
    torch_target_version: str
    cuda_archs: str | None

def build_info() -> BuildInfo: ...
def philox_uniform(seed: int, stream: int, round: int, counters: NDArray[np.int64]) -> NDArray[np.float64]: ...
def exp3_probs(log_w: NDArray[np.float64], mask: NDArray[np.bool_], gamma: float) -> NDArray[np.float64]: ...
def exp3_draw(probs: NDArray[np.float64], uniforms: NDArray[np.float64]) -> NDArray[np.int64]: ...
def exp3_update(
    log_w: NDArray[np.float64],
    mask: NDArray[np.bool_],
    arms: NDArray[np.int64],
    rewards: NDArray[np.float64],
    probs: NDArray[np.float64],
    gamma: float,
    variant: int,
    share: float,
) -> NDArray[np.float64]: ...
def scale_rewards(scale: NDArray[np.float64], rewards: NDArray[np.float64]) -> NDArray[np.float64]: ...
def bandit_draw(
    log_w: NDArray[np.float64],
    counts: NDArray[np.float64],
    sums: NDArray[np.float64],
    mask: NDArray[np.bool_],
    uniforms: NDArray[np.float64],
    gamma: float,
    variant: int,
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]: ...
def bandit_update(
    log_w: NDArray[np.float64],
    scale: NDArray[np.float64],
    counts: NDArray[np.float64],
    sums: NDArray[np.float64],
    mask: NDArray[np.bool_],
    arms: NDArray[np.int64],
    rewards: NDArray[np.float64],
    probs: NDArray[np.float64],
    gamma: float,
    variant: int,
    share: float,
) -> NDArray[np.float64]: ...
def observe(
    rows: NDArray[np.int64],
    loss: NDArray[np.float32],
    num_tokens: NDArray[np.float32],
    grad_norm_sq: NDArray[np.float32],
    now: NDArray[np.int64] | None,
    position: NDArray[np.int32],
    arm: NDArray[np.int16],
    values: NDArray[np.float32],
    seen: NDArray[np.int32],
    flags: NDArray[np.uint8],
    left: NDArray[np.int64],
    counters: NDArray[np.int64],
    clock: NDArray[np.float64],
    unit: NDArray[np.float64],
    pairs: NDArray[np.float64] | None,
    totals: NDArray[np.float64] | None,
    fit: NDArray[np.float64] | None,
    adam_beta1: float,
    max_uses: int,
    num_choosable: int,
    before: NDArray[np.float64] | None = None,
) -> None: ...
def step(
    lr: NDArray[np.float64],
    num_items: NDArray[np.float64],
    arms: NDArray[np.int64],
    clock: NDArray[np.float64],
    counters: NDArray[np.int64],
    unit: NDArray[np.float64],
) -> None: ...
def step_by_numbers(
    lr: float,
    num_items: float,
    arms: NDArray[np.int64],
    clock: NDArray[np.float64],
    counters: NDArray[np.int64],
    unit: NDArray[np.float64],
) -> None: ...
def grad_norm_coefficients(
    clock: NDArray[np.float64],
    counters: NDArray[np.int64],
    unit: NDArray[np.float64],
    fit: NDArray[np.float64],
    adam_beta1: float,
    num_steps: int,
) -> NDArray[np.float64]: ...
def utility(
    rows: NDArray[np.int64],
    position: NDArray[np.int32],
    arm: NDArray[np.int16],
    values: NDArray[np.float32],
    seen: NDArray[np.int32],
    coefficients: NDArray[np.float64],
    by_round: bool,
    smoothing: float,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]: ...
def calibrate(
    pairs: NDArray[np.float64],
    totals: NDArray[np.float64],
    fit: NDArray[np.float64],
    prior_pairs: float,
    min_pairs: float,
) -> None: ...
def mark_chosen(
    rows: NDArray[np.int64],
    position: NDArray[np.int32],
    arm: NDArray[np.int16],
    flags: NDArray[np.uint8],
    left: NDArray[np.int64],
    max_uses: int,
) -> None: ...
def end_round(
    rows: NDArray[np.int64],
    begin_idu: NDArray[np.float32],
    drop: NDArray[np.float32] | None,
    arms: NDArray[np.int64],
    position: NDArray[np.int32],
    arm: NDArray[np.int16],
    values: NDArray[np.float32],
    seen: NDArray[np.int32],
    flags: NDArray[np.uint8],
    coefficients: NDArray[np.float64],
    by_round: bool,
    smoothing: float,
    fall_of_utility: bool,
    counters: NDArray[np.int64],
    unit: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]: ...
def rank(
    arm_drawn: NDArray[np.int64],
    group_offsets: NDArray[np.int64],
    arm_groups: NDArray[np.int64],
    rows: NDArray[np.int32],
    values: NDArray[np.float32],
    seen: NDArray[np.int32],
    flags: NDArray[np.uint8],
    coefficients: NDArray[np.float64],
    by_round: bool,
    utility: NDArray[np.float32] | None,
    num_tokens: NDArray[np.int32] | None,
    smoothing: float,
    rate: float,
    cap: int,
    token_budget: float,
    exclude_top: float,
    choose: int,
    temperature: float,
    seed: int,
    round: int,
    max_uses: int,
    max_arm_rows: int,
    capacity: int,
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.uint8]]: ...
