"""Between the host and a device, with as few waits as can be."""

from __future__ import annotations

import math
import mmap
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


def copy_to_host(*tensors: Tensor) -> list[Tensor]:
    """Tensors on the CPU by one copy: each as int64 words, since a copy a tensor would wait as often."""
    if tensors[0].device.type == "cpu":
        return list(tensors)
    words = {torch.float64: torch.int64, torch.float32: torch.int32}
    packed = torch.cat([t.view(words.get(t.dtype, t.dtype)).long() for t in tensors]).cpu()
    parts = packed.split([len(t) for t in tensors])
    return [p.to(words.get(t.dtype, t.dtype)).view(t.dtype) for p, t in zip(parts, tensors, strict=True)]
