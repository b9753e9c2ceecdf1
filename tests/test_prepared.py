"""Prepared pools: what they settle, where they may go, what interrupts or breaks a preparation."""

import json
import os
import re
import shutil
import signal

import pytest
import torch
import transformers
import yaml
from same_run import finished

from lead_fast.cli import main
from lead_fast.compare import METHODS, pool_for
from lead_fast.config import LeadConfig, TrainConfig
from lead_fast.demo_pool import demo_rows
from lead_fast.engine import LeadEngine
from lead_fast.files import read_jsonl, write_jsonl
from lead_fast.loading import embedded_tokens, load_tokenizer
from lead_fast.offline.prepare import Prepared, load_prepared
from lead_fast.run import open_inputs

PREPARE = ["--model-config", "tiny", "--pretrain-epochs", "1", "--max-length", "96", "--num-arms", "3", "--tasks-per-arm", "2",
           "--lora-rank", "8", "--warmup-share", "0.1"]  # fmt: skip
TRAIN = ["--budget", "12", "--min-rounds", "4", "--step-tokens", "512"]


pytestmark = pytest.mark.usefixtures("module_cache")


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    path = tmp_path_factory.mktemp("pool") / "pool.jsonl"
    write_jsonl(path, demo_rows(200, seed=1))
    return path


@pytest.fixture(scope="module")
def prepared(pool, tmp_path_factory):
    """Prepared, and moved to another folder since."""
    there = tmp_path_factory.mktemp("prepared")
    assert main(["prepare", "--pool", str(pool), "--out", str(there / "first"), *PREPARE]) == 0
    return (there / "first").rename(there / "moved")


def config_of(run):
    return yaml.safe_load((run / "config.yaml").read_text())


def test_a_run_has_the_options_of_its_pool_and_goes_on_when_both_have_moved(prepared, tmp_path, capfd):
    out = tmp_path / "run"
    command = ["train", "--pool", str(prepared), "--out", str(out), *TRAIN, "--checkpoint-rounds", "2"]
    assert main(command) == 0
    began = config_of(out)
    assert {name: began[name] for name in ("max_length", "num_arms", "lora_rank", "hard_rows")} == {
        "max_length": 96, "num_arms": 3, "lora_rank": 8, "hard_rows": "aside",
    }  # fmt: skip
    assert "resume" not in began  # used as --config, it would write into any folder
    adapter = json.loads((out / "model" / "adapter_config.json").read_text())
    assert adapter["r"] == 8 and adapter["base_model_name_or_path"] == str(prepared / "model")
    selected = (out / "selected.jsonl").read_bytes()

    for name in ("summary.json", "selected.jsonl"):
        (out / name).unlink()
    elsewhere = tmp_path / "elsewhere"
    prepared.rename(elsewhere)
    moved = out.rename(tmp_path / "moved run")
    try:
        assert main(["train", "--resume", "--out", str(moved)]) == 1
        assert f"pool: {prepared} does not exist" in capfd.readouterr().err
        assert main(["train", "--resume", "--out", str(moved), "--pool", str(elsewhere)]) == 0
    finally:
        elsewhere.rename(prepared)
    assert (moved / "selected.jsonl").read_bytes() == selected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lora-rank", "2"], "lora_rank: .* was prepared with 8, got 2; leave --lora-rank out"),
        (["--max-length", "1024"], "max_length: .* was prepared with 96, got 1024"),
        (["--num-arms", "5"], "num_arms: .* was prepared with 3, got 5"),
        (["--hard-rows", "zero"], "hard_rows: .* was prepared with 'aside', got 'zero'"),
        (["--tuning", "full"], "tuning: .* was prepared with 'lora', got 'full'"),
        (["--model-config", "small"], "leave --model and --model-config out"),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_what_a_prepared_pool_has_settled_is_not_changed(options, message, prepared, tmp_path, capfd):
    out = tmp_path / "run"
    assert main(["train", "--pool", str(prepared), "--out", str(out), *TRAIN, *options]) == 1
    assert re.search(message, capfd.readouterr().err)
    assert not out.exists()


def test_callers_of_the_functions_are_told_the_same(prepared, tmp_path):
    with pytest.raises(ValueError, match=r"lora_rank: .* was prepared with 8, got 64"):
        open_inputs(TrainConfig(pool=str(prepared), out=str(tmp_path / "run"), max_length=96))
    settled = TrainConfig(pool=str(prepared), out=str(tmp_path / "run"), max_length=96, lora_rank=8)
    assert isinstance(open_inputs(settled), Prepared)


def test_the_file_that_prepared_a_pool_trains_on_it(prepared, tmp_path):
    """YAML has types of its own: 16 for 16.0, text for 1e-3."""
    file = tmp_path / "both.yaml"
    made_by = "lora_alpha: 16\nlora_rank: 8\nmax_length: 96\nnum_arms: 3\ntasks_per_arm: 2\npretrain_epochs: 1\n"
    made_by += "pretrain_learning_rate: 2e-3\nwarmup_share: 0.1\nlora_targets: null\n"
    file.write_text(made_by + "budget: 8\nmin_rounds: 2\n")
    assert main(["train", "--config", str(file), "--pool", str(prepared), "--out", str(tmp_path / "run")]) == 0


def test_controls_of_a_comparison_see_all_rows(prepared):
    pool = load_prepared(prepared).pool
    assert pool.aside.any()
    for name in ("random", "source_balanced"):
        engine = LeadEngine(pool_for(METHODS[name], pool), LeadConfig(**METHODS[name].options))
        assert engine.groups.num_choosable == len(pool)


def test_the_other_preset_is_said(prepared, tmp_path, caplog):
    assert main(["train", "--pool", str(prepared), "--out", str(tmp_path / "run"), *TRAIN, "--preset", "paper"]) == 0
    assert "prepared with hard_rows 'aside', and preset paper has 'zero'" in caplog.text
    assert config_of(tmp_path / "run")["hard_rows"] == "aside"


def test_a_budget_of_one_row_is_not_one_of_all(prepared, tmp_path, capfd):
    out = tmp_path / "run"
    command = ["train", "--pool", str(prepared), "--out", str(out), "--budget", "1.0", "--train-tokens", "600",
               "--checkpoint-rounds", "1"]  # fmt: skip
    assert main(command) == 0
    (out / "summary.json").unlink()
    assert main(["train", "--resume", "--out", str(out), "--budget", "1"]) == 1
    assert "budget (began with 1.0, got 1)" in capfd.readouterr().err


def test_a_preparation_that_was_killed_goes_on_with_its_options(pool, runs, tmp_path):
    out = tmp_path / "run"
    options = [*PREPARE, *TRAIN, "--seed", "5000000000"]  # beyond 32 bits
    run = runs.start(["train", "--out", str(out), "--pool", str(pool), *options], hold=["replace", "scores", 1])
    assert run.wait_until_held() and run.kill() == -signal.SIGKILL
    assert config_of(out)["seed"] == 5_000_000_000 and not (out / "prepared" / "prepare.json").exists()
    finished(runs.start(["train", "--out", str(out), "--resume"]))
    assert config_of(out)["seed"] == 5_000_000_000 and len(read_jsonl(out / "selected.jsonl")) == 12


def test_a_run_that_never_began_leaves_its_folder_free(pool, tmp_path, capfd):
    out = tmp_path / "run"
    assert main(["train", "--pool", str(pool), "--model", str(tmp_path), "--out", str(out), *TRAIN]) == 1
    assert not out.exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    rejects = tmp_path / "full.rejects.jsonl"
    rejects.write_text("{}\n")
    command = ["train", "--pool", str(pool), "--out", str(tmp_path / "full"), "--on-bad-row", "skip", *PREPARE, *TRAIN]
    assert main(command) == 1
    assert "is not empty" in capfd.readouterr().err and rejects.read_text() == "{}\n"


@pytest.fixture(scope="module")
def partly_nan(prepared, tmp_path_factory):
    """A model of which one token has no embedding, and rows of which few have that token."""
    folder = tmp_path_factory.mktemp("nan")
    tokenizer = load_tokenizer(prepared / "model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    model = transformers.LlamaForCausalLM(config)
    token = tokenizer("☃", add_special_tokens=False)["input_ids"][-1]
    model.model.embed_tokens.weight.data[token] = torch.nan
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = demo_rows(60, seed=3)
    for row in rows[::20]:
        row["messages"][0]["content"] += " ☃"
    write_jsonl(folder / "rows.jsonl", rows)
    return folder


def test_rows_without_a_finite_loss_end_no_stage(partly_nan, tmp_path, caplog):
    out, rows = tmp_path / "run", str(partly_nan / "rows.jsonl")
    command = ["train", "--model", str(partly_nan / "model"), "--pool", rows, "--heldout", rows, "--out", str(out), *TRAIN,
               "--max-length", "96", "--warmup-share", "0.5", "--num-arms", "2"]  # fmt: skip
    assert main(command) == 0
    assert "warm-up: the loss of" in caplog.text and "of 60 held-out rows have no finite loss" in caplog.text
    summary = json.loads((out / "summary.json").read_text())
    assert summary["preparation"]["warmup"]["loss"] > 0 and summary["preparation"]["rows_aside"] >= 3
    assert all(entry["heldout_loss"] > 0 for entry in summary["evaluations"])
    chosen = {int(entry["row"]) for entry in read_jsonl(out / "selected.jsonl")}
    assert not chosen.intersection(range(0, 60, 20))


def test_a_model_that_is_all_nan_is_not_called_unpackable(partly_nan, tmp_path, capfd):
    model = transformers.LlamaForCausalLM.from_pretrained(partly_nan / "model")
    model.model.norm.weight.data.fill_(torch.nan)
    model.save_pretrained(tmp_path / "model")
    load_tokenizer(partly_nan / "model").save_pretrained(tmp_path / "model")
    rows = str(partly_nan / "rows.jsonl")
    assert main(["train", "--model", str(tmp_path / "model"), "--pool", rows, "--out", str(tmp_path / "run"), *TRAIN]) == 1
    assert "what LlamaForCausalLM computes must be finite, got NaN or inf" in capfd.readouterr().err


def test_models_that_are_no_decoders_are_named(tmp_path):
    transformers.T5Config().save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match=r"model: expected a decoder with an LM head, got a T5Config"):
        embedded_tokens(str(tmp_path / "t5"))


def test_a_token_that_the_model_does_not_embed_is_named(partly_nan, tmp_path, capfd):
    """Of a tokenizer that has more than the model embeds only what occurs matters: a padding token does not."""
    tokenizer = load_tokenizer(partly_nan / "model")
    size, rows = len(tokenizer), str(partly_nan / "rows.jsonl")
    tokenizer.add_tokens(["<pad and no more>", "☃"])
    model = tmp_path / "model"
    transformers.LlamaForCausalLM.from_pretrained(partly_nan / "model").save_pretrained(model)
    tokenizer.save_pretrained(model)
    command = ["train", "--model", str(model), "--pool", rows, "--out", str(tmp_path / "run"), *TRAIN]
    assert main(command) == 1
    assert f"embeds {size} tokens, and the rows have token {size + 1}" in capfd.readouterr().err
    assert not (tmp_path / "run" / "prepared" / "scores").exists()


def test_yaml(prepared, tmp_path, capfd, monkeypatch):
    file = tmp_path / "c.yaml"
    file.write_text("pool: p\n\tout: x\n")
    assert main(["train", "--config", str(file)]) == 1
    assert f"{file}: expected YAML, a line `option: value` each, got while scanning" in capfd.readouterr().err
    monkeypatch.setenv("HOME", str(prepared.parent))
    file.write_text(f"pool: ~/{prepared.name}\nshow_batch: true\nout: ~/new\n")
    assert main(["train", "--config", str(file)]) == 0
    assert "first batch of round 1" in capfd.readouterr().out and not os.path.exists("~")


def test_a_preparation_that_was_killed_leaves_nothing_half_made(prepared, pool, tmp_path):
    """Its folder is known by the options that it begins with."""
    there = tmp_path / "there"
    shutil.copytree(prepared, there)
    shutil.rmtree(there / "pool")
    (there / ".scores.0123abcd.tmp").mkdir()
    (there / "prepare.json").unlink()
    assert main(["prepare", "--pool", str(pool), "--out", str(there), *PREPARE, "--resume"]) == 0
    assert not list(there.glob(".*.tmp")) and (there / "prepare.json").exists()
    (there / "config.yaml").unlink()
    assert main(["prepare", "--pool", str(pool), "--out", str(there), *PREPARE, "--resume"]) == 1
