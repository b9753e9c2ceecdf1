"""Loads the compiled libraries, and says which are there.

Importing this module loads them once. A library that is absent leaves its operators to the PyTorch reference, which is
logged; one that is present and does not load is an error, since a silent fallback would hide a broken installation.
LEAD_FAST_NO_EXT=1 in the environment loads nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from pathlib import Path

import torch

_log = logging.getLogger("lead_fast")
_FOLDER = Path(__file__).parent
_REMEDY = "rebuild it with `pip install --no-build-isolation .`, or set LEAD_FAST_NO_EXT=1 to run on the reference"


def _load() -> dict[str, bool]:
    if os.environ.get("LEAD_FAST_NO_EXT") == "1":
        _log.info("LEAD_FAST_NO_EXT=1: no compiled library is loaded, operators run on their PyTorch reference")
        return {"_C": False, "_ops_cpu": False, "_ops_cuda": False}

    # Under a CPU torch the symbols that _ops_cuda needs do not exist.
    loaded = {
        "_C": _import_core(),
        "_ops_cpu": _load_operators("_ops_cpu"),
        "_ops_cuda": torch.version.cuda is not None and _load_operators("_ops_cuda"),
    }
    if not (loaded["_C"] and loaded["_ops_cpu"]):
        _log.warning("lead-fast is installed without its compiled extension: CPU operators run on the slower reference")
    if torch.version.cuda is not None and not loaded["_ops_cuda"]:
        _log.info("lead-fast is installed without CUDA operators: they run on Triton or the PyTorch reference")
    return loaded


def _import_core() -> bool:
    if importlib.util.find_spec("lead_fast._C") is None:
        return False
    try:
        importlib.import_module("lead_fast._C")
    except ImportError as error:
        raise ImportError(f"lead_fast: `_C` is installed and does not load ({error}); {_REMEDY}") from error
    return True


def _load_operators(name: str) -> bool:
    path = _FOLDER / f"{name}.so"
    if not path.exists():
        return False
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(f"lead_fast: `{path.name}` is installed and does not load ({error}); {_REMEDY}") from error
    return True


_loaded = _load()


def available() -> dict[str, bool]:
    """Which compiled libraries are loaded.

    Returns:
        `_C` (NumPy core), `_ops_cpu` and `_ops_cuda` (torch operators), each True when loaded. An operator without its
        library runs on its PyTorch reference.
    """
    return dict(_loaded)
