"""Between the host and a device, with as few waits as can be."""

from __future__ import annotations

import torch
from torch import Tensor


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


def copy_to_host(*tensors: Tensor) -> list[Tensor]:
    """Tensors on the CPU by one copy: each as int64 words, since a copy a tensor would wait as often."""
    if tensors[0].device.type == "cpu":
        return list(tensors)
    words = {torch.float64: torch.int64, torch.float32: torch.int32}
    packed = torch.cat([t.view(words.get(t.dtype, t.dtype)).long() for t in tensors]).cpu()
    parts = packed.split([len(t) for t in tensors])
    return [p.to(words.get(t.dtype, t.dtype)).view(t.dtype) for p, t in zip(parts, tensors, strict=True)]
