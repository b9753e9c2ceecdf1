"""LeadTrainer and LeadSFTTrainer in two processes are the one that accumulates over twice the micro-batches."""

import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from host_runs import CHOICE, StopAfter, Watcher, lead_trainer, lora, tiny, words_tokenizer
from sharding import free_port, launch

import lead_fast as lf

OPTIONS = dict(gradient_accumulation_steps=1, logging_strategy="steps", logging_steps=1)


def trained(trainer, watcher, **options):
    trainer.train(**options)
    loss = [line["loss"] for line in watcher.logs if "loss" in line]
    rounds = [{k: v for k, v in line.items() if k.startswith("lead/")} for line in watcher.logs if "lead/round" in line]
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    tokens = [line["num_tokens"] for line in watcher.logs if "num_tokens" in line]
    return {"rows": trainer.engine.selected(), "rounds": rounds, "loss": loss, "weights": weights, "tokens": tokens}


def make(kind, folder, **options):
    watcher = Watcher()
    if kind == "sft":
        return sft_trainer(folder, watcher, **options), watcher
    model = lora(tiny(), dropout=0.0) if kind == "lora" else tiny()
    if kind == "full":  # several steps a round
        options |= {"per_device_train_batch_size": 1}
    return lead_trainer(folder, model, callbacks=[watcher], **OPTIONS | options), watcher


def sft_trainer(folder, watcher, **options):
    import numpy as np
    from trl import SFTConfig

    from lead_fast.demo_pool import demo_rows
    from lead_fast.integrations.trl import LeadSFTTrainer

    tokenizer = words_tokenizer()
    rows = demo_rows(60, seed=1)
    pool = lf.Pool.from_jsonl(written(folder, rows)).with_arrays(
        arm=np.arange(len(rows)) % 3, utility=np.ones(len(rows), np.float32)
    )
    torch.manual_seed(0)
    config = SFTConfig(
        str(folder), use_cpu=True, per_device_train_batch_size=2, report_to="none", learning_rate=1e-2, save_strategy="no",
        disable_tqdm=True, max_length=256, bf16=False, assistant_only_loss=False, **OPTIONS | options,
    )  # fmt: skip
    return LeadSFTTrainer(
        tiny(vocab=len(tokenizer)), config, processing_class=tokenizer, pool=pool, lead=CHOICE, callbacks=[watcher]
    )


def written(folder, rows):
    from lead_fast.files import write_jsonl

    path = Path(folder) / f"pool-{os.environ.get('RANK', 'one')}.jsonl"
    write_jsonl(path, rows)
    return path


def rank_main(rank, world, port, folder, kind, interrupted):
    launch(rank, world, port)
    options = {}
    if interrupted:
        first, watcher = make(kind, folder)
        first.add_callback(StopAfter(interrupted))
        trained(first, watcher)
        options = {"resume_from_checkpoint": str(Path(folder) / f"checkpoint-{interrupted}")}
    trainer, watcher = make(kind, folder)
    torch.save(trained(trainer, watcher, **options), f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("kind", "interrupted"), [("lora", 0), ("sft", 0), ("full", 1)])
def test_two_processes_are_one_that_accumulates_twice_as_much(kind, interrupted, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trainer, watcher = make(kind, tmp_path, gradient_accumulation_steps=2)
    expected = trained(trainer, watcher)
    torch.set_num_threads(threads)
    mp.spawn(rank_main, (2, free_port(), str(tmp_path), kind, interrupted), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for got in ranks:
        assert got["rows"] == expected["rows"]
        for name, weight in got["weights"].items():
            assert torch.equal(weight, expected["weights"][name]), name
    assert ranks[0]["tokens"] == expected["tokens"] and bool(expected["tokens"]) == (kind == "sft")
    count = len(ranks[0]["rounds"])
    assert ranks[0]["rounds"] == expected["rounds"][-count:] and (interrupted or count == len(expected["rounds"]))
    assert ranks[0]["loss"] == pytest.approx(expected["loss"][-len(ranks[0]["loss"]) :], rel=1e-5)
