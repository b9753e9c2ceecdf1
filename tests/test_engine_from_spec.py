"""`LeadEngine` against a second implementation of the method, one row at a time in plain Python, over scripted training.

The script makes up what training would show (losses, gradient norms, learning rates, weights), with revisits, duplicates,
samples without supervised tokens, samples that are no rows of the pool, and losses that are NaN. `SpecLead` says what must
come of it.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import recompute as r
import torch
from spec_lead import Estimator, GradNorm, Historical, Shown, SpecLead

import lead_fast as lf

DEFAULTS: dict[str, Any] = {
    "gamma": 0.1, "smoothing": 0.1, "rate": 0.015, "max_uses": 4, "temperature": 1.0, "adam_beta1": 0.9, "seed": 0,
    "estimator": "grad_norm",
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"choose": "topk", "reward": "idu", "exclude_top": 0.0, "visit_all_first": False, "min_rounds": 0},
    "robust": {"choose": "softmax", "reward": "drop", "exclude_top": 0.2, "visit_all_first": True, "min_rounds": 100},
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tensors of a dozen numbers: waking a second thread costs more than the work, the more so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# The script.


@dataclass
class Step:
    """One optimizer step: its micro-batches, learning rate and supervised tokens."""

    batches: list[list[Shown]]
    lr: float
    num_items: float


def rows_of(batch: list[Shown]) -> torch.Tensor:
    return torch.tensor([row for row, *_ in batch])


def samples(batch: list[Shown]) -> lf.SampleStats:
    _, loss, tokens, grad = (torch.tensor(column, dtype=torch.float32) for column in zip(*batch, strict=True))
    unread = torch.full_like(loss, torch.nan)
    return lf.SampleStats(loss, tokens, unread, unread, grad)


class Script:
    """Made-up training: what each round's rows show, in steps of two micro-batches, and weights that move.

    A row's loss falls by what its last visit pushed and with age, plus noise, so that every coefficient has something to
    learn. `weights` are the parameters that `historical` follows. Losses and norms are exact in fp32.
    """

    def __init__(self, first_utility: np.ndarray, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.seen = {row: (float(u), 0.0, 0) for row, u in enumerate(first_utility)}  # loss, push, round
        self.weights = [torch.zeros(5, 3), torch.ones(4)]
        self.pull = [self.rng.normal(size=tuple(w.shape)) for w in self.weights]

    def round(self, number: int, rows: list[int]) -> list[Step]:
        steps = []
        for start in range(0, len(rows), 4):
            lr = 1e-3 * (1.0 + 0.5 * math.cos(number + start))
            part = rows[start : start + 4]
            batches = [[self._spoiled(number, row, lr) for row in half] for half in (part[:2], part[2:]) if half]
            if start >= 4:  # the round's first row comes again after a step
                batches[0].append(self._show(number, rows[0], lr))
            batches[0].append(self._show(number, part[0], lr))  # twice in one micro-batch: the last one counts
            batches[-1].append(self._show(number, part[0], lr))  # and once more in the same step
            batches[0].append((-1, 9.0, 7.0, 1e5))
            num_items = sum(tokens for batch in batches for _, _, tokens, _ in batch)
            steps.append(Step(batches, lr, num_items))
        return steps

    def _spoiled(self, number: int, row: int, lr: float) -> Shown:
        shown = self._show(number, row, lr)
        if row % 29 == 3 and number > 4:
            return row, math.nan, *shown[2:]  # quarantined, whether seen before or not
        if row % 13 == 5 and number % 3 == 0:
            return row, 0.0, 0.0, 0.0  # nothing supervised is left of it
        return shown

    def _show(self, number: int, row: int, lr: float) -> Shown:
        loss, push, last = self.seen[row]
        age = number - last
        loss = max(0.02, loss - push * math.exp(-0.05 * age) - 0.004 * age + 0.02 * self.rng.normal())
        tokens, grad = float(self.rng.integers(1, 40)), float(np.float32(self.rng.gamma(1.0, 4e4)))
        self.seen[row] = (loss, 0.5 * lr * grad / (tokens * 100.0), number)
        return row, float(np.float32(loss)), tokens, grad

    def move_weights(self, number: int, lr: float) -> None:
        for weight, pull in zip(self.weights, self.pull, strict=True):
            direction = pull * self.rng.uniform(-0.2, 1.2) + 0.6 * self.rng.normal(size=pull.shape)
            weight -= torch.from_numpy(lr * direction).float()


# Both, side by side.


def make_pool(seed: int = 3) -> tuple[lf.Pool, np.ndarray]:
    """120 rows in arms 0, 1, 3 (arm 2 has none), tasks whose numbers repeat across arms, some rows aside, some ties."""
    g = np.random.default_rng(seed)
    arm = g.choice([0, 1, 3], 120, p=[0.2, 0.35, 0.45])
    task = g.choice([4, 7, 9], 120, p=[0.2, 0.3, 0.5])
    utility = g.gamma(4.0, 0.5, 120).astype(np.float32)
    utility[:40:2] = 1.5
    aside = g.random(120) < 0.06
    pool = lf.Pool.from_arrays(arm=arm, task=task, utility=utility).with_arrays(aside=aside)
    return pool, utility


def run_script(engine: lf.LeadEngine, script: Script, num_rounds: int) -> list[tuple]:
    """Plays the script's rounds and returns what was chosen and reported."""
    out = []
    for _ in range(num_rounds):
        rnd = engine.begin_round()
        if rnd is None:
            break
        for step in script.round(rnd.number, rnd.rows.tolist()):
            for batch in step.batches:
                engine.observe(rows_of(batch), samples(batch))
            script.move_weights(rnd.number, step.lr)
            engine.step(lr=step.lr, num_items=step.num_items)
        report = engine.end_round()
        out.append((rnd.number, rnd.arm, rnd.rows.tolist(), rnd.utility.tolist(), report.reward, report.probs.tolist(),
                    report.num_samples, report.calibration))  # fmt: skip
    return out


def close(got: Any, expected: Any, what: str, atol: float = 2e-6, rtol: float = 2e-5) -> None:
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=rtol, atol=atol, err_msg=what)


def flat(weights: list[torch.Tensor]) -> np.ndarray:
    return np.concatenate([w.double().flatten().numpy() for w in weights])


def compare(options: dict[str, Any]) -> SpecLead:
    """Runs engine and specification through the script until the pool is used up, checking every number on the way."""
    pool, utility = make_pool()
    rules = DEFAULTS | PRESETS[options.get("preset", "robust")] | options
    engine = lf.LeadEngine(pool, lf.LeadConfig(**options))
    spec = SpecLead(np.asarray(pool.arm), np.asarray(pool.task), np.asarray(pool.aside), utility, rules)
    script, everything = Script(utility), torch.arange(len(pool))
    engine.track(script.weights)
    assert engine.budget == spec.budget

    def check_utilities(when: str) -> None:
        usable = [row for row in range(len(pool)) if not spec.entries[row].barred]
        got = engine.utility(everything).numpy()[usable]
        close(got, [spec.idu(row) for row in usable], f"utilities {when}")

    check_utilities("before round 1")
    while True:
        rnd, expected = engine.begin_round(), spec.begin_round()
        assert (rnd is None) == (expected is None)
        if rnd is None or expected is None:
            return spec
        at = f"round {rnd.number}"
        assert (rnd.number, rnd.arm, rnd.rows.tolist()) == (spec.number, *expected), at
        close(rnd.utility, [spec.begin_idu[row] for row in rnd.rows.tolist()], f"{at}: utility at choice")
        spec.theta_start = flat(script.weights)
        for step in script.round(rnd.number, rnd.rows.tolist()):
            for batch in step.batches:
                engine.observe(rows_of(batch), samples(batch))
                spec.observe(batch)
            if rnd.number % 4 == 0:
                check_utilities(f"in {at}, after observing")
            script.move_weights(rnd.number, step.lr)
            engine.step(lr=step.lr, num_items=torch.tensor(step.num_items))
            spec.step(step.lr, step.num_items)
            if rnd.number % 4 == 1:
                check_utilities(f"in {at}, after a step")
        spec.theta_end = flat(script.weights)
        report, wanted = engine.end_round(), spec.end_round()
        check_utilities(f"after {at}")
        assert (report.number, report.arm, report.num_samples) == (rnd.number, rnd.arm, wanted["num_samples"]), at
        close(report.reward, wanted["reward"], f"{at}: reward")
        close(report.scaled_rewards, [wanted["scaled"]], f"{at}: scaled reward", atol=1e-4)
        close(report.probs, spec.probs, f"{at}: probabilities", atol=1e-5)
        weights, active = np.array(spec.log_w), spec.active
        got = report.log_weights.numpy()
        close(got - got[active].max(), weights - weights[active].max(), f"{at}: log weights", atol=1e-4)
        losses = {row: spec.entries[row].loss for row in rnd.rows.tolist()
                  if spec.entries[row].seen == rnd.number and not spec.entries[row].barred}  # fmt: skip
        if losses:
            close(report.mean_loss, np.mean(list(losses.values())), f"{at}: mean loss")
        check_calibration(report.calibration, spec.estimator, at)


def check_calibration(got: dict[str, Any], estimator: Estimator, at: str) -> None:
    if isinstance(estimator, Historical):
        close(got["drop"], list(estimator.drops.values())[-1], f"{at}: drop", rtol=1e-4)
    if isinstance(estimator, GradNorm):
        revisits, pairs = estimator.num_revisits(), len(estimator.pairs)
        assert (got["pairs"], got["revisit_pairs"], got["kappa"]) == (pairs, revisits, estimator.kappa), at
        close(got["c"], estimator.beta[estimator.kappa][0], f"{at}: c", rtol=1e-3, atol=1e-5)
        for name, index in (("d", 1), ("e", 2)):  # nats per round at peak learning rate
            close(got[name], estimator.beta[estimator.kappa][index] * estimator.unit, f"{at}: {name}", rtol=1e-3, atol=1e-5)
        close(got["c_k"], estimator.offset[estimator.kappa], f"{at}: c_k", rtol=1e-3, atol=1e-5)
        known = (("c", revisits), ("d", pairs), ("e", pairs))
        assert got["prior"] == [name for name, count in known if count < 30], at


CASES: dict[str, dict[str, Any]] = {
    "robust": {"min_rounds": 15, "rate": 0.1},
    "robust, one row a round": {"max_uses": 2},
    "paper": {"preset": "paper", "rate": 0.1},
    "paper, a share of the budget": {"preset": "paper", "rate": 0.1, "budget": 61, "seed": 5},
    "random, much smoothing, no momentum": {
        "choose": "random", "smoothing": 0.5, "adam_beta1": 0.0, "reward": "idu", "rate": 0.08, "min_rounds": 0, "seed": 2,
    },
    "softmax at a low temperature": {"temperature": 0.05, "rate": 0.1, "exclude_top": 0.4, "gamma": 0.5, "min_rounds": 10},
    "no estimator, robust": {"estimator": "none", "reward": "idu", "rate": 0.1, "min_rounds": 20},
    "no estimator, no smoothing": {"estimator": "none", "preset": "paper", "smoothing": 0.0, "rate": 0.1},
    "historical, robust": {"estimator": "historical", "rate": 0.1, "min_rounds": 15},
    "historical, paper": {"estimator": "historical", "preset": "paper", "rate": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_engine_does_what_the_method_says(name: str):
    spec = compare({"budget": 1.0, "max_uses": 3} | CASES[name])
    for event in ("revisits", "quarantined", "rows without an observation"):
        assert spec.happened[event], f"the script showed no {event}"
    if isinstance(spec.estimator, GradNorm):
        assert len(spec.estimator.pairs) > 60
        if name != "robust, one row a round":
            assert spec.estimator.num_revisits() > 30 and spec.estimator.beta[spec.estimator.kappa].all()
    if isinstance(spec.estimator, Historical):
        assert {0.0, 1.0} & set(spec.estimator.betas) and any(0.0 < beta < 1.0 for beta in spec.estimator.betas)


def test_the_script_shows_an_arm_run_dry_and_a_budget_cut():
    assert compare({"budget": 1.0, "max_uses": 2, "rate": 0.2, "min_rounds": 0}).happened["arms run dry"]
    for preset in ("robust", "paper"):
        spec = compare({"preset": preset, "budget": 40, "rate": 0.3, "min_rounds": 0})
        assert spec.happened["rows cut by the budget"] and spec.num_used == 40


# State, and what a seed decides.


def same_state(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same_state(left[k], right[k]) for k in left)
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


@pytest.mark.parametrize("num_rounds", [1, 40])  # between the first visits; with everything learned
@pytest.mark.parametrize("name", ["robust", "paper", "historical, robust"])
def test_a_restored_engine_goes_on_identically(name: str, num_rounds: int):
    config = lf.LeadConfig(budget=1.0, max_uses=3, **CASES[name])
    pool, utility = make_pool()
    engines, scripts = [], []
    for _ in range(2):
        engine, script = lf.LeadEngine(pool, config), Script(utility)
        engine.track(script.weights)
        run_script(engine, script, num_rounds)
        engines.append(engine)
        scripts.append(script)
    file = BytesIO()
    torch.save(engines[1].state_dict(), file)
    file.seek(0)
    restored = lf.LeadEngine(make_pool()[0], config)
    restored.track(scripts[1].weights)
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert same_state(engines[0].state_dict(), restored.state_dict())

    through, resumed = run_script(engines[0], scripts[0], 20), run_script(restored, scripts[1], 20)
    assert len(through) == 20 and through[0][0] == num_rounds + 1
    assert through == resumed
    assert same_state(engines[0].state_dict(), restored.state_dict())
    assert engines[0].selected() == restored.selected()


@pytest.mark.parametrize("preset", ["robust", "paper"])
def test_one_seed_one_choice(preset: str):
    def play(seed: int) -> list[tuple]:
        pool, utility = make_pool()
        engine = lf.LeadEngine(pool, lf.LeadConfig(preset=preset, budget=1.0, seed=seed, rate=0.1, min_rounds=15))
        return run_script(engine, Script(utility), 15)

    assert play(7) == play(7)
    assert [out[2] for out in play(7)] != [out[2] for out in play(8)]


def test_large_seeds_use_all_their_bits():
    pool = lf.Pool.from_arrays(arm=[0] * 50, utility=np.ones(50))
    rows = []
    for seed in (1, 1 + 2**32, 2**63 - 1):
        rnd = lf.LeadEngine(pool, lf.LeadConfig(preset="paper", choose="random", rate=0.2, budget=10, seed=seed)).begin_round()
        noise = r.choice_noise("random", seed, 1, np.arange(50))
        assert rnd is not None
        assert rnd.rows.tolist() == r.shuffled(np.argsort(-noise)[:10].tolist(), seed, 1)
        rows.append(sorted(rnd.rows.tolist()))
    assert rows[0] != rows[1] != rows[2]


# Single sentences of the method.


def test_a_budget_in_0_to_1_is_a_share_of_the_whole_pool():
    aside = np.zeros(100, bool)
    aside[:40] = True
    pool = lf.Pool.from_arrays(arm=[0] * 100, utility=np.ones(100)).with_arrays(aside=aside)
    assert lf.LeadEngine(pool, lf.LeadConfig(budget=0.25)).budget == 25
    assert lf.LeadEngine(pool, lf.LeadConfig(budget=25)).budget == 25
    assert lf.LeadEngine(pool, lf.LeadConfig(budget=1.0)).budget == 60


@pytest.mark.parametrize("choose", ["topk", "softmax", "random"])
def test_excluded_rows_are_left_out_even_where_the_rate_asks_for_more(choose: str):
    pool = lf.Pool.from_arrays(arm=[0] * 10, utility=np.arange(10.0))
    config = lf.LeadConfig(budget=10, rate=1.0, exclude_top=0.3, choose=choose, min_rounds=0)
    rnd = lf.LeadEngine(pool, config).begin_round()
    assert rnd is not None
    assert sorted(rnd.rows.tolist()) == list(range(7))


def test_the_last_round_is_cut_by_utility_with_ties_to_the_lower_row():
    # Rows 0 and 1 tie for the last place; row 1's task comes first.
    pool = lf.Pool.from_arrays(arm=[0] * 4, task=[1, 0, 1, 0], utility=[1.0, 1.0, 3.0, 2.0])
    rnd = lf.LeadEngine(pool, lf.LeadConfig(preset="paper", rate=1.0, budget=3)).begin_round()
    assert rnd is not None
    assert sorted(rnd.rows.tolist()) == [0, 2, 3]


def test_repeats_do_not_count_toward_the_budget():
    pool, utility = make_pool()
    engine = lf.LeadEngine(pool, lf.LeadConfig(preset="paper", budget=20, rate=0.1))
    rounds = run_script(engine, Script(utility), 1000)
    trained = [row for out in rounds for row in out[2]]
    assert len(set(trained)) == 20 < len(trained)
    assert max(Counter(trained).values()) <= 4
    assert engine.begin_round() is None and engine.progress == 1.0


def test_quarantined_rows_are_counted_once_and_never_come_back():
    pool = lf.Pool.from_arrays(arm=[0] * 4, utility=[4.0, 3.0, 2.0, 1.0])
    engine = lf.LeadEngine(pool, lf.LeadConfig(preset="paper", rate=0.5, budget=4))
    rnd = engine.begin_round()
    assert rnd is not None and sorted(rnd.rows.tolist()) == [0, 1]
    batch = [(row, loss, 3.0, 1.0) for row, loss in ((0, math.nan), (1, 2.5), (0, math.inf))]
    engine.observe(rows_of(batch), samples(batch))
    engine.step(lr=1e-3, num_items=9)
    report = engine.end_round()
    assert (report.num_samples, report.num_quarantined) == (1, 1)
    assert report.mean_loss == 2.5 and report.reward == pytest.approx(3.0 - (0.9 * 2.5 + 0.1 * 3.0))
    later = [row for _ in range(9) if (rnd := engine.begin_round()) and engine.end_round() for row in rnd.rows.tolist()]
    assert 0 not in later and {1, 2, 3} == set(later)


def test_several_arms_a_round_are_drawn_without_replacement():
    arm = np.repeat([0, 1, 2], 10)
    pool = lf.Pool.from_arrays(arm=arm, utility=np.ones(30))
    engine = lf.LeadEngine(pool, lf.LeadConfig(preset="paper", arms_per_round=2, rate=0.2, budget=1.0))
    rnd = engine.begin_round()
    assert rnd is not None
    uniforms = r.philox_uniform(0, r.ARM, 1, [0, 1])
    first = r.arm_of(np.full(3, 1 / 3), uniforms[0])
    second = r.arm_of(np.array([0.0 if k == first else 0.5 for k in range(3)]), uniforms[1])
    assert rnd.arms == [first, second] and rnd.arm == first
    assert Counter(arm[rnd.rows.numpy()].tolist()) == {first: 2, second: 2}
