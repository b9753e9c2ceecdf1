"""`lead-fast doctor`: what this machine will use, and what is missing."""

from __future__ import annotations

import importlib.metadata
import platform
from importlib.util import find_spec
from typing import Any

import torch

from lead_fast import __version__, extension
from lead_fast.attention import describe_attention

_PACKAGES = ("torch", "triton", "transformers", "accelerate", "peft", "flash-attn", "bitsandbytes", "deepspeed", "datasets",
             "liger-kernel", "trl")  # fmt: skip


def examine() -> dict[str, Any]:
    """Prints what will be used, and returns it as one JSON object."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    precision = "bf16" if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    libraries = extension.available()
    loss = "reference"
    if cuda and find_spec("triton") is not None:
        loss = "triton"
    elif not cuda and libraries.get("_ops_cpu"):
        loss = "cpp"
    found: dict[str, Any] = {
        "lead_fast": __version__,
        "python": platform.python_version(),
        "device": _describe_device(device),
        "precision": precision,
        "attention": describe_attention(device, torch.bfloat16 if precision == "bf16" else torch.float32),
        "loss": loss,
        "extension": libraries,
        "packages": {name: _version(name) for name in _PACKAGES},
    }
    for name, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {_say(v)}" for k, v in value.items())
        print(f"{name:<12} {value}")
    return found


def made_with(device: torch.device, precision: str) -> dict[str, str]:
    """What a run was made with, for its summary."""
    packages = ("torch", "transformers", "peft", "accelerate")
    versions = [f"lead-fast {__version__}", *(f"{name} {_version(name)}" for name in packages)]
    return {"device": _describe_device(device), "precision": precision, "versions": ", ".join(versions)}


def _describe_device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _say(value: object) -> str:
    return {True: "loaded", False: "not loaded", None: "not installed"}.get(value, str(value))  # pyright: ignore
