"""Whole runs by the command line: what they write, that they repeat, resume, stop and refuse as they should."""

import json
import os
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

from lead_fast.cli import main
from lead_fast.demo_pool import demo_rows
from lead_fast.files import read_jsonl, write_jsonl
from lead_fast.offline.prepare import load_prepared
from lead_fast.report import write_run_report

OPTIONS = [
    "--model-config", "tiny", "--pretrain-epochs", "2", "--max-length", "128", "--step-tokens", "512",
    "--budget", "24", "--min-rounds", "6", "--num-arms", "3", "--tasks-per-arm", "2", "--warmup-share", "0.1",
]  # fmt: skip


pytestmark = pytest.mark.usefixtures("module_cache")


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    path = tmp_path_factory.mktemp("pool") / "pool.jsonl"
    write_jsonl(path, demo_rows(400, seed=1))
    return path


@pytest.fixture(scope="module")
def heldout(tmp_path_factory):
    path = tmp_path_factory.mktemp("heldout") / "heldout.jsonl"
    write_jsonl(path, demo_rows(40, seed=2, noisy=0.0, duplicates=0.0))
    return path


@pytest.fixture(scope="module")
def run(pool, heldout, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "lora"
    arguments = ["train", "--pool", str(pool), "--heldout", str(heldout), "--out", str(out), "--log-utilities"]
    assert main([*arguments, *OPTIONS]) == 0
    return out


def test_the_report_says_what_the_run_was_made_with(run):
    html = (run / "report.html").read_text()
    setup = dict(re.findall(r"<tr><td>([^<]*)</td><td>([^<]*)</td></tr>", html[html.index("<h2>Setup</h2>") :]))
    assert setup["model config"] == "tiny" and setup["budget"] == "24" and setup["processes"] == "1"
    assert setup["precision"] == "fp32" and setup["device"].startswith("cpu")
    assert f"torch {torch.__version__}" in setup["versions"] and "gamma" not in setup  # left at its default


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--bugdet", "3"], "lead-fast train: error: unrecognized argument --bugdet; did you mean --budget?"),
        (["report", "run", "--x=1"], "lead-fast report: error: unrecognized argument --x=1; `lead-fast report --help`"),
    ],
)
def test_an_unknown_option_is_answered_by_its_command(arguments, message, capfd):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and capfd.readouterr().err.startswith(message)


def test_the_run_folder_holds_what_a_run_is(run):
    assert {p.name for p in run.iterdir()} == {
        "config.yaml", "rounds.jsonl", "selected.jsonl", "summary.json", "report.html", "model", "prepared", "utilities",
        "checkpoints",
    }  # fmt: skip
    rounds, selected = read_jsonl(run / "rounds.jsonl"), read_jsonl(run / "selected.jsonl")
    summary = json.loads((run / "summary.json").read_text())
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["budget"] == 24 and config["choose"] == "softmax" and config["model_config"] == "tiny"
    assert [r["round"] for r in rounds] == list(range(1, summary["rounds"] + 1))
    assert len(selected) == summary["rows"] == 24
    assert sum(len(s["rounds"]) for s in selected) == sum(r["samples"] for r in rounds)
    assert summary["heldout_loss_after"] < summary["heldout_loss_before"]
    for r in rounds:
        assert sum(r["probs"]) == pytest.approx(1.0)
        assert {"arm", "log_weights", "uniform", "reward", "tokens", "mean_loss", "calibration", "seconds"} <= r.keys()
    table = pq.read_table(run / "utilities" / "round-00001.parquet").to_pydict()
    chosen = {row for row, c in zip(table["row"], table["chosen"], strict=True) if c}
    assert chosen == set(rounds[0]["rows"])
    html = (run / "report.html").read_text()
    assert html.count("<svg") >= 4 and "<script" not in html
    assert not re.search(r'(src|href)="(?!#)', html)  # nothing is fetched


def test_a_run_that_goes_on_has_a_report_of_its_rounds_so_far(run, tmp_path):
    part = tmp_path / "part"
    part.mkdir()
    with pytest.raises(ValueError, match=r"must be the folder of a run, but it has no rounds\.jsonl"):
        write_run_report(part)
    (part / "rounds.jsonl").write_text("")
    with pytest.raises(ValueError, match="must have a round that has ended, got none yet"):
        write_run_report(part)
    lines = (run / "rounds.jsonl").read_text().splitlines()[:3]
    (part / "rounds.jsonl").write_text("\n".join(lines) + "\n")
    (part / "config.yaml").write_text((run / "config.yaml").read_text())
    (part / "prepared").mkdir()
    (part / "prepared" / "prepare.json").write_text((run / "prepared" / "prepare.json").read_text())
    html, rounds = write_run_report(part).read_text(), [json.loads(line) for line in lines]
    pool, tokens = json.loads((run / "summary.json").read_text())["pool"], sum(r["tokens"] for r in rounds)
    assert f"3 rounds, {rounds[-1]['rows_used']} of {pool} rows, {tokens:,} trained tokens" in html
    assert "Not finished. So far, preset" in html and html.count("<svg") >= 4 and "mean difficulty" in html


def test_the_trained_adapter_loads_with_peft_alone(run):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = json.loads((run / "model" / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    ids = tokenizer("What is 2 + 3?", return_tensors="pt").input_ids
    before = model(ids).logits
    after = PeftModel.from_pretrained(model, run / "model")(ids).logits
    assert not torch.allclose(before, after)


def test_two_runs_with_one_seed_are_the_same(run, pool, heldout, tmp_path):
    out = tmp_path / "again"
    assert main(["train", "--pool", str(pool), "--heldout", str(heldout), "--out", str(out), *OPTIONS]) == 0
    assert (out / "selected.jsonl").read_bytes() == (run / "selected.jsonl").read_bytes()
    one, two = (load_file(folder / "model" / "adapter_model.safetensors") for folder in (run, out))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_prepare_alone_gives_train_the_same_pool(run, pool, heldout, tmp_path, capfd):
    prepared, out = tmp_path / "prepared", tmp_path / "out"
    assert main(["prepare", "--pool", str(pool), "--out", str(prepared), *OPTIONS]) == 0
    options = ["--max-length", "128", "--step-tokens", "512", "--budget", "24", "--min-rounds", "6"]
    for wrong, message in ((["--tuning", "full"], "prepared with 'lora'"), (["--model", "x"], "leave --model")):
        assert main(["train", "--pool", str(prepared), "--out", str(out), *options, *wrong]) == 1
        assert message in capfd.readouterr().err and not out.exists()
    same = ["--model", load_prepared(prepared).base]  # says again what is known
    assert main(["train", "--pool", str(prepared), "--heldout", str(heldout), "--out", str(out), *options, *same]) == 0
    assert (out / "selected.jsonl").read_bytes() == (run / "selected.jsonl").read_bytes()


def test_resume_runs_only_the_stages_that_are_missing(run, pool, tmp_path, capfd):
    out = tmp_path / "resumed"
    arguments = ["train", "--pool", str(pool), "--out", str(out), *OPTIONS]
    assert main(arguments) == 0
    stage = {p.name: (out / "prepared" / p.name / "stage.json").stat().st_mtime_ns for p in (out / "prepared").iterdir()
             if (p / "stage.json").exists()}  # fmt: skip
    assert set(stage) == {"model", "start", "scores"}
    assert main(arguments) == 1
    assert "not empty" in capfd.readouterr().err
    (out / "summary.json").unlink()
    assert main([*arguments, "--resume"]) == 0
    for name, time_ns in stage.items():
        assert (out / "prepared" / name / "stage.json").stat().st_mtime_ns == time_ns, name
    assert (out / "selected.jsonl").read_bytes() == (run / "selected.jsonl").read_bytes()


@pytest.mark.parametrize(
    "options", [["--preset", "paper", "--tuning", "full"], ["--estimator", "historical", "--accumulation", "2"]]
)
def test_other_settings_run_to_the_end(options, pool, tmp_path, capfd):
    out = tmp_path / "out"
    assert main(["train", "--pool", str(pool), "--out", str(out), *OPTIONS, *options]) == 0
    summary = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert summary["rows"] == 24 and (out / "model").is_dir()


def test_an_adapter_is_no_base_model(run, pool, tmp_path, capfd):
    """peft would put new adapters beside it and lose what it has learned."""
    assert main(["train", "--model", str(run / "model"), "--pool", str(pool), "--out", str(tmp_path / "out")]) == 1
    assert "model: expected a base model, got the adapter in" in capfd.readouterr().err


def test_yaml_and_command_line_agree(pool, tmp_path, capfd):
    (tmp_path / "c.yaml").write_text(f"pool: {pool}\nmodel_config: tiny\nnum-arms: 3\nbudget: 0.02\nnonsense: 1\n")
    assert main(["train", "--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "out")]) == 1
    assert "unknown option nonsense" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "0"], "`budget` must be at least 1 row"),
        (["--budget", "1.5"], "`budget` must be a share in (0, 1]"),
        (["--gamma", "0"], "`gamma` must be in (0, 1]"),
        (["--estimator", "magic"], "`estimator` must be one of none"),
        (["--model", "x"], "exactly one of --model and --model-config"),
        (["--heldout", "absent.jsonl"], "absent.jsonl"),
    ],
)
def test_wrong_options_are_named_and_leave_nothing_behind(options, message, pool, tmp_path, capfd):
    out = tmp_path / "out"
    assert main(["train", "--pool", str(pool), "--out", str(out), *OPTIONS, *options]) == 1
    assert message in capfd.readouterr().err
    assert not out.exists()


def test_yaml_numbers_without_a_point_are_numbers():
    from lead_fast.cli import make_configs
    from lead_fast.config import LeadConfig, TrainConfig, read_yaml

    path = Path(os.environ["LEAD_FAST_CACHE"]) / "numbers.yaml"
    path.write_text("learning-rate: 1e-3\nbudget: 5e-1\nthreads: 2\nmodel: 1e-3\n")
    train, lead = make_configs(read_yaml(path), TrainConfig, LeadConfig)
    assert (train.learning_rate, lead.budget, train.threads, train.model) == (1e-3, 0.5, 2, "1e-3")


def test_yaml_lists_and_other_types_are_read_or_named():
    from lead_fast.cli import make_configs
    from lead_fast.config import LeadConfig, TrainConfig, read_yaml

    path = Path(os.environ["LEAD_FAST_CACHE"]) / "types.yaml"
    path.write_text(
        "lora_targets: [q_proj, v_proj]\nreport_to: [tensorboard, wandb]\nstep_tokens: 2e3\nmax_length: 512.0\nout: 7\n"
        "budget: 1.0\nweight_decay: 0\nthreads: null\n"
    )
    train, lead = make_configs(read_yaml(path), TrainConfig, LeadConfig)
    assert train.adapted == ["q_proj", "v_proj"] and train.trackers == ["tensorboard", "wandb"]
    assert (train.step_tokens, train.max_length, train.out, train.threads) == (2000, 512, "7", None)
    assert isinstance(train.max_length, int) and isinstance(train.weight_decay, float) and isinstance(lead.budget, float)
    for line, expected in {
        "compile: 'false'": "`compile` must be bool, got 'false'",
        "step_tokens: many": "`step_tokens` must be int, got 'many'",
        "step_tokens: 10.5": "`step_tokens` must be int, got 10.5",
        "accumulation: true": "`accumulation` must be int, got True",
        "gamma: [0.1]": "`gamma` must be float, got",
        "max_length: null": "`max_length` must be int, got None",
    }.items():
        path.write_text(line)
        with pytest.raises(ValueError, match=re.escape(expected)):
            make_configs(read_yaml(path), TrainConfig, LeadConfig)
