"""Weights that FSDP2 (as DTensors) or DeepSpeed's ZeRO 3 (as partitions) shards over processes: whole ones of them, and back.

DeepSpeed is imported only where a weight is its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def is_partitioned(tensor: Tensor) -> bool:
    """ZeRO 3 has it; nothing can compute with it but modules that DeepSpeed wraps."""
    return hasattr(tensor, "ds_id")


def are_sharded(tensors: Iterable[Tensor]) -> bool:
    return any(isinstance(t, DTensor) or is_partitioned(t) for t in tensors)


def whole_shape(tensor: Any) -> torch.Size:
    return torch.Size(tensor.ds_shape) if is_partitioned(tensor) else tensor.shape


def keep_output_precision(fsdp_plugin: Any) -> None:
    """Has FSDP return what a model computes as it is: accelerate's mixed precision would round losses and gradient norms."""
    policy = fsdp_plugin.mixed_precision_policy
    if getattr(policy, "output_dtype", None) is not None:
        fsdp_plugin.mixed_precision_policy = dataclasses.replace(policy, output_dtype=None)


def own_part(tensor: Any) -> Tensor:
    """What this process holds of it, detached; of a tensor that is not sharded all."""
    if isinstance(tensor, DTensor):
        return tensor.to_local().detach()
    if not is_partitioned(tensor):
        return tensor.detach()
    size = tensor.partition_numel()
    begin = min(tensor.ds_numel, torch.distributed.get_rank(tensor.ds_process_group) * size)
    return tensor.ds_tensor.detach().reshape(-1)[: min(size, tensor.ds_numel - begin)]  # the rest is padding


def whole(tensor: Tensor) -> Tensor:
    """All of it, detached; all processes must call this, and a tensor that is not sharded is given as it is."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor().detach()
    if not is_partitioned(tensor):
        return tensor.detach()
    with _gathered(tensor):
        return tensor.detach().clone()


def whole_on_first(tensor: Tensor, is_first: bool) -> Tensor:
    """All of a sharded tensor on the host of the first process, nothing on the others; any other tensor as it is."""
    if not are_sharded([tensor]):
        return tensor.detach()
    full = whole(tensor)
    return full.cpu() if is_first else torch.empty(0, dtype=tensor.dtype)


def sharded_like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor of the parameter's shape, sharded as FSDP shards that; any other tensor as it is."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


@torch.no_grad()
def assign(parameter: Tensor, value: Tensor) -> None:
    """Copies a whole tensor into a parameter; all processes must call this."""
    if not is_partitioned(parameter):
        parameter.copy_(sharded_like(value, parameter))
        return
    with _gathered(parameter, modified=True):
        parameter.copy_(value)


def _gathered(parameter: Tensor, *, modified: bool = False) -> Any:
    import deepspeed

    # The first process's is what they go on with.
    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if modified else None)
