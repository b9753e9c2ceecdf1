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


class Parcel:
    """Copies of tensors of one device, whatever their shapes, strides and dtypes, in one buffer: all move at once."""

    @torch.no_grad()
    def __init__(self, tensors: Sequence[Tensor]) -> None:
        dtypes = {t.dtype for t in tensors}
        # Bytes, but for tensors of one dtype: each call counts, and theirs needs no view. The widest come first, so that
        # each part begins where numbers of its width may.
        self._order, unit = list(range(len(tensors))), torch.uint8
        if len(dtypes) == 1:
            (unit,) = dtypes
        else:
            self._order.sort(key=lambda i: -tensors[i].itemsize)
        self._kinds = [(t.dtype, t.shape, t.numel() * (t.itemsize if unit == torch.uint8 else 1)) for t in tensors]
        flat = [t if t.dim() == 1 else t.reshape(-1) for t in (tensors[i] for i in self._order)]
        parts = [t if t.dtype == unit else _dense(t).view(unit) for t in flat]
        self.buffer = torch.cat(parts) if parts else torch.empty(0, dtype=unit)

    def opened(self, moved: Tensor | None = None) -> list[Tensor]:
        """The tensors, as views of the buffer, or of `moved`, a copy of it somewhere else."""
        tensors, start = [torch.empty(0)] * len(self._kinds), 0
        moved = self.buffer if moved is None else moved
        for i in self._order:
            dtype, shape, size = self._kinds[i]
            part = moved[start : start + size]
            part = part if part.dtype == dtype else part.view(dtype)
            tensors[i] = part if len(shape) == 1 else part.view(shape)
            start += size
        return tensors


def _dense(flat: Tensor) -> Tensor:
    """Of stride 1, which a view in another dtype needs of a single number too."""
    return flat if flat.stride(0) == 1 else flat.clone(memory_format=torch.contiguous_format)


def copy_to_host(*tensors: Tensor) -> list[Tensor]:
    """Tensors on the CPU: what is on a device by one copy, since a copy a tensor would wait as often."""
    away = [t for t in tensors if t.device.type != "cpu"]
    if not away:
        return list(tensors)
    parcel = Parcel(away)
    copies = iter(parcel.opened(parcel.buffer.cpu()))
    return [t if t.device.type == "cpu" else next(copies) for t in tensors]


def copy_to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of the CPU on `device`, by one copy through pinned memory that nothing waits for."""
    if device.type == "cpu":
        return list(tensors)
    parcel = Parcel(tensors)
    return parcel.opened(to_device(parcel.buffer, device))
