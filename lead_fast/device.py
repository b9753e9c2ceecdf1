"""Between the host and a device, with as few waits as can be."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

_HUGE_FROM = 2**24  # bytes: less fits the caches, and the translations of its addresses do


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """On `device`; from the CPU to a GPU through pinned memory, so that nothing waits."""
    if tensor.device == device or device.type == "cpu":
        return tensor if tensor.device == device else tensor.to(device)
    return (tensor.pin_memory() if tensor.device.type == "cpu" else tensor).to(device, non_blocking=True)


def to_fp32(tensor: Tensor, device: torch.device) -> Tensor:
    """Contiguous and in fp32 on `device`; what is so already is given as it is, without a call that would find that out."""
    if tensor.device == device and tensor.dtype == torch.float32 and tensor.is_contiguous():
        return tensor
    return to_device(tensor, device).to(torch.float32).contiguous()


def scattered_zeros(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros for a table that is read and written in many places at once.

    On a CPU a large one lies in huge pages, where the system gives them when asked: with small ones each place is a miss of the
    cache and one of the address translation.
    """
    num_bytes = dtype.itemsize * math.prod(shape)
    if device.type != "cpu" or num_bytes < _HUGE_FROM or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them: the memory is as good as before
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def scattered(tensor: Tensor) -> Tensor:
    """A copy of a tensor in the memory of `scattered_zeros`."""
    return scattered_zeros(*tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


_WORDS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def copy_to_host(*tensors: Tensor) -> list[Tensor]:
    """Tensors on the CPU: what is on a device by one copy, since a copy a tensor would wait as often."""
    away = [t for t in tensors if t.device.type != "cpu"]
    if not away:
        return list(tensors)
    copies = iter(from_words(as_words(away).cpu(), away))
    return [t if t.device.type == "cpu" else next(copies) for t in tensors]


def as_words(tensors: Sequence[Tensor]) -> Tensor:
    """All of them, of any shape, as int64 words in a row; floating point numbers by their bits."""
    return torch.cat([t.reshape(-1).view(_WORDS.get(t.dtype, t.dtype)).long() for t in tensors])


def from_words(words: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """What `as_words` of tensors of the shapes and dtypes of `like` has put in a row."""
    parts = words.split([t.numel() for t in like])
    return [p.to(_WORDS.get(t.dtype, t.dtype)).view(t.dtype).view(t.shape) for p, t in zip(parts, like, strict=True)]
