"""What the core of the state refuses, by name and before anything moves: `_C` on NumPy arrays and the CPU's torch operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lead_fast import extension
from lead_fast.state import SCHEMAS

if not all(extension.available()[name] for name in ("_C", "_ops_cpu")):
    pytest.skip("installed without the compiled extension", allow_module_level=True)

from state_core_cases import State, copies, f32

from lead_fast import _C


def schema(op: str) -> list[Any]:
    return getattr(torch.ops.lead_fast, op).default._schema.arguments


def call_torch(op: str, arguments: list[Any]) -> None:
    getattr(torch.ops.lead_fast, op)(*[torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in arguments])


ARRAYS = [
    (op, place, argument.name, argument.alias_info is not None)
    for op in SCHEMAS
    for place, argument in enumerate(schema(op))
    if "Tensor" in str(argument.type)
]


@pytest.mark.parametrize(("op", "place", "name", "moved"), ARRAYS)
def test_wrong_arrays_are_named(op, place, name, moved):
    valid = State(2).arguments(op)
    array = valid[place]

    def put(other: np.ndarray) -> list[Any]:
        return [*valid[:place], other, *valid[place + 1 :]]

    wrong = [
        (array.astype(np.float16), TypeError, r"\w+ \[.*\], got another dtype"),
        (array[None], ValueError, rf"{array.dtype} \[.*\], got {array.dtype} \[1"),
    ]
    if array.size > 1:
        wrong.append((np.repeat(array, 2, axis=-1)[..., ::2], ValueError, "C-contiguous, got"))
    for broken, error, message in wrong:
        with pytest.raises(error, match=f"^{op}: `{name}` must be {message}"):
            getattr(_C, op)(*put(broken))
        with pytest.raises((RuntimeError, ValueError, TypeError), match=f"{op}: `{name}` must be {message}"):
            call_torch(op, put(broken))

    frozen = array.copy()
    frozen.flags.writeable = False
    if moved:
        with pytest.raises(ValueError, match=f"^{op}: `{name}` must be writeable, got a read-only array"):
            getattr(_C, op)(*put(frozen))
    else:
        getattr(_C, op)(*put(frozen))


SIZES = [
    ("observe", "loss", np.zeros(19, f32), r"be float32 \[20\], got float32 \[19\]"),
    ("observe", "values", np.zeros((4, 12), f32), r"be float32 \[4, 13\], got float32 \[4, 12\]"),
    ("observe", "clock", np.zeros((8, 4)), r"be float64 \[C \+ 1, 5\], got float64 \[8, 4\]"),
    ("observe", "fit", np.zeros((5, 6)), r"be float64 \[6, 6\], got float64 \[5, 6\]"),
    ("observe", "totals", None, "be given with `pairs`, got none"),
    ("observe", "before", np.zeros((6, 19)), r"be float64 \[6, 20\], got float64 \[6, 19\]"),
    ("observe", "now", np.array([7]), r"be in \[0, 6\], the steps so far, got 7"),
    ("observe", "rows", np.full(20, 12), r"be in \[-1, 12\), got 12"),
    ("observe", "rows", np.full(20, -2), r"be in \[-1, 12\), got -2"),
    ("step", "clock", np.zeros((7, 5)), "have an entry after step 6, got 7 entries"),
    ("step", "arms", np.array([0, 2]), r"be in \[-1, 2\), got 2"),
    ("grad_norm_coefficients", "num_steps", 8, r"be in \[0, 8\), got 8"),
    ("utility", "rows", np.array([3, -1]), r"be in \[0, 12\), got -1"),
    ("utility", "rows", np.array([12]), r"be in \[0, 12\), got 12"),
    ("calibrate", "prior_pairs", 0.0, "be above 0, got 0"),
    ("rank", "arm_drawn", np.array([2]), r"be in \[-1, 2\), got 2"),
    ("rank", "group_offsets", np.arange(0, 35, 5), r"ascend within \[0, 12\], got"),
    ("rank", "arm_groups", np.array([0, 7, 7]), r"ascend within \[0, 6\], got 0, 7"),
    ("rank", "capacity", 0, "be at least the [1-9] rows chosen, got 0"),
    ("rank", "rate", 1.5, r"be in \[0, 1\], got 1.5"),
    ("rank", "exclude_top", -0.1, r"be in \[0, 1\], got -0.1"),
    ("rank", "choose", 3, "be 0, 1 or 2, got 3"),
    ("rank", "round", -1, r"be an integer in \[0, 2\*\*32\), got -1"),
    ("exp3_draw", "uniforms", np.array([1.5]), r"be in \[0, 1\], got 1.5"),
    ("exp3_update", "arms", np.array([0, 2]), r"be in \[-1, 2\), got 2"),
    ("exp3_update", "gamma", -0.5, r"be in \[0, 1\], got -0.5"),
    ("bandit_draw", "uniforms", np.array([1.5]), r"be in \[0, 1\], got 1.5"),
    ("bandit_draw", "log_w", np.array([0.0, np.inf]), "be below inf at the arms of `mask`, got inf at arm 1"),
    ("bandit_draw", "variant", 5, r"be in \[0, 4\], got 5"),
    ("bandit_update", "arms", np.array([0, 2]), r"be in \[-1, 2\), got 2"),
    ("bandit_update", "variant", -1, r"be in \[0, 4\], got -1"),
    ("bandit_update", "share", 1.5, r"be in \[0, 1\], got 1.5"),
    ("mark_chosen", "rows", np.array([0, 12]), r"be in \[0, 12\), got 12"),
    ("end_round", "rows", np.array([-1, *range(11)]), r"be in \[0, 12\), got -1"),
    ("end_round", "arms", np.array([0, 2]), r"be in \[-1, 2\), got 2"),
    ("end_round", "drop", np.zeros(11, f32), r"be float32 \[12\], got float32 \[11\]"),
]


@pytest.mark.parametrize(("op", "name", "wrong", "message"), SIZES)
def test_wrong_sizes_and_values_are_named_before_anything_moves(op, name, wrong, message):
    arguments = State(2).arguments(op)
    arguments[[argument.name for argument in schema(op)].index(name)] = wrong
    before = copies(arguments)
    with pytest.raises(ValueError, match=f"^{op}: `{name}` must {message}"):
        getattr(_C, op)(*arguments)
    with pytest.raises((RuntimeError, ValueError), match=f"{op}: `{name}` must {message}"):
        call_torch(op, arguments)
    for now, then in zip(arguments, before, strict=True):
        assert not isinstance(now, np.ndarray) or now.tobytes() == then.tobytes()
