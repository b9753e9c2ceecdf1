"""The audit: its statistics, the rows it draws, what it writes, and that it changes nothing of the run that it watches."""

import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.stats
import torch
from safetensors.torch import load_file
from test_engine_from_spec import Script, make_pool, run_script

import lead_fast as lf
from lead_fast.audit import Records, average_ranks, prediction_errors, read_records, slices, spearman, top_overlap
from lead_fast.auditor import Auditor, audit_rows
from lead_fast.cli import main
from lead_fast.config import TrainConfig
from lead_fast.demo_pool import demo_rows
from lead_fast.files import read_jsonl, write_jsonl

ESTIMATORS = ["grad_norm", "none", "historical"]


def records(predicted, observed, before, rounds=None, arm=None):
    n = len(observed)
    columns = {"round": np.ones(n, int) if rounds is None else np.asarray(rounds), "row": np.arange(n),
               "arm": np.zeros(n, int) if arm is None else np.asarray(arm), "seen_round": np.zeros(n, int),
               "seen_loss": np.asarray(before, float), "observed": np.asarray(observed, float)}  # fmt: skip
    return Records(columns, {"e": np.asarray(predicted, float)})


# Statistics.


@pytest.mark.parametrize("seed", range(5))
def test_spearman_shares_ranks_among_ties(seed):
    g = np.random.default_rng(seed)
    x, y = g.integers(0, 5, 40).astype(float), g.normal(size=40).round(1)
    assert average_ranks(x) == pytest.approx(scipy.stats.rankdata(x))
    assert spearman(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    assert spearman(np.zeros(40), y) == 0.0  # all the same: ranks nothing
    assert spearman(x, np.zeros(40)) is None and spearman(x[:2], y[:2]) is None


def test_top_overlap_counts_the_highest_tenth():
    true = np.arange(30.0)
    assert top_overlap(true, true) == 1.0 and top_overlap(-true, true) == 0.0
    predicted = true.copy()
    predicted[[29, 0]] = predicted[[0, 29]]  # of the three highest one is missed
    assert top_overlap(predicted, true) == pytest.approx(2 / 3)
    assert top_overlap(true[:9], true[:9]) is None


def test_errors_by_hand():
    e = prediction_errors(records([2.0, 1.0, 0.5, 3.0], [1.5, 1.5, 0.5, 2.0], [2.0, 2.0, 1.0, 3.0]), "e")
    assert (e["n"], e["mae"], e["bias"]) == (4, pytest.approx(0.5), pytest.approx(0.25))
    assert e["spearman_level"] == pytest.approx(scipy.stats.spearmanr([2, 1, 0.5, 3], [1.5, 1.5, 0.5, 2]).statistic)
    assert e["spearman_change"] == pytest.approx(scipy.stats.spearmanr([0, -1, -0.5, 0], [-0.5, -0.5, -0.5, -1]).statistic)
    assert e["spearman_change_within"] is None and e["top_overlap"] is None  # too few rows
    assert prediction_errors(records([], [], []), "e")["mae"] is None


def test_a_change_common_to_a_round_ranks_nothing_within_it():
    g = np.random.default_rng(0)
    rounds, before = np.repeat([1, 2, 3], 50), g.gamma(4.0, 0.5, 150).astype(np.float32)
    drop = rounds * 0.05
    predicted = before - drop.astype(np.float32)  # fp32: differences to `before` are equal but for rounding
    errors = prediction_errors(records(predicted, before - drop + 0.01 * g.normal(size=150), before, rounds), "e")
    assert errors["spearman_change"] > 0.8 and errors["spearman_change_within"] == 0.0


def test_a_fall_below_zero_is_a_loss_of_zero_and_a_change_of_its_own_size():
    """Cut at 0, the change would be minus the loss last seen, which no estimator foresaw."""
    before, change = np.array([1.0, 2.0, 3.0, 4.0]), np.array([-9.0, -8.0, -7.0, -6.0])
    errors = prediction_errors(records(before + change, before + change / 10.0, before), "e")
    assert errors["spearman_change"] == pytest.approx(1.0) and errors["spearman_level"] == 0.0
    assert errors["mae"] == pytest.approx(np.abs(before + change / 10.0).mean())


def test_slices_are_stages_and_arms():
    r = records(np.zeros(9), np.zeros(9), np.zeros(9), rounds=range(1, 10), arm=[0, 0, 4] * 3)
    found = {name: np.flatnonzero(mask).tolist() for name, mask in slices(r, 9)}
    assert found == {"all": list(range(9)), "early": [0, 1, 2], "middle": [3, 4, 5], "late": [6, 7, 8],
                     "arm 0": [0, 1, 3, 4, 6, 7], "arm 4": [2, 5, 8]}  # fmt: skip


# While training.


def make(tmp_path, score, **options):
    pool, utility = make_pool()
    engine, script = lf.LeadEngine(pool, lf.LeadConfig(budget=1.0, rate=0.1, min_rounds=15)), Script(utility)
    auditor = Auditor(engine, TrainConfig(**{"audit_every": 3, "audit_rows": 20} | options), score, tmp_path)
    engine.track(script.weights)
    return engine, script, auditor


def play(engine, script, auditor, number):
    """One round of the script, audited; returns what the auditor says."""
    begin, out = engine.begin_round, {}
    engine.begin_round = lambda: out.setdefault("round", begin())
    end = engine.end_round
    engine.end_round = lambda: out.setdefault("report", end())
    run_script(engine, script, 1)
    engine.begin_round, engine.end_round = begin, end
    assert out["round"].number == number
    return auditor.after_round(out["round"], out["report"])


def test_random_rows_are_drawn_by_round_and_seed_alone(tmp_path):
    engine, script, auditor = make(tmp_path, lambda rows: (torch.zeros(len(rows)), 1))
    for number in range(1, 11):
        play(engine, script, auditor, number)
    rows = audit_rows(engine, 10, 20)
    trained = {row for _, rows_of_round, _ in engine.history for row in rows_of_round.tolist()}
    assert sum(row in trained for row in rows.tolist()) == 10 == len(rows) - 10
    assert rows.tolist() == sorted(set(rows.tolist())) and not np.asarray(engine.pool.aside)[rows].any()
    drawn = [set(audit_rows(engine, number, 20).tolist()) for number in range(10, 60)]
    assert len(set().union(*drawn)) == len(engine.groups.choosable_rows())  # every row has its turn
    state = engine.state_dict()
    again, *_ = make(tmp_path, lambda rows: (torch.zeros(len(rows)), 1))
    again.load_state_dict(state)
    assert torch.equal(audit_rows(again, 10, 20), rows)
    assert len(audit_rows(engine, 1, 1000)) == len(engine.groups.choosable_rows())  # a half that is short is taken whole


def test_predictions_are_written_as_they_were_when_the_rows_were_scored(tmp_path):
    expected = {}

    def score(rows):
        now = {name: engine.predicted_loss(torch.tensor(rows), name).tolist() for name in ESTIMATORS}
        expected[engine.num_rounds] = rows, now
        return torch.tensor(rows) / 7.0, 5 * len(rows)

    engine, script, auditor = make(tmp_path, score)
    notes = [play(engine, script, auditor, number) for number in range(1, 13)]
    assert sorted(expected) == [3, 6, 9, 12]
    assert [bool(n) for n in notes] == [number % 3 == 0 for number in range(1, 13)]
    assert notes[11] == {"audit": {"rows": 20, "tokens": 100}}
    found, visits = read_records(tmp_path, "rescored"), read_records(tmp_path, "visits")
    assert list(found.predicted) == ESTIMATORS
    assert np.unique(visits["round"]).tolist() == list(range(1, 13))
    for number, (rows, now) in expected.items():
        at = found.where(found["round"] == number)
        assert at["row"].tolist() == rows and at["arm"].tolist() == np.asarray(engine.pool.arm)[rows].tolist()
        assert at["observed"] == pytest.approx(np.array(rows) / 7.0)
        before = visits.where(visits["round"] <= number)
        seen = dict(
            zip(before["row"].tolist(), zip(before["round"].tolist(), before["observed"].tolist(), strict=True), strict=True)
        )
        first = np.asarray(engine.pool.utility, float)
        assert list(zip(at["seen_round"], at["seen_loss"], strict=True)) == [seen.get(row, (0, first[row])) for row in rows]
        for name in ESTIMATORS:
            assert np.maximum(at.predicted[name], 0.0) == pytest.approx(now[name])


def test_a_loss_that_is_not_finite_is_no_truth(tmp_path):
    engine, script, auditor = make(tmp_path, lambda rows: (torch.tensor([torch.nan] + [1.0] * (len(rows) - 1)), 1))
    for number in range(1, 4):
        play(engine, script, auditor, number)
    assert len(read_records(tmp_path, "rescored")) == 19


# Whole runs.

OPTIONS = [
    "--model-config", "tiny", "--pretrain-epochs", "2", "--max-length", "128", "--step-tokens", "512", "--budget", "40",
    "--min-rounds", "8", "--num-arms", "3", "--tasks-per-arm", "2", "--warmup-share", "0.1", "--learning-rate", "3e-3",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same training twice: audited after every round, and not."""
    folder = tmp_path_factory.mktemp("audit")
    write_jsonl(folder / "pool.jsonl", demo_rows(300, seed=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEAD_FAST_CACHE", str(folder / "cache"))
        assert main(["prepare", "--pool", str(folder / "pool.jsonl"), "--out", str(folder / "prepared"), *OPTIONS]) == 0
        options = ["train", "--pool", str(folder / "prepared"), *OPTIONS[4:]]
        assert main([*options, "--out", str(folder / "plain")]) == 0
        audited = ["--out", str(folder / "audited"), "--audit-every", "1", "--audit-rows", "24"]
        assert main([*options, *audited]) == 0
    return folder / "audited", folder / "plain"


def test_an_audited_run_is_the_run_that_it_watches(runs):
    audited, plain = runs
    assert (audited / "selected.jsonl").read_bytes() == (plain / "selected.jsonl").read_bytes()
    one, two = (load_file(run / "model" / "adapter_model.safetensors") for run in runs)
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    summary = json.loads((audited / "summary.json").read_text())
    rounds = read_jsonl(audited / "rounds.jsonl")
    assert summary["audit_tokens"] == sum(r["audit"]["tokens"] for r in rounds) > 0
    assert summary["seconds_by_part"]["audit"] > 0.0 and not (plain / "audit").exists()
    assert all("warnings" in r and r["visits"]["count"] for r in rounds)
    assert json.loads((plain / "summary.json").read_text())["audit_tokens"] == 0
    tokens = sum(r["tokens"] for r in rounds)
    assert summary["trained_tokens"] == tokens  # re-scoring trains nothing


def test_the_last_truths_are_the_losses_of_the_model_that_was_saved(runs):
    from lead_fast.loading import load_tokenizer
    from lead_fast.lora import load_lora
    from lead_fast.models import PackedModel
    from lead_fast.offline.prepare import load_base, load_prepared
    from lead_fast.packing import ChatEncoder, pack

    run, _ = runs
    last = sorted((run / "audit").glob("rescored-*.parquet"))[-1]
    table = pq.read_table(last).to_pydict()
    prepared = load_prepared(run.parent / "prepared")
    model = PackedModel(load_lora(load_base(prepared.base, TrainConfig()), run / "model")).eval()
    encoder = ChatEncoder(load_tokenizer(prepared.base), 128)
    for row, observed in zip(table["row"], table["observed"], strict=True):
        sample = next(iter(encoder.encode(prepared.pool.iter_messages(np.array([row])))))
        with torch.no_grad():
            assert float(model(pack([sample]), stats="loss").samples.loss) == pytest.approx(observed, abs=1e-4)


def test_the_audit_reads_the_run(runs, capfd):
    run, plain = runs
    report = lf.audit(run)
    assert report.estimator == "grad_norm" and report.estimators == ESTIMATORS
    assert report.rescored == list(range(1, report.num_rounds + 1))
    assert report.tokens == json.loads((run / "summary.json").read_text())["audit_tokens"]
    files = [pq.read_table(file).to_pydict() for file in (run / "audit").glob("rescored-*.parquet")]
    entries = [entry for file in files for entry in zip(file["seen_round"], file["predicted.none"], file["observed"],
                                                        strict=True)]  # fmt: skip
    for rows, trained in (("trained", True), ("untouched", False)):
        error = np.array([predicted - observed for before, predicted, observed in entries if (before > 0) == trained])
        found = report.find("rescored", rows, "none")
        assert found["n"] == len(error) > 20
        assert found["mae"] == pytest.approx(np.abs(error).mean(), rel=1e-4)
        assert found["bias"] == pytest.approx(error.mean(), abs=1e-5)
        stages = [report.find("rescored", rows, "none", stage)["n"] for stage in ("early", "middle", "late")]
        arms = [e["n"] for e in report.errors if (e["source"], e["rows"], e["estimator"]) == ("rescored", rows, "none")
                and e["slice"].startswith("arm")]  # fmt: skip
        assert sum(stages) == sum(arms) == len(error)
    visits = [report.find("visits", rows, "grad_norm")["n"] for rows in ("trained", "untouched")]
    assert sum(visits) == sum(r["samples"] for r in read_jsonl(run / "rounds.jsonl"))
    with pytest.raises(ValueError, match="train it with --audit-every"):
        lf.audit(plain)
    assert main(["audit", str(plain)]) == 1
    assert "--audit-every" in capfd.readouterr().err


def test_the_command_prints_a_table_and_writes_a_page(runs, capfd):
    run, _ = runs
    assert main(["audit", str(run)]) == 0
    printed = capfd.readouterr().out.splitlines()
    summary, report = json.loads(printed[-1]), lf.audit(run)
    assert any(line.startswith("MAE and bias (predicted minus true) in nats") for line in printed)
    for estimator in ESTIMATORS:
        mae = report.find("rescored", "untouched", estimator)["mae"]
        assert any(re.match(rf"all +{estimator} .* {mae:.4f} ", line) for line in printed)
    assert summary["rescored_rounds"] == len(report.rescored)
    assert json.loads((run / "audit.json").read_text()) == report.to_dict()
    html = (run / "audit.html").read_text()
    assert html.count("<svg") == 8 and "<script" not in html and not re.search(r'(src|href)="(?!#)', html)


def test_warnings_stand_in_the_report(runs, tmp_path):
    for name in ("rounds.jsonl", "summary.json"):
        (tmp_path / name).write_text((runs[0] / name).read_text())
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["warnings"] == [w for r in read_jsonl(tmp_path / "rounds.jsonl") for w in r["warnings"]]
    summary["warnings"] = [{"kind": "drift", "round": 7, "text": "arm 3 < arm 4", "option": "bandit", "value": "exp3s"}]
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert main(["report", str(tmp_path)]) == 0
    html = (tmp_path / "report.html").read_text()
    assert '<p class="warning">Round 7: arm 3 &lt; arm 4.</p>' in html
    assert f"{summary['audit_tokens']:,} re-scored for the audit" in html and "<td>audit: re-scoring</td>" in html


def test_wrong_options_are_named(tmp_path, capfd):
    write_jsonl(tmp_path / "pool.jsonl", demo_rows(20, seed=1))
    options = ["train", "--model-config", "tiny", "--pool", str(tmp_path / "pool.jsonl"), "--out", str(tmp_path / "out")]
    for wrong, words in (
        (["--audit-every", "-1"], "`audit_every` must be at least 0"),
        (["--audit-rows", "1"], "`audit_rows` must be at least 2"),
        (["--audit-every", "2", "--audit-estimators", "none, magic"], "got 'magic'"),
    ):
        assert main([*options, *wrong]) == 1
        assert words in capfd.readouterr().err and not (tmp_path / "out").exists()


def test_the_audit_is_called_alike_by_either_name(runs):
    import lead_fast.audit

    assert lf.audit(runs[0]).errors == lead_fast.audit.audit(runs[0]).errors
