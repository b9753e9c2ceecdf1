"""What a round and its report hold: of what the engine was then, whenever it is read, and whatever an estimator adds."""

import copy

import numpy as np
import pytest
import torch
from test_engine_from_spec import Script, make_pool, rows_of, samples
from torch.utils._python_dispatch import TorchDispatchMode

import lead_fast as lf
from lead_fast.reference_state import STREAM_TASKS
from lead_fast.rng import philox_uniform

OPTIONS = {"budget": 1.0, "max_uses": 3, "rate": 0.1, "min_rounds": 15}


class Operators(TorchDispatchMode):
    """Names what is dispatched."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def make(**options):
    pool, utility = make_pool()
    engine, script = lf.LeadEngine(pool, lf.LeadConfig(**OPTIONS | options)), Script(utility)
    engine.record_visits = True
    engine.track(script.weights)
    return engine, script


def play(engine, script):
    rnd = engine.begin_round()
    for step in script.round(rnd.number, rnd.rows.tolist()):
        for batch in step.batches:
            engine.observe(rows_of(batch), samples(batch))
        script.move_weights(rnd.number, step.lr)
        engine.step(lr=step.lr, num_items=step.num_items)
    return engine.end_round()


def contents(report):
    visits = {name: column.tolist() for name, column in report.visits.items()}
    return repr((report.rewards, report.scaled_rewards, report.log_weights.tolist(), report.num_samples, report.mean_loss,
                 report.quarantined, report.calibration, visits))  # fmt: skip


@pytest.mark.parametrize("estimator", ["grad_norm", "historical", "none"])
def test_a_report_says_the_same_whenever_it_is_read(estimator):
    (now, one), (later, two) = make(estimator=estimator), make(estimator=estimator)
    at_once, reports = [contents(play(now, one)) for _ in range(12)], [play(later, two) for _ in range(12)]
    assert [contents(report) for report in reports] == at_once
    assert contents(copy.deepcopy(reports[3])) == at_once[3]


def test_log_weights_that_are_kept_keep_nothing_else():
    kept = play(*make()).log_weights
    assert kept.untyped_storage().nbytes() == kept.nbytes


def test_a_budget_that_cuts_a_round_is_used_up_and_no_more():
    engine, _ = make(budget=0.2, min_rounds=0, rate=0.4, max_uses=1)
    sizes = []
    while (rnd := engine.begin_round()) is not None:
        sizes.append(len(rnd))
        engine.end_round()
    assert engine.num_used == engine.budget == sum(sizes) and len(engine.selected()) == engine.budget


def test_every_arm_of_a_round_has_its_own_place_among_its_tasks():
    engine, _ = make(arms_per_round=2, visit_all_first=False)
    for _ in range(8):
        rnd = engine.begin_round()
        expected = philox_uniform(engine.config.seed, STREAM_TASKS, rnd.number, torch.tensor(rnd.arms))
        assert rnd.task_uniforms == expected.tolist() and len(set(rnd.task_uniforms)) == len(rnd.arms) == 2
        engine.end_round()


def test_candidates_are_asked_for_of_the_arms_that_were_drawn_alone():
    engine, _ = make(visit_all_first=False)
    engine.record_candidates = True
    rnd = engine.begin_round()
    everything = [(row, float("nan"), 3.0, 1.0) for row in range(len(engine.pool))]
    engine.observe(rows_of(everything), samples(everything))  # each is set aside
    engine.end_round()
    assert len(rnd) and engine.begin_round() is None


def test_numbers_of_a_step_may_be_tensors():
    (one, _), (two, _) = make(), make()
    for engine, number, operator in ((one, float, "step_by_numbers"), (two, torch.tensor, "step")):
        engine.begin_round()
        with Operators() as called:
            engine.step(lr=1e-3, num_items=number(77.0))
        assert operator in called.names  # a tensor goes to its kernel: as a number, a device would be waited for
    assert torch.equal(one.clocks.clock, two.clocks.clock)


@lf.register_estimator
class Odd(lf.LossChangeEstimator):
    """Tensors as users make them: expanded, strided, in other precisions, with a gradient, under a report's own names."""

    name = "odd"

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.level = torch.nn.Parameter(torch.tensor(0.125, dtype=torch.float64))
        self.table = torch.arange(12, dtype=torch.float32).view(4, 3)

    def drop(self, table, clocks, at):
        return self.level.expand(len(at))

    def snapshot(self, clocks):
        column = self.table[:, 0]
        return {"rewards": column, "summary": column[:1].bfloat16(), "level": self.level, "none": column[:0]}

    def describe(self, snapshot):
        return {name: value.tolist() for name, value in snapshot.items()}


@lf.register_estimator
class Unfit(lf.LossChangeEstimator):
    name = "unfit"

    def snapshot(self, clocks):
        return {"rate": 0.5}


@pytest.mark.parametrize("place", ["in charge", "shadow"])
def test_an_estimator_s_tensors_may_be_of_any_kind(place):
    pool, utility = make_pool()
    options = OPTIONS | ({"estimator": "odd"} if place == "in charge" else {})
    engine, script = lf.LeadEngine(pool, lf.LeadConfig(**options)), Script(utility)
    engine.record_visits = True
    if place == "shadow":
        engine.shadow(["odd"])
    for _ in range(3):
        report = play(engine, script)
        seen, predicted = report.visits["seen_loss"], report.visits["predicted.odd"]
        assert predicted.dtype == torch.float32
        np.testing.assert_allclose(predicted.numpy(), seen.numpy() - 0.125, rtol=1e-6)
        assert not report.log_weights.requires_grad and report.num_samples > 1
    if place == "in charge":
        assert report.calibration == {"rewards": [0.0, 3.0, 6.0, 9.0], "summary": [0.0], "level": 0.125, "none": []}
        assert len(report.rewards) == 1


def test_a_snapshot_that_holds_no_tensors_is_named():
    engine, _ = make(estimator="unfit")
    engine.begin_round()
    with pytest.raises(TypeError, match=r"Unfit\.snapshot: `rate` must be a tensor, got float"):
        engine.end_round()
