"""Two CPU processes (gloo) that accelerate takes for accelerators, since it shards weights on those alone.

Its state is told so; all that follows is its own code, torch's and DeepSpeed's.
"""

from __future__ import annotations

import os
import socket

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(rank, world, port):
    """This process, as a launcher would have started it."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(world), RANK=str(rank),
                      LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world), OMP_NUM_THREADS="1")  # fmt: skip


def tell_fsdp2(efficient=True, wrap="transformer_based_wrap", precision=None, outputs=None):
    """accelerate's state, set up for several CPU processes, is told that they are accelerators which shard by FSDP2.

    `efficient`: the launcher's default. `wrap`: None is its default. `precision`: mixed, as accelerate then sets it.
    `outputs`: what a model returns is cast to that, as with mixed precision.
    """
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy=wrap, cpu_ram_efficient_loading=efficient, reshard_after_forward=True,
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"] if wrap else None,
    )  # fmt: skip
    if precision is not None:
        plugin.set_mixed_precision(precision)
    if outputs is not None:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(output_dtype=outputs)
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin


def tell_zero(rank, world):
    """accelerate's state, set up for DeepSpeed, is told that this CPU process is one of several accelerators."""
    told = {"num_processes": world, "process_index": rank, "local_process_index": rank, "backend": "gloo"}
    for state in (PartialState, AcceleratorState):
        state._shared_state.update(told)
