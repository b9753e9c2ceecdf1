"""LeadTrainer on weights that FSDP2 or DeepSpeed's ZeRO shards trains as one process on whole ones, also when resumed."""

from __future__ import annotations

from pathlib import Path

import accelerate
import pytest
import torch
import torch.multiprocessing as mp
import transformers.trainer
from host_runs import CHOICE, StopAfter, TokenRows, Watcher, arguments, array_pool, lora, tiny
from sharding import free_port, launch, tell_fsdp2, tell_zero
from test_host_processes import trained
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import lead_fast as lf
from lead_fast.integrations.transformers import LeadTrainer

WORLD = 2
EVALUATED = [TokenRows(seed=1)[0]] * 4  # rows of one length: the host weighs others differently in several processes


def make(folder, tuning, lead=CHOICE, **options):
    """A trainer of the model in folder/base; the arguments come first, since ZeRO 3 shards while a model is loaded."""
    watcher = Watcher()
    defaults = dict(per_device_train_batch_size=1, per_device_eval_batch_size=1, logging_strategy="steps", logging_steps=1)
    args = arguments(folder, **defaults | options)
    model = AutoModelForCausalLM.from_pretrained(Path(folder) / "base", dtype=torch.float32)
    model = lora(model) if tuning == "lora" else model
    trainer = LeadTrainer(
        model, args, train_dataset=TokenRows(), eval_dataset=EVALUATED, pool=array_pool(), lead=lead, callbacks=[watcher]
    )
    return trainer, watcher


def zero_options(stage):
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    sharding = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": stage == 3}
    return {"deepspeed": dict.fromkeys(names, "auto") | {"zero_optimization": sharding, "zero_allow_untested_optimizer": True}}


def sharded_by(kind, rank):
    """transformers' Trainer makes an accelerator that shards; gives the options that ask for it."""
    options = {}
    if kind != "fsdp2":
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
        options = zero_options(int(kind[-1]))

    def accelerator(**given):
        made = accelerate.Accelerator(**given)
        if kind != "fsdp2":
            tell_zero(rank, WORLD)
            return made
        tell_fsdp2(outputs=torch.bfloat16)  # which would show in losses and gradient norms
        return accelerate.Accelerator(**given)

    transformers.trainer.Accelerator = accelerator
    return options


def whole_weights(trainer, kind):
    if kind == "fsdp2":
        return {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in trainer.model.named_parameters()}
    import deepspeed

    parameters = dict(trainer.model.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        return {name: p.detach().clone() for name, p in parameters.items()}


def rank_main(rank, port, folder, kind, tuning, interrupted):
    launch(rank, WORLD, port)
    options, resume = sharded_by(kind, rank) | {"gradient_accumulation_steps": 1}, {}
    if interrupted:
        first, watcher = make(folder, tuning, **options)
        first.add_callback(StopAfter(interrupted))
        trained(first, watcher)
        resume = {"resume_from_checkpoint": str(Path(folder) / f"checkpoint-{interrupted}")}
    trainer, watcher = make(folder, tuning, **options)
    assert trainer.is_fsdp_enabled == (kind == "fsdp2") and trainer.is_deepspeed_enabled == (kind != "fsdp2")
    loaded_in_shards = any(hasattr(p, "ds_id") for p in trainer.model.parameters())
    assert loaded_in_shards == (kind == "zero3") and trainer._packed.checked == (kind != "zero3")
    got = trained(trainer, watcher, **resume)
    assert trainer._packed.checked
    got |= {"weights": whole_weights(trainer, kind), "eval": trainer.evaluate()["eval_loss"]}
    if kind != "zero2":
        follower, _ = make(folder, tuning, lead=lf.LeadConfig(budget=30, estimator="historical"), **options)
        with pytest.raises(ValueError, match="`estimator` historical follows whole weights, which are sharded here"):
            follower.train()
    torch.save(got, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("kind", "tuning", "interrupted"),
    [("fsdp2", "full", 3), ("fsdp2", "lora", 0), ("zero2", "full", 0), ("zero3", "full", 3), ("zero3", "lora", 0)],
)
def test_shards_train_as_the_whole(kind, tuning, interrupted, tmp_path):
    if kind != "fsdp2":
        pytest.importorskip("deepspeed", reason="deepspeed is not installed: no ZeRO")
    tiny().save_pretrained(tmp_path / "base")
    trainer, watcher = make(tmp_path, tuning, gradient_accumulation_steps=WORLD)
    expected = trained(trainer, watcher) | {"eval": trainer.evaluate()["eval_loss"]}
    mp.spawn(rank_main, (free_port(), str(tmp_path), kind, tuning, interrupted), nprocs=WORLD)
    for rank in range(WORLD):
        got = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert [(r["row"], r["rounds"]) for r in got["rows"]] == [(r["row"], r["rounds"]) for r in expected["rows"]]
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(got["weights"][name], weight, rtol=1e-4, atol=2e-5)
        assert got["eval"] == pytest.approx(expected["eval"], rel=1e-4)
        if rank == 0:
            assert got["loss"] == pytest.approx(expected["loss"][-len(got["loss"]) :], rel=1e-4)
            assert len(got["loss"]) == len(expected["loss"]) - interrupted
