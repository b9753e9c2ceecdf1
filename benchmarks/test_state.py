"""The engine's state against NumPy, PyTorch and the published method: observe, step, rank, and the end of a round.

    pytest benchmarks/test_state.py                        one contender a test, by pytest-benchmark, small pools
    python benchmarks/test_state.py [--device cuda]        pools of 10^5 to 10^8 rows, interleaved: Markdown, JSON, a plot

Floor of `rank` over an arm of R rows: its table entries are read once (loss, previous utility, proxy, step, uses,
quarantined: 18 bytes a row) and a utility a row is written and read again (8 bytes). The segment baselines are given
utilities that are computed already and availability for free; "from the table" computes both as lead-fast does. So lead-fast
is shown both ways: computing the utilities, and with utilities given.
The published method filters the pool in Python once a task, and sorts what is left.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interleaved import Call, CannotRunError, Measured, interleave, machine

import lead_fast as lf
from lead_fast.reference_state import CHOOSE, LOSS, PREVIOUS, PROXY, QUARANTINED, STEP, USES
from lead_fast.utility import end_round

NUM_ARMS, TASKS, RATE, BATCH, ROUND_ROWS = 7, 50, 0.015, 64, 1000
SIZES = (10**5, 10**6, 10**7, 10**8)
PUBLISHED_MOST = {"cpu": 10**6, "cuda": 10**5}  # a filter in Python over more rows takes minutes
OURS, GIVEN = "lead-fast", "lead-fast, utilities given"


class Bench:
    """An engine over a pool of `num_rows` rows in 7 arms of 50 tasks, 200 optimizer steps old, with learned coefficients."""

    def __init__(self, num_rows: int, device: str = "cpu") -> None:
        g = np.random.default_rng(0)
        self.num_rows, self.device = num_rows, device
        # A row in every task first, so that a small pool has them all.
        group = np.arange(num_rows, dtype=np.int32)
        group[NUM_ARMS * TASKS :] = g.integers(0, NUM_ARMS * TASKS, num_rows - NUM_ARMS * TASKS, dtype=np.int32)
        pool = lf.Pool.from_arrays(
            arm=(group % NUM_ARMS).astype(np.int16),
            task=(group // NUM_ARMS).astype(np.int32),
            utility=g.gamma(4.0, 0.5, num_rows).astype(np.float32),
        )
        config = lf.LeadConfig(preset="paper", budget=1.0, min_rounds=max(1, num_rows // ROUND_ROWS), rate=RATE, max_uses=255)
        self.engine = engine = lf.LeadEngine(pool, config, device)
        table = engine.table
        seen = torch.from_numpy(g.integers(0, num_rows, num_rows // 10))  # a tenth was trained on
        table.values[PROXY, seen] = 300.0
        table.values[LOSS, seen] *= 0.9
        table.seen[:, seen] = torch.from_numpy(g.integers(1, 200, len(seen)).astype(np.int32)).to(device)
        arm = torch.zeros(1, dtype=torch.int64, device=device)
        for _ in range(200):
            engine.clocks.step(1e-4, 2000.0, arm)
        none = torch.zeros(0, dtype=torch.int64, device=device)
        end_round(table, engine.clocks, engine.estimator, none, none.float(), none, 0.1, fall_of_utility=False)
        fit = engine.estimator.fit  # pyright: ignore[reportAttributeAccessIssue]
        fit[0, 0:4] = torch.tensor([0.5, 0.8, 0.3, 0.1], dtype=torch.float64)
        rows = torch.from_numpy(g.integers(0, num_rows, (64, BATCH)))
        loss, tokens, grad = (torch.from_numpy(g.gamma(4.0, s, BATCH).astype(np.float32)) for s in (0.5, 30.0, 1e4))
        unread = torch.full_like(loss, torch.nan)
        self.samples = lf.SampleStats(*(t.to(device) for t in (loss, tokens, unread, unread, grad)))
        self.rows = rows.to(device)
        self.arm_rows = int(engine.groups.arm_sizes[0])

    def rank(self, choose: str = "topk", utility: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        engine, table, groups = self.engine, self.engine.table, self.engine.groups
        return torch.ops.lead_fast.rank(
            torch.zeros(1, dtype=torch.int64, device=self.device), groups.offsets, groups.arm_groups, table.rows,
            table.values, table.seen, table.flags, engine.estimator.coefficients(engine.clocks), False, utility, None, 0.1,
            RATE, -1, 0.0, 0.0, CHOOSE[choose], 1.0, 0, 1, 255, int(groups.arm_sizes.max()), groups.most_chosen(RATE, -1),
        )  # fmt: skip

    def segments(self) -> tuple[list[tuple[int, int]], torch.Tensor]:
        """The first arm's tasks as ranges, and the utilities of its rows in that order."""
        offsets = self.engine.groups.offsets[: TASKS + 1].tolist()
        utility = self.engine.utility(self.engine.groups.arm_rows(0))
        return list(pairwise(offsets)), utility


def per_call(function: Callable[[int], object], calls: int) -> Call:
    def run() -> None:
        for number in range(calls):
            function(number)

    return run


def observe(bench: Bench) -> Call:
    engine = bench.engine
    if engine._round is None:
        assert engine.begin_round() is not None
    return per_call(lambda n: engine.observe(bench.rows[n % 64], bench.samples), 100)


def step(bench: Bench) -> Call:
    engine = bench.engine
    if engine._round is None:
        assert engine.begin_round() is not None
    return per_call(lambda n: engine.step(lr=1e-4, num_items=2000.0), 100)


def quota(rows: int) -> int:
    return max(1, int(np.ceil(RATE * rows - 1e-9)))


def numpy_segments(bench: Bench) -> Call:
    if bench.device != "cpu":
        raise CannotRunError("NumPy holds arrays on the CPU only")
    segments, utility = bench.segments()
    values = utility.numpy()

    def run() -> list[np.ndarray]:
        return [lo + np.argpartition(values[lo:hi], (hi - lo) - quota(hi - lo))[-quota(hi - lo) :] for lo, hi in segments]

    return run


def torch_segments(bench: Bench) -> Call:
    segments, utility = bench.segments()
    return lambda: [utility[lo:hi].topk(quota(hi - lo)).indices + lo for lo, hi in segments]


def numpy_from_table(bench: Bench) -> Call:
    if bench.device != "cpu":
        raise CannotRunError("NumPy holds arrays on the CPU only")
    segments, _ = bench.segments()
    engine = bench.engine
    values, seen, flags = (t.numpy() for t in (engine.table.values, engine.table.seen, engine.table.flags))
    size = segments[-1][1]

    def run() -> list[np.ndarray]:
        slope, level = engine.estimator.coefficients(engine.clocks)[:, 0].numpy()
        at = seen[STEP, :size]
        drop = (slope[at] * values[PROXY, :size] + level[at]).astype(np.float32)
        utility = np.float32(0.9) * np.maximum(values[LOSS, :size] - drop, 0) + np.float32(0.1) * values[PREVIOUS, :size]
        utility[(flags[USES, :size] >= 255) | (flags[QUARANTINED, :size] != 0)] = -np.inf
        return [lo + np.argpartition(utility[lo:hi], (hi - lo) - quota(hi - lo))[-quota(hi - lo) :] for lo, hi in segments]

    return run


def given_utilities(bench: Bench) -> Callable[[], tuple[torch.Tensor, ...]]:
    """The operator on utilities that are computed already, as the segment baselines have them; it still asks who is left."""
    ready = bench.engine.utility(bench.engine.table.rows.long())
    return lambda: bench.rank(utility=ready)


def published(bench: Bench) -> Call:
    """One round's choice as the published loop makes it: the whole pool, filtered once a task."""
    if bench.num_rows > (most := PUBLISHED_MOST[bench.device]):
        raise CannotRunError(f"a Python filter over more than {most:,} rows takes too long here")
    pool, utility = bench.engine.pool, np.asarray(bench.engine.pool.utility)
    assert pool.arm is not None and pool.task is not None
    samples = [
        {"idf_cluster": int(arm), "task": int(task), "cross_entropy": float(value), "used": 0}
        for arm, task, value in zip(pool.arm, pool.task, utility, strict=True)
    ]

    def run() -> list[dict[str, Any]]:
        chosen: list[dict[str, Any]] = []
        for task in range(TASKS):
            rows = [s for s in samples if s["idf_cluster"] == 0 and s["task"] == task and s["used"] < 4]
            rows.sort(key=lambda s: s["cross_entropy"], reverse=True)
            chosen += rows[: quota(len(rows))]
        return chosen

    return run


RANK: dict[str, Callable[[Bench], Call]] = {
    OURS: lambda bench: bench.rank,
    GIVEN: given_utilities,
    "lead-fast, softmax": lambda bench: lambda: bench.rank("softmax"),
    "NumPy argpartition a segment": numpy_segments,
    "PyTorch topk a segment": torch_segments,
    "NumPy, from the table": numpy_from_table,
    "published: a Python filter a task": published,
}


@pytest.fixture(scope="module")
def small() -> Bench:
    return Bench(10**5)


@pytest.mark.parametrize("name", RANK)
def test_rank(benchmark: Any, small: Bench, name: str) -> None:
    benchmark.group = f"rank an arm of {small.arm_rows} rows in {TASKS} tasks"
    benchmark.pedantic(RANK[name](small), rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("call", [observe, step])
def test_a_hundred_calls(benchmark: Any, small: Bench, call: Callable[[Bench], Call]) -> None:
    benchmark.group = f"100 calls of {call.__name__}, {BATCH} rows"
    benchmark.pedantic(call(small), rounds=5, warmup_rounds=1)


def test_the_contenders_choose_the_same_rows(small: Bench) -> None:
    table = small.engine.table
    ours, given = (set(table.position[rows[rows >= 0]].tolist()) for rows in (small.rank()[0], given_utilities(small)()[0]))
    assert ours == given
    for name in ("NumPy argpartition a segment", "PyTorch topk a segment", "NumPy, from the table"):
        assert set(np.concatenate([np.asarray(part) for part in RANK[name](small)()]).tolist()) == ours, name


def round_times(bench: Bench, rounds: int) -> dict[str, Measured]:
    """begin_round and end_round of rounds of 1,000 rows, whole engine calls, the report read."""
    from interleaved import time_ms

    engine, begin, end = bench.engine, Measured("begin_round"), Measured("end_round and its report")
    if engine._round is not None:
        engine.end_round()
    for number in range(rounds + 2):
        took = time_ms(engine.begin_round)
        rnd = engine._round
        assert rnd is not None
        for part in rnd.rows.split(BATCH):
            samples = lf.SampleStats(*(column[: len(part)] for column in bench.samples))
            engine.observe(part.to(bench.device), samples)
            engine.step(lr=1e-4, num_items=2000.0)
        ended = time_ms(lambda: (report := engine.end_round()) and (report.reward, report.calibration))
        if number >= 2:
            begin.times_ms.append(took)
            end.times_ms.append(ended)
    return {m.name: m for m in (begin, end)}


def measure(num_rows: int, device: str, rounds: int) -> dict[str, Any]:
    bench = Bench(num_rows, device)
    table = bench.engine.table
    tensors = (table.rows, table.position, table.arm, table.values, table.seen, table.flags)
    small = interleave({"observe": lambda: observe(bench), "step": lambda: step(bench)}, rounds)
    for measured in small.values():
        measured.times_ms = [t / 100 for t in measured.times_ms]
    ranked = interleave({name: (lambda make=make: make(bench)) for name, make in RANK.items()}, rounds)
    whole = round_times(bench, rounds)
    num_bytes = sum(t.numel() * t.element_size() for t in tensors)
    return {"rows": num_rows, "arm_rows": bench.arm_rows, "table_bytes": num_bytes, "calls": {**small, **whole}, "rank": ranked}


def tables(results: list[dict[str, Any]]) -> list[str]:
    lines = ["| rows in the pool | table | observe 64 rows | step | begin_round | end_round |", "|---|---|---|---|---|---|"]
    for r in results:
        calls = {name: m.median_ms for name, m in r["calls"].items()}
        lines.append(
            f"| {r['rows']:,} | {r['table_bytes'] / 1e9:.2f} GB | {1e3 * calls['observe']:.1f} µs | "
            f"{1e3 * calls['step']:.1f} µs | {calls['begin_round']:.2f} ms | {calls['end_round and its report']:.2f} ms |"
        )
    lines += ["", f"### Ranking one arm of N/7 rows in {TASKS} tasks, {RATE:.1%} of each", ""]
    lines += [
        "| rows in the arm | | median ms | min to max | lead-fast is faster by | utilities given: by | GB/s of the floor |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        ours = r["rank"][OURS]
        for name, m in r["rank"].items():
            if m.refused is not None:
                lines.append(f"| {r['arm_rows']:,} | {name} | does not run: {m.refused} | | | | |")
                continue
            rate = 26 * r["arm_rows"] / m.median_ms / 1e6
            spread = f"{min(m.times_ms):.2f} to {max(m.times_ms):.2f}"
            faster = f"{m.ratio_to(ours):.1f} | {m.ratio_to(r['rank'][GIVEN]):.1f}"
            lines.append(f"| {r['arm_rows']:,} | {name} | {m.median_ms:.2f} | {spread} | {faster} | {rate:.1f} |")
    return [*lines, ""]


def plot(results: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    rows = [r["rows"] for r in results]
    for name in results[0]["calls"]:
        left.loglog(rows, [r["calls"][name].median_ms for r in results], marker="o", label=name)
    for name in results[0]["rank"]:
        ran = [(r["arm_rows"], r["rank"][name].median_ms) for r in results if r["rank"][name].refused is None]
        right.loglog(*zip(*ran, strict=True), marker="o", label=name, linewidth=2.5 if name == OURS else 1.2)
    left.set(xlabel="rows in the pool", ylabel="ms a call", title="What a training step and a round pay")
    right.set(xlabel="rows in the arm", ylabel="ms", title=f"Ranking an arm of {TASKS} tasks")
    for ax in (left, right):
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8, frameon=False)
        ax.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def write(folder: Path, sizes: tuple[int, ...], rounds: int, device: str) -> None:
    results: list[dict[str, Any]] = []
    for size in sizes:  # written after each: what a time limit cuts keeps what it had
        results.append(measure(size, device, rounds))
        publish(folder, results, rounds, device)
    print((folder / f"state_{device}.md").read_text())


def publish(folder: Path, results: list[dict[str, Any]], rounds: int, device: str) -> None:
    place = machine()
    lines = [
        f"# The engine's state on {'a GPU' if device == 'cuda' else 'the CPU'}",
        "",
        f"Interleaved, {rounds} rounds; a ratio is the median over rounds of the ratio within the round. observe and step are "
        "whole calls of `LeadEngine` from Python, means of 100; begin_round and end_round those of a round of "
        f"{ROUND_ROWS:,} rows (fewer where an arm's {RATE:.1%} is fewer), with the report read. "
        f"Written by `python benchmarks/test_state.py --device {device}`.",
        "",
        "Machine: " + ", ".join(f"{key} {value}" for key, value in place.items()) + ".",
        "",
        *tables(results),
        f"![Growth with the pool](state_{device}.png)",
        "",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"state_{device}.md").write_text("\n".join(lines))
    flat = [
        {**r, "calls": [asdict(m) for m in r["calls"].values()], "rank": [asdict(m) for m in r["rank"].values()]}
        for r in results
    ]
    (folder / f"state_{device}.json").write_text(json.dumps({"machine": place, "results": flat}, indent=1) + "\n")
    plot(results, folder / f"state_{device}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--rounds", type=int, default=7, help="measured calls of each contender")
    arguments = parser.parse_args()
    write(arguments.out, tuple(arguments.sizes), arguments.rounds, arguments.device)
