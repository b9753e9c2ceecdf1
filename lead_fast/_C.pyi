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
def exp3_draw(probs: NDArray[np.float64], uniform: float) -> int: ...
