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
from safetensors.numpy import load_file as load_scores
from safetensors.torch import load_file
from sharding import free_port, launch, tell_fsdp2, tell_zero
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import lead_fast as lf
from lead_fast.checkpoint import FOREIGN, Checkpoints
from lead_fast.cli import main
from lead_fast.config import TrainConfig
from lead_fast.demo_pool import demo_rows
from lead_fast.files import read_jsonl, write_jsonl
from lead_fast.interrupts import StopSignals
from lead_fast.loading import build_model, save_model
from lead_fast.lora import add_lora
from lead_fast.models import PackedModel, trained_parameters
from lead_fast.offline.pretrain import train_tokenizer
from lead_fast.optimization import Optimization, TrainingError, evaluate, make_accelerator
from lead_fast.packing import ChatEncoder, pack
from lead_fast.pool import Pool
from lead_fast.resume import Checkpointer, RoundLog
from lead_fast.shards import own_part, whole_shape
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
        stage = int(kind[-1])
        checkpoint.state["optimizer"]["stage"] = 1 + stage % 3
        with pytest.raises(ValueError, match=rf"that of ZeRO's stage {1 + stage % 3}, got stage {stage}"):
            state.restore(checkpoint.state, [])
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


def half_steps(folder, rank):
    """Steps in bf16, whose statistics are not."""
    config = TrainConfig(learning_rate=1e-2, precision="bf16")
    accelerator = make_accelerator(config)
    tell_fsdp2(precision="bf16")
    model, _, samples = make_model("full")
    losses, seen = train(Optimization(model, accelerator, config), samples, STEPS)
    torch.save({"losses": losses, "seen": seen}, f"{folder}/half{rank}.pt")
    AcceleratorState._reset_state()


def check_half_steps(folder):
    model, _, samples = make_model("full")
    losses, seen = train(Optimization(model, make_accelerator(CONFIG), CONFIG), samples, STEPS)
    for rank in range(2):
        got = torch.load(folder / f"half{rank}.pt", weights_only=True)
        torch.testing.assert_close(got["losses"], losses, rtol=2e-2, atol=0)
        values = torch.tensor([*got["losses"], *got["seen"].values()])
        assert (values != values.bfloat16()).float().mean() > 0.8
        for row, value in got["seen"].items():
            assert value == pytest.approx(seen[row], rel=0.2)


def run_main(rank, world, port, folder, tuning, kind):
    """`lead-fast train` from a raw pool, in one of several processes that shard."""
    launch(rank, world, port)
    if kind == "zero3":
        sharding_accelerator(kind, rank, world)
    else:
        half_steps(folder, rank)
        make_accelerator(CONFIG)
        tell_fsdp2(wrap=None)
    if kind == "fsdp2" and rank:  # nothing is read where the first process's weights are taken

        def refuse(*_, **__):
            raise AssertionError("this process must not load the model")

        AutoModelForCausalLM.from_pretrained = refuse
    held = []
    check = PackedModel.check

    def watch(self):
        """Once sharded, the layers are units of their own, and each process holds its half."""
        parameters = list(self.model.parameters())
        layers = [m for m in self.model.modules() if type(m).__name__ == "FSDPLlamaDecoderLayer"]
        whole = sum(whole_shape(p).numel() for p in parameters)
        held.append((len(layers), sum(own_part(p).numel() for p in parameters) / whole))
        check(self)

    PackedModel.check = watch
    options = ["--tuning", tuning, "--accumulation", "1", *RUN]
    paths = ["--pool", f"{folder}/pool.jsonl", "--model", f"{folder}/base", "--out", f"{folder}/sharded"]
    assert main(["train", *paths, *options]) == 0
    assert [layers for layers, _ in held] == [0 if kind == "zero3" else 4] * 3
    assert [share for _, share in held] == [pytest.approx(0.5, abs=0.1)] * 3


RUN = [
    "--max-length", "128", "--step-tokens", "128", "--pack-tokens", "256", "--budget", "8", "--min-rounds", "2",
    "--num-arms", "2", "--tasks-per-arm", "2", "--warmup-share", "0.1", "--preset", "paper", "--learning-rate", "1e-3",
    "--checkpoint-rounds", "2",
]  # fmt: skip


@pytest.mark.parametrize(("kind", "tuning"), [("fsdp2", "lora"), ("zero3", "lora"), ("zero3", "full")])
def test_a_run_that_shards_is_a_run_of_one_process(kind, tuning, tmp_path, monkeypatch):
    """Warm-up, scoring and training, of a model that no process but the first, on its host, ever has whole."""
    if kind == "zero3":
        pytest.importorskip("deepspeed", reason="deepspeed is not installed: no ZeRO")
    monkeypatch.setenv("LEAD_FAST_CACHE", str(tmp_path / "cache"))
    tokenizer = train_tokenizer([m["content"] for row in demo_rows(31, seed=1) for m in row["messages"]], 400)
    save_model(build_model("tiny", tokenizer, seed=0, device=torch.device("cpu")), tokenizer, tmp_path / "base")
    write_jsonl(tmp_path / "pool.jsonl", demo_rows(31, seed=1))
    torch.set_num_threads(1)
    one = ["train", "--pool", str(tmp_path / "pool.jsonl"), "--model", str(tmp_path / "base"), "--out", str(tmp_path / "one")]
    assert main([*one, "--tuning", tuning, "--accumulation", "2", *RUN]) == 0
    mp.spawn(run_main, (2, free_port(), str(tmp_path), tuning, kind), nprocs=2)
    if kind == "fsdp2":
        check_half_steps(tmp_path)
    scores = [load_scores(tmp_path / name / "prepared" / "scores" / "scores.safetensors") for name in ("one", "sharded")]
    for name, expected in scores[0].items():
        np.testing.assert_allclose(scores[1][name], expected, rtol=2e-3, atol=2e-3, err_msg=name)
    expected, got = (read_jsonl(tmp_path / name / "selected.jsonl") for name in ("one", "sharded"))
    assert [line["row"] for line in got] == [line["row"] for line in expected]
    weights = [load_file(next((tmp_path / name / "model").glob("*.safetensors"))) for name in ("one", "sharded")]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-4)
