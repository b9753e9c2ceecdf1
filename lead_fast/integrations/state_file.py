"""A nested state (as `LeadEngine.state_dict`) as one safetensors file: tensors by key, the rest as JSON in its header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lead_fast.files import atomic_path

_TENSOR = "$tensor"
_HEADER = "state"


def save_state(path: str | Path, state: dict[str, Any]) -> None:
    """Writes a state, whole or not at all; no pickle.

    Args:
        path: the file.
        state: dicts with string keys, lists and tuples of tensors (any device), numbers, strings, bools and None.

    Raises:
        TypeError: another leaf, or a key that is no string. ValueError: a float that JSON has no word for.
    """
    tensors: dict[str, Tensor] = {}
    header = json.dumps(_flatten(state, "", tensors), allow_nan=False)
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, {_HEADER: header})


def load_state(path: str | Path) -> dict[str, Any]:
    """The state that `save_state` wrote; tensors on the CPU, tuples as lists.

    Raises:
        ValueError: there is no such file, or it is none of these.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"load_state: expected a file at {path}, got none")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(_HEADER)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, the file is no dict
    except SafetensorError as error:
        raise ValueError(f"load_state: {path} must be a whole safetensors file, got {error}") from error
    if header is None:
        raise ValueError(f"load_state: {path} must hold a state in its header, got none")
    return _unflatten(json.loads(header), tensors)


def _flatten(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """`value` with {"$tensor": key} in the place of each tensor, which goes to `tensors`."""
    if isinstance(value, Tensor):
        key = key if key not in tensors else f"{key}#{len(tensors)}"  # names may hold dots themselves
        tensors[key] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: key}
    if isinstance(value, dict):
        for name in value:
            if not isinstance(name, str) or name == _TENSOR:
                raise TypeError(f"save_state: keys of {key!r} must be strings other than {_TENSOR!r}, got {name!r}")
        return {name: _flatten(entry, f"{key}.{name}".lstrip("."), tensors) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_flatten(entry, f"{key}.{i}", tensors) for i, entry in enumerate(value)]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(f"save_state: {key!r} must be a tensor, number, string, None, dict or list, got {type(value).__name__}")


def _unflatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        return {name: _unflatten(entry, tensors) for name, entry in value.items()}
    return [_unflatten(entry, tensors) for entry in value] if isinstance(value, list) else value
