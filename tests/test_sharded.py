"""Weights sharded over two processes by FSDP2, or gradients and optimizer by DeepSpeed's ZeRO, train as whole ones do.

What stands in for the accelerators is in sharding.py.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from accelerate import Accelerator
from accelerate.state import AcceleratorState, DistributedType
from accelerate.utils import FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from sharding import free_port, launch, tell_fsdp2, tell_zero
from torch.distributed.tensor import DTensor

import lead_fast as lf
from lead_fast.checkpoint import FOREIGN, Checkpoints
from lead_fast.config import TrainConfig
from lead_fast.interrupts import StopSignals
from lead_fast.loading import build_model, save_model
from lead_fast.lora import add_lora
from lead_fast.models import trained_parameters
from lead_fast.offline.pretrain import train_tokenizer
from lead_fast.optimization import Optimization, TrainingError, evaluate, make_accelerator
from lead_fast.packing import ChatEncoder, pack
from lead_fast.pool import Pool
from lead_fast.resume import Checkpointer, RoundLog
from lead_fast.shards import own_part
from lead_fast.signals import Signals
from lead_fast.trainer import TrainingRun, attach
from lead_fast.training_state import TrainingState, frozen_digest

CONFIG = TrainConfig(learning_rate=1e-2)
SHARDINGS = [("fsdp2", "lora"), ("fsdp2", "full"), ("zero1", "full"), ("zero2", "lora"), ("zero3", "lora"), ("zero3", "full")]
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
    batches = [pack(samples[:3], [0, 1, 2]), pack(samples[3:5], [3, 4]), pack(samples[5:], [5, 6, 7])]
    losses, seen = [], {}
    for _ in range(steps):
        result = optimization.step(
            batches, 1e-2, lambda rows, s: seen.update(zip(rows.tolist(), s.grad_norm_sq.tolist(), strict=True))
        )
        losses.append(float(result.loss))
    return losses, seen


def sharding_accelerator(kind, rank, world, efficient=True):
    """accelerate's own, told to shard: "fsdp2", "zero1", "zero2" or "zero3"."""
    if kind == "fsdp2":
        make_accelerator(CONFIG)
        tell_fsdp2(efficient)
    else:
        os.environ.update(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE=kind[-1])
        Accelerator()
        tell_zero(rank, world)
    return make_accelerator(CONFIG)


def rank_main(rank, world, port, folder, kind, tuning):
    launch(rank, world, port)
    accelerator = sharding_accelerator(kind, rank, world)
    model, tokenizer, samples = make_model(tuning)
    optimization = Optimization(model, accelerator, CONFIG)
    assert optimization.is_zero == (kind != "fsdp2") and optimization.ranks.world == world
    assert all(isinstance(p, DTensor) for p in model.parameters()) == (kind == "fsdp2")
    assert optimization.is_sharded == (kind in ("fsdp2", "zero3"))
    before = evaluate(
        optimization.packed, samples, pack_tokens=64, device=accelerator.device, desc="", ranks=optimization.ranks
    )
    losses, seen = train(optimization, samples, STEPS)
    after = evaluate(optimization.packed, samples, pack_tokens=64, device=accelerator.device, desc="", ranks=optimization.ranks)
    save_model(model, tokenizer, Path(folder) / "model" if rank == 0 else None)

    # A checkpoint holds whole weights; what is restored from it trains on as what it was taken from.
    checkpoints, run = Checkpoints(Path(folder) / "checkpoints"), TrainingRun()
    state = state_of(optimization)
    captured = state.capture(TrainingRun())
    if kind == "fsdp2" and rank:  # the whole is on the first process alone
        assert all(t.untyped_storage().nbytes() == 0 for t in captured["weights"].values())
    checkpointer = Checkpointer(checkpoints, state, CONFIG, RoundLog(None), StopSignals(), run, time.monotonic())
    run.num_steps = STEPS
    checkpointer.write(run)
    optimization.ranks.wait()
    going_on, _ = train(optimization, samples, 1)
    accelerator = sharding_accelerator(kind, rank, world, efficient=False)
    restored = Optimization(make_model(tuning)[0], accelerator, CONFIG)
    state = state_of(restored)
    checkpoint = checkpoints.read(checkpoints.paths()[-1])
    assert state.restore(checkpoint.state, []).num_steps == STEPS
    if restored.is_zero:
        state.restore_zero(checkpoint.path / FOREIGN)
    assert train(restored, samples, 1)[0] == going_on
    for one, two in zip(model.parameters(), restored.bare.parameters(), strict=True):
        assert torch.equal(own_part(one), own_part(two))

    if kind == "fsdp2":
        name, weight = list(trained_parameters(model))[-1]
        with torch.no_grad():
            weight.to_local()[-1:].fill_(math.nan if rank else 0.0)
        with pytest.raises(TrainingError, match=f"checkpoint: {name} holds NaN"):  # each names the same
            state_of(optimization).capture(TrainingRun())
    if optimization.is_sharded:  # what follows whole weights is refused
        engine = lf.LeadEngine(state.engine.pool, lf.LeadConfig(estimator="historical"), group=optimization.ranks.group)
        with pytest.raises(TrainingError, match="'historical' follows whole weights, which are sharded"):
            attach(engine, optimization)
    if optimization.is_zero:
        checkpoint.state["optimizer"]["processes"] = 3
        with pytest.raises(ValueError, match="ZeRO's optimizer is that of 3 processes, got 2"):
            state.restore(checkpoint.state, [])

    torch.save(
        {"losses": losses, "seen": seen, "before": before, "after": after, "frozen": frozen_digest(model)},
        f"{folder}/rank{rank}.pt",
    )
    torch.distributed.destroy_process_group()


def state_of(optimization):
    pool = Pool.from_arrays(arm=np.zeros(8, np.int16), utility=np.ones(8, np.float32))
    engine = lf.LeadEngine(pool, lf.LeadConfig(), group=optimization.ranks.group)
    return TrainingState(engine, optimization, Signals(engine))


@pytest.mark.parametrize(("kind", "tuning"), SHARDINGS)
def test_shards_train_as_the_whole(kind, tuning, tmp_path):
    if kind != "fsdp2":
        pytest.importorskip("deepspeed", reason="deepspeed is not installed: no ZeRO")
    model, tokenizer, samples = make_model(tuning)
    optimization = Optimization(model, make_accelerator(CONFIG), CONFIG)
    cpu = torch.device("cpu")
    before = evaluate(optimization.packed, samples, pack_tokens=64, device=cpu, desc="")
    losses, seen = train(optimization, samples, STEPS)
    after = evaluate(optimization.packed, samples, pack_tokens=64, device=cpu, desc="")
    mp.spawn(rank_main, (2, free_port(), str(tmp_path), kind, tuning), nprocs=2)
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


def test_the_first_version_of_fsdp_is_refused():
    accelerator = make_accelerator(CONFIG)
    kept = dict(AcceleratorState._shared_state)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=1)
    try:
        AcceleratorState._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
        with pytest.raises(TrainingError, match="FSDP version must be 2"):
            Optimization(make_model("lora")[0], accelerator, CONFIG)
    finally:
        AcceleratorState._shared_state.clear()
        AcceleratorState._shared_state.update(kept)
