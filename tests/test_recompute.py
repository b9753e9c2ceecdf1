"""Real runs, recomputed from their logs; and logs with one number changed, which must not pass."""

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import recompute as r
import torch

from lead_fast.cli import main
from lead_fast.demo_pool import demo_rows

SEED = 11
COMMON = {
    "num_arms": 3, "tasks_per_arm": 3, "max_uses": 2, "step_tokens": 512, "max_length": 96, "seed": SEED, "threads": 1,
    "warmup_share": 0.05, "log_utilities": True,
}  # fmt: skip
# Few uses, so that rows come back; `paper` goes on until every row was used, so that arms run dry.
ROBUST = {"preset": "robust", "model_config": "tiny", "pretrain_epochs": 0.5, "budget": 61, "min_rounds": 20, "rate": 0.1}
PAPER = {"preset": "paper", "budget": 1000, "rate": 0.3}


def _train(out: Path, pool: Path, options: dict) -> Path:
    arguments = ["train", "--pool", str(pool), "--out", str(out)]
    for name, value in (COMMON | options).items():
        flag = "--" + name.replace("_", "-")
        arguments += [flag] if value is True else [flag, str(value)]
    assert main(arguments) == 0
    return out


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A finished run of each preset; `paper` starts from the pool that `robust` prepared."""
    root = tmp_path_factory.mktemp("recompute")
    pool = root / "pool.jsonl"
    pool.write_text("".join(json.dumps(row) + "\n" for row in demo_rows(300, seed=5)), encoding="utf-8")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEAD_FAST_CACHE", str(root / "cache"))
        robust = _train(root / "robust", pool, ROBUST)
        yield {"robust": robust, "paper": _train(root / "paper", robust / "prepared", PAPER)}
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def logs(folders: dict[str, Path]) -> dict[str, r.RunLog]:
    return {preset: r.read_run(folder) for preset, folder in folders.items()}


@pytest.mark.parametrize("preset", ["robust", "paper"])
def test_every_round_of_a_run_follows_from_its_log(preset: str, logs: dict[str, r.RunLog]):
    log = logs[preset]
    verdict = r.recompute(log)
    assert verdict["first_disagreement"] is None
    assert verdict["rounds"] == len(log.rounds) >= 15
    assert verdict["rows"] == min(log.config["budget"], (~log.aside).sum())


def test_the_runs_reach_what_is_to_be_recomputed(logs: dict[str, r.RunLog]):
    robust, paper = logs["robust"], logs["paper"]
    assert (robust.config["choose"], robust.config["reward"], robust.config["exclude_top"]) == ("softmax", "drop", 0.2)
    assert (paper.config["choose"], paper.config["reward"], paper.config["exclude_top"]) == ("topk", "idu", 0.0)
    assert [line["forced"] for line in robust.rounds[:4]] == [True, True, True, False]
    assert not any(line["forced"] for line in paper.rounds)
    for log in (robust, paper):
        assert any((c["uses"][c["chosen"]] == 1).any() for c in log.candidates), "no row came back"
        assert len({tuple(line["log_weights"]) for line in log.rounds}) > len(log.rounds) // 2, "the bandit stood still"
    assert any(min(line["probs"]) == 0.0 for line in paper.rounds), "no arm ran dry"


# Changes of one logged number, each with the round in which it must be found (None: the run as a whole) and as what.
Change = Callable[[r.RunLog], None]


def _set(log: r.RunLog, number: int, column: str, index: int, value: float) -> None:
    log.candidates[number - 1][column][index] = value


def _first(log: r.RunLog, number: int, *, chosen: bool) -> int:
    return int(np.flatnonzero(log.candidates[number - 1]["chosen"] == chosen)[0])


def _swap_ends(rows: list[int]) -> None:
    rows[0], rows[-1] = rows[-1], rows[0]


CHANGES: dict[str, tuple[str, Change, int | None, str]] = {
    "a row left out, its utility raised": (
        "paper", lambda log: _set(log, 5, "utility", _first(log, 5, chosen=False), 99.0), 5, "rows chosen"),
    "a chosen row's utility lowered": (
        "paper", lambda log: _set(log, 5, "utility", _first(log, 5, chosen=True), 0.0), 5, "rows chosen"),
    "a chosen row's utility, by one part in a million": (
        "paper", lambda log: _set(log, 5, "utility", _first(log, 5, chosen=True),
                                  log.candidates[4]["utility"][_first(log, 5, chosen=True)] * (1 + 1e-6)),
        None, "selected.jsonl"),
    "a first utility": ("robust", lambda log: _set(log, 1, "utility", 0, 0.1), 1, "utility of the first round"),
    "noise": ("robust", lambda log: _set(log, 5, "noise", 0, 9.0), 5, "noise"),
    "uses": ("robust", lambda log: _set(log, 5, "uses", 0, 2), 5, "uses of the candidates"),
    "a task": ("robust", lambda log: _set(log, 5, "task", 0, 77), 5, "task of the candidates"),
    "chosen": ("robust", lambda log: _set(log, 5, "chosen", _first(log, 5, chosen=False), True), 5, "rows chosen"),
    "a candidate missing": (
        "robust", lambda log: log.candidates.__setitem__(4, {k: v[1:] for k, v in log.candidates[4].items()}), 5, "candidates"),
    "an arm": (
        "robust", lambda log: log.rounds[6].update(arm=(log.rounds[6]["arm"] + 1) % 3,
                                                   arms=[(log.rounds[6]["arm"] + 1) % 3]), 7, "arm"),
    "the order of the first visits": (
        "robust", lambda log: log.rounds[0].update(arm=log.rounds[1]["arm"], arms=log.rounds[1]["arms"]), 1, "arm"),
    "a uniform number": ("paper", lambda log: log.rounds[6].update(uniform=[0.5]), 7, "uniform number of the arm"),
    "a task's uniform number": (
        "robust", lambda log: log.rounds[6].update(task_uniforms=[0.5]), 7, "uniform number of the tasks"),
    "a probability": ("paper", lambda log: log.rounds[6]["probs"].__setitem__(0, 0.34), 7, "probabilities"),
    "a log weight": (
        "paper", lambda log: log.rounds[6]["log_weights"].__setitem__(1, log.rounds[6]["log_weights"][1] - 1e-6),
        7, "log weights"),
    "a reward": (
        "paper", lambda log: log.rounds[6].update(reward=0.7, rewards=[0.7]), 7, "scaled reward"),
    "a scaled reward": ("paper", lambda log: log.rounds[6].update(scaled_rewards=[0.123]), 7, "scaled reward"),
    "the order of training": ("robust", lambda log: _swap_ends(log.rounds[6]["rows"]), 7, "rows trained"),
    "a row not trained": ("robust", lambda log: log.rounds[6]["rows"].pop(), 7, "rows trained"),
    "the seed": ("robust", lambda log: log.config.update(seed=SEED + 1), None, ""),
    "the rate": ("paper", lambda log: log.config.update(rate=0.2), 1, "rows chosen"),
    "the temperature": ("robust", lambda log: log.config.update(temperature=0.01), None, ""),
    "a smaller budget": ("robust", lambda log: log.config.update(budget=60), None, ""),
    "a larger budget": ("robust", lambda log: log.config.update(budget=62), None, ""),
    "a round missing": ("robust", lambda log: (log.rounds.pop(7), log.candidates.pop(7)), 8, "round number"),
    "the last round missing": ("robust", lambda log: (log.rounds.pop(), log.candidates.pop()), None, "run ended"),
    "a selected row missing": ("robust", lambda log: log.selected.pop(), None, "number of lines of selected.jsonl"),
    "a selected row's id": ("robust", lambda log: log.selected[3].update(id="another"), None, "selected.jsonl"),
    "a selected row's rounds": ("robust", lambda log: log.selected[3]["rounds"].append(5), None, "selected.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_log_is_found_out(name: str, logs: dict[str, r.RunLog]):
    preset, change, number, what = CHANGES[name]
    log = copy.deepcopy(logs[preset])
    for candidates in log.candidates:  # Arrow's arrays are read-only
        candidates.update({column: values.copy() for column, values in candidates.items()})
    change(log)
    verdict = r.recompute(log)
    assert not verdict["agree"]
    if what:
        assert (verdict["first_disagreement"]["round"], verdict["first_disagreement"]["what"]) == (number, what)


def test_only_quarantined_rows_may_be_missing_from_the_candidates(logs: dict[str, r.RunLog]):
    log = logs["robust"]
    arm, row = log.rounds[0]["arm"], log.rounds[0]["rows"][0]
    number = next(line["round"] for line in log.rounds[1:] if line["arm"] == arm)
    replay = r.Replay(log)
    for n in range(1, number):
        replay.round(n, log.rounds[n - 1], log.candidates[n - 1])
    candidates = log.candidates[number - 1]
    without = {name: column[candidates["row"] != row] for name, column in candidates.items()}
    with pytest.raises(r.Disagreement, match="candidates"):
        replay.check_candidates(number, arm, without)
    replay.num_quarantined = 1
    replay.check_candidates(number, arm, without)
    assert replay.barred[row]


def _command(folder: Path) -> tuple[int, dict]:
    script = Path(__file__).with_name("recompute.py")
    done = subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, text=True, check=False)
    return done.returncode, json.loads(done.stdout)


def test_the_command_prints_a_verdict(folders: dict[str, Path], tmp_path: Path):
    code, verdict = _command(folders["robust"])
    num_rounds = len((folders["robust"] / "rounds.jsonl").read_text().splitlines())
    assert (code, verdict["agree"], verdict["rounds"]) == (0, True, num_rounds)

    folder = tmp_path / "changed"
    shutil.copytree(folders["robust"], folder, ignore=shutil.ignore_patterns("model", "start", "scores"))
    path = folder / "utilities" / "round-00003.parquet"
    table = pq.read_table(path)
    column = table.column_names.index("utility")
    utility = table["utility"].to_numpy().copy()
    utility[table["chosen"].to_numpy()] -= 50.0
    pq.write_table(table.set_column(column, "utility", pa.array(utility)), path)
    code, verdict = _command(folder)
    assert (code, verdict["agree"], verdict["rounds"]) == (1, False, 2)
    assert verdict["first_disagreement"]["round"] == 3


# The recomputation's own parts, against numbers known from elsewhere or worked out by hand.


@pytest.mark.parametrize(
    ("seed", "stream", "round", "counter", "word"),
    [
        # Known answers of Random123 for philox4x32-10.
        (0, 0, 0, 0, 0x6627E8D5),
        (2**64 - 1, 2**32 - 1, 2**32 - 1, 2**64 - 1, 0x408F276D),
        (0x299F31D0A4093822, 0x03707344, 0x13198A2E, 0x85A308D3243F6A88, 0xD16CFE09),
    ],
)
def test_philox_gives_the_published_words(seed: int, stream: int, round: int, counter: int, word: int):
    assert r.philox_uniform(seed, stream, round, [counter]).tolist() == [(word + 0.5) / 2**32]


@pytest.mark.parametrize(
    ("available", "rate", "cap", "uniform", "expected"),
    [
        ([200, 67, 66, 1], 0.015, None, 0.5, [3, 2, 1, 1]),  # 0.015 * 200 is 3 but for rounding
        ([10, 10, 10], 0.2, 6, 0.5, [2, 2, 2]),  # the cap is not exceeded
        ([10, 10, 10, 10], 0.1, 2, 0.25, [0, 1, 0, 1]),  # edges .25, .75, 1.25, 1.75, 2.25
        ([10, 10, 10, 10], 0.1, 2, 0.75, [1, 0, 1, 0]),  # edges .75, 1.25, 1.75, 2.25, 2.75
        ([30, 10], 0.1, 2, 0.4, [1, 1]),  # edges .4, 1.9, 2.4
        ([30, 10], 0.1, 2, 0.6, [2, 0]),  # edges .6, 2.1, 2.6
    ],
)
def test_quotas_worked_out_by_hand(available, rate, cap, uniform, expected):
    assert r.task_quotas(available, rate, cap, uniform) == expected


def test_choices_worked_out_by_hand():
    row, utility = np.array([3, 5, 8, 9, 11]), np.array([1.0, 4.0, 4.0, 2.0, 3.0], np.float32)
    noise = np.array([5.0, 0.0, 0.0, 1.0, 0.5])

    def chosen(choose: str, exclude_top: float, temperature: float = 1.0) -> list[int]:
        rules = {"choose": choose, "temperature": temperature, "exclude_top": exclude_top}
        return r.choose_in_task(row, utility, noise, 2, **rules)

    assert chosen("topk", 0.0) == [5, 8]
    assert chosen("topk", 0.2) == [8, 11]  # of the two highest the lower row is left out
    assert chosen("softmax", 0.0) == [3, 5]  # keys 6, 4, 4, 3, 3.5
    assert chosen("softmax", 0.4, temperature=0.1) == [11, 9]  # keys 15, -, -, 21, 30.5
    assert chosen("random", 0.4) == [3, 9]
    assert r.cut_to_budget({1: 0.5, 2: 0.9, 3: 0.7, 4: 0.1}, {1, 2, 3}, 2) == [2, 3, 4]


def test_rewards_are_scaled_by_two_deviations_with_a_floor():
    assert r.scaled_reward([5.0, -1.0]) == 0.0
    assert r.scaled_reward([1.0, 2.0, 3.0]) == 0.5
    assert r.scaled_reward([0.0] * 20 + [1.0]) == 1.0
    assert r.scaled_reward([1.0] * 9 + [1.01]) == pytest.approx(0.009 / (2 * 0.05 * 1.001))
