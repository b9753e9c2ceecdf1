"""lead-fast: data selection inside instruction tuning (LEAD, arXiv 2505.07437).

The training step already knows what LEAD wants to know of a sample: a fused loss reads it out, a table remembers it, an
engine turns it into rounds. Everything here is importable from `lead_fast` itself; see README.md for the two-minute tour.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lead_fast.audit import audit
    from lead_fast.config import LeadConfig
    from lead_fast.engine import LeadEngine
    from lead_fast.ops import SampleStats, linear_cross_entropy
    from lead_fast.pool import Pool
    from lead_fast.rounds import Round, RoundReport
    from lead_fast.utility import LossChangeEstimator, register_estimator

__all__ = [
    "LeadConfig",
    "LeadEngine",
    "LossChangeEstimator",
    "Pool",
    "Round",
    "RoundReport",
    "SampleStats",
    "audit",
    "linear_cross_entropy",
    "register_estimator",
]

_HOMES = {
    "LeadConfig": "config",
    "LeadEngine": "engine",
    "LossChangeEstimator": "utility",
    "Pool": "pool",
    "Round": "rounds",
    "RoundReport": "rounds",
    "SampleStats": "ops",
    "audit": "audit",
    "linear_cross_entropy": "ops",
    "register_estimator": "utility",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that `lead-fast --help` does not wait for torch.
    if name in _HOMES:
        return getattr(importlib.import_module(f"lead_fast.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'lead_fast' has no attribute {name!r}")
