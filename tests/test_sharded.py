"""Weights sharded over two processes by FSDP2 (accelerate's own preparation, over gloo on the CPU) train as whole ones do.

accelerate offers FSDP on accelerators alone; here its state is told that the two CPU processes are such, and all that follows
is its own code and torch's.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from accelerate.state import AcceleratorState, DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

import lead_fast as lf
from lead_fast.checkpoint import Checkpoints
from lead_fast.config import TrainConfig
from lead_fast.models import add_lora, build_model, save_model
from lead_fast.offline.pretrain import train_tokenizer
from lead_fast.packing import ChatEncoder, pack
from lead_fast.pool import Pool
from lead_fast.signals import Signals
from lead_fast.trainer import Optimization, TrainingError, TrainingRun, attach, evaluate, make_accelerator
from lead_fast.training_state import TrainingState, frozen_digest

CONFIG = TrainConfig(learning_rate=1e-2)
STEPS = 3


def make_model(tuning):
    tokenizer = train_tokenizer(["some words to learn from, 1 2 3. " * 3], 300)
    chats = [
        [{"role": "user", "content": "q " * n}, {"role": "assistant", "content": "some words " * (1 + n % 3)}]
        for n in range(1, 9)
    ]
    samples = list(ChatEncoder(tokenizer, 128).encode(chats))
    model = build_model("tiny", tokenizer, seed=0, device=torch.device("cpu"))
    return (add_lora(model, rank=8, alpha=16.0, seed=0) if tuning == "lora" else model), tokenizer, samples


def train(optimization, samples, steps):
    """Losses of the steps, and every sample's statistics as this process saw them."""
    batches, losses, seen = [pack(samples[:3], [0, 1, 2]), pack(samples[3:], [3, 4, 5, 6, 7])], [], {}
    for _ in range(steps):
        result = optimization.step(
            batches, 1e-2, lambda rows, s: seen.update(zip(rows.tolist(), s.grad_norm_sq.tolist(), strict=True))
        )
        losses.append(float(result.loss))
    return losses, seen


def rank_main(rank, world, port, folder, tuning):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(world), RANK=str(rank),
                      LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))  # fmt: skip
    make_accelerator(CONFIG)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False, reshard_after_forward=True,
    )  # fmt: skip
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    accelerator = make_accelerator(CONFIG)
    model, tokenizer, samples = make_model(tuning)
    optimization = Optimization(model, accelerator, CONFIG)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    before = evaluate(
        optimization.packed, samples, pack_tokens=64, device=accelerator.device, desc="", ranks=optimization.ranks
    )
    losses, seen = train(optimization, samples, STEPS)
    after = evaluate(optimization.packed, samples, pack_tokens=64, device=accelerator.device, desc="", ranks=optimization.ranks)
    save_model(model, tokenizer, Path(folder) / "model" if rank == 0 else None)

    # A checkpoint holds whole tensors; what is restored from it trains on as what it was taken from.
    captured = state_of(optimization).capture(TrainingRun(num_steps=STEPS))
    checkpoints = Checkpoints(Path(folder) / "checkpoints")
    if rank == 0:
        checkpoints.write(STEPS, captured)
    optimization.ranks.wait()
    going_on, _ = train(optimization, samples, 1)
    restored = Optimization(make_model(tuning)[0], make_accelerator(CONFIG), CONFIG)
    state = state_of(restored)
    assert state.restore(checkpoints.read(checkpoints.paths()[-1]).state, []).num_steps == STEPS
    assert train(restored, samples, 1)[0] == going_on
    for one, two in zip(model.parameters(), restored.bare.parameters(), strict=True):
        assert torch.equal(one.to_local(), two.to_local())

    # What follows whole weights is refused.
    engine = lf.LeadEngine(state.engine.pool, lf.LeadConfig(estimator="historical"), group=optimization.ranks.group)
    with pytest.raises(TrainingError, match="'historical' follows whole weights, which FSDP shards"):
        attach(engine, optimization)

    torch.save(
        {"losses": losses, "seen": seen, "before": before, "after": after, "frozen": frozen_digest(model)},
        f"{folder}/rank{rank}.pt",
    )
    torch.distributed.destroy_process_group()


def state_of(optimization):
    pool = Pool.from_arrays(arm=np.zeros(8, np.int16), utility=np.ones(8, np.float32))
    engine = lf.LeadEngine(pool, lf.LeadConfig(), group=optimization.ranks.group)
    return TrainingState(engine, optimization, Signals(engine))


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_sharded_weights_train_as_whole_ones(tuning, tmp_path):
    model, tokenizer, samples = make_model(tuning)
    optimization = Optimization(model, make_accelerator(CONFIG), CONFIG)
    cpu = torch.device("cpu")
    before = evaluate(optimization.packed, samples, pack_tokens=64, device=cpu, desc="")
    losses, seen = train(optimization, samples, STEPS)
    after = evaluate(optimization.packed, samples, pack_tokens=64, device=cpu, desc="")
    mp.spawn(rank_main, (2, free_port(), str(tmp_path), tuning), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(2)]
    assert ranks[0]["seen"].keys() | ranks[1]["seen"].keys() == seen.keys()
    for got in ranks:
        torch.testing.assert_close(got["losses"], losses, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got["before"], before)
        torch.testing.assert_close(got["after"], after, rtol=1e-3, atol=1e-4)
        for row, value in got["seen"].items():
            assert value == pytest.approx(seen[row], rel=2e-3)
        assert got["frozen"] == frozen_digest(model)
    # The files are those of whole weights; the checkpoint's are, too.
    one, two = tmp_path / "one", tmp_path / "model"
    save_model(model, tokenizer, one)
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    expected = load_file(next(one.glob("*.safetensors")))
    saved = load_file(next(two.glob("*.safetensors")))
    assert saved.keys() == expected.keys()
    for name, value in saved.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)
    weights = Checkpoints(tmp_path / "checkpoints").load().state["weights"]
    assert {name: value.shape for name, value in weights.items()} == {
        name: p.shape for name, p in model.named_parameters() if p.requires_grad
    }
