"""The examples run as their users run them: by file, in a process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from host_runs import words_tokenizer

from lead_fast.loading import build_model, save_model

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tiny model's folder, and a pool in the official format, which every example reads."""
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = words_tokenizer()
    save_model(build_model("tiny", tokenizer, seed=0, device=torch.device("cpu")), tokenizer, folder / "model")
    with (folder / "pool.jsonl").open("w") as file:
        for i in range(100):
            turns = [
                {"role": "user", "content": "q " * (1 + i % 7)},
                {"role": "assistant", "content": "some words " * (1 + i % 4)},
            ]
            row = {"messages": turns, "dataset": "x", "dataset_id": 500 + i, "idf": 0.5, "cross_entropy": 5.0 + 0.001 * i,
                   "idf_cluster": i % 3, "task": i % 2, "query_token": 3}  # fmt: skip
            file.write(json.dumps(row) + "\n")
    return folder


def run(name, *arguments, cache):
    environment = os.environ | {"LEAD_FAST_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cache, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_examples_are_short():
    files = sorted(EXAMPLES.glob("*.py"))
    assert [file.name for file in files] == ["official_loop.py", "plain_loop.py", "transformers_trainer.py", "trl_sft.py"]
    assert all(len(file.read_text().splitlines()) <= 40 for file in files)


def test_plain_loop(tmp_path):
    out = run("plain_loop.py", cache=tmp_path).splitlines()
    assert out[-1].startswith("120 of 200 samples in ")
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in out[:-1]]
    assert len(losses) >= 15 and losses[-1] < 0.8 * losses[0]


def test_transformers_trainer(inputs, tmp_path):
    run("transformers_trainer.py", inputs / "model", inputs / "pool.jsonl", tmp_path / "out", cache=tmp_path)
    assert len(rows(tmp_path / "out" / "selected.jsonl")) == 25
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()
    (last, *_) = sorted(tmp_path.glob("out/checkpoint-*"), key=lambda path: -int(path.name.split("-")[1]))
    assert (last / "lead_state.safetensors").exists()


def test_trl_sft(inputs, tmp_path):
    run("trl_sft.py", inputs / "model", inputs / "pool.jsonl", tmp_path / "out", cache=tmp_path)
    assert len(rows(tmp_path / "out" / "selected.jsonl")) == 25
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()


def test_official_loop(inputs, tmp_path):
    out = run("official_loop.py", inputs / "model", inputs / "pool.jsonl", tmp_path / "chosen.jsonl", cache=tmp_path)
    chosen = rows(tmp_path / "chosen.jsonl")
    assert len(chosen) == 40 and all(500 <= row["dataset_id"] < 600 for row in chosen)
    assert all(line.startswith("arm ") for line in out.splitlines())
