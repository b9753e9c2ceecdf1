"""Checkpoints: what is written is read back bit for bit, what is damaged is not used, what does not belong is refused."""

import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from lead_fast import resume
from lead_fast.checkpoint import CheckpointError, Checkpoints
from lead_fast.config import LeadConfig, TrainConfig
from lead_fast.engine import LeadEngine
from lead_fast.interrupts import StopSignals
from lead_fast.loading import prepare_model
from lead_fast.lora import add_lora
from lead_fast.optimization import Optimization, TrainingError
from lead_fast.packing import Sample
from lead_fast.pool import Pool
from lead_fast.resume import Checkpointer, RoundLog
from lead_fast.signals import Signals
from lead_fast.trainer import TrainingRun, run_rounds
from lead_fast.training_state import TrainingState, seed_generators

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8,
          torch.uint8, torch.bool)  # fmt: skip


def mixed_state(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random_bits(dtype, *shape):
        numbers = torch.randint(0, 2, shape, generator=generator) if dtype == torch.bool else 100 * torch.randn(
            shape, generator=generator)  # fmt: skip
        return numbers.to(dtype)

    return {
        "weights": {f"layer.{i}.{dtype}": random_bits(dtype, 3, i + 1) for i, dtype in enumerate(DTYPES)},
        "odd": {
            "scalar": torch.tensor(math.nan), "empty": torch.zeros(0, 5), "transposed": random_bits(torch.float32, 4, 6).t(),
            "slice": random_bits(torch.int16, 10)[2:7], "nested": {"a": {"b": random_bits(torch.float64, 2)}, "c": {}},
            "groups": [{"lr": 0.1, "moment": random_bits(torch.float32, 3)}, {"lr": 1e-300}],
        },
        "numbers": {"none": None, "true": True, "int": 2**70, "float": 0.1 + 0.2, "tiny": 5e-324, "text": "ü\n",
                    "list": [1, "a"], "nan": math.nan, "inf": [math.inf, -math.inf]},
    }  # fmt: skip


def same(one, two):
    if isinstance(one, torch.Tensor):
        bits = one.dtype == two.dtype and one.shape == two.shape
        return bits and one.contiguous().numpy(force=True).tobytes() == two.contiguous().numpy(force=True).tobytes() \
            if one.dtype != torch.bfloat16 else bits and same(one.view(torch.int16), two.view(torch.int16))  # fmt: skip
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[k], two[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return type(one) is type(two) and (one == two or (one != one and two != two))


def flip(path, position=-1):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


# The files


def test_a_state_is_read_back_bit_for_bit(tmp_path):
    state = mixed_state()
    path = Checkpoints(tmp_path / "checkpoints").write(7, state)
    loaded = Checkpoints(tmp_path / "checkpoints").load()
    assert loaded.path == path and path.name == "step-00000007"
    assert same(loaded.state, state)
    # Any reader of the format reads the same.
    assert same(load_file(path / "weights.safetensors"), state["weights"])
    assert {p.name for p in path.iterdir()} == {"weights.safetensors", "odd.safetensors", "state.json", "manifest.json"}


def test_equal_states_are_equal_files(tmp_path):
    state = mixed_state()
    backwards = {part: dict(reversed(value.items())) for part, value in state.items()}
    one, two = (Checkpoints(tmp_path / n).write(1, s) for n, s in (("one", state), ("two", backwards)))
    for path in one.glob("*.safetensors"):
        assert path.read_bytes() == (two / path.name).read_bytes()


@pytest.mark.parametrize(
    ("value", "message"),
    [({1: 2}, "keys of 'part'"), ({"a/b": 1}, "keys of 'part'"), ({"a": [torch.zeros(1)]}, "part/a/0"), ({"a": {3}}, "part/a")],
)
def test_what_has_no_place_in_the_format_is_refused(value, message, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.write(1, mixed_state())
    with pytest.raises(TypeError, match=message):
        checkpoints.write(2, {"good": {"tensor": torch.zeros(3)}, "part": value})
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_two_are_kept_and_leftovers_go(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 5, 9):
        checkpoints.write(step, mixed_state(step))
    assert [p.name for p in checkpoints.paths()] == ["step-00000005", "step-00000009"]
    for name in (".step-00000010.writing", ".step-00000005.deleting"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.safetensors").write_bytes(b"half")
    assert same(checkpoints.load().state, mixed_state(9))
    checkpoints.remove_leftovers()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000005", "step-00000009"]


FILES = ("weights.safetensors", "odd.safetensors", "state.json", "manifest.json")
DAMAGE = {
    "first byte": lambda path: flip(path, 0),
    "last byte": lambda path: flip(path, -2),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(file, damage, tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.write(step, mixed_state(step))
    path = tmp_path / "step-00000002" / file
    DAMAGE[damage](path)
    loaded = checkpoints.load()
    assert loaded.path.name == "step-00000001" and same(loaded.state, mixed_state(1))
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert str(path) in message and "expected" in message and "got" in message
    if file != "manifest.json":
        expected = json.loads((tmp_path / "step-00000002" / "manifest.json").read_text())["files"][file]["sha256"]
        assert f"expected sha256 {expected}" in message
    checkpoints.set_aside_newer(loaded.path)
    assert [p.name for p in checkpoints.paths()] == ["step-00000001"]
    checkpoints.write(2, mixed_state(3))
    assert same(checkpoints.load().state, mixed_state(3))


def test_every_byte_of_the_manifest_counts(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.write(1, {"numbers": {"one": 1}}) / "manifest.json"
    for position in range(path.stat().st_size):
        flip(path, position)
        with pytest.raises(CheckpointError, match="manifest"):
            checkpoints.load()
        flip(path, position)
    assert checkpoints.load() is not None


def test_no_usable_checkpoint_is_an_error_that_names_each(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.load() is None
    for step in (1, 2):
        flip(checkpoints.write(step, mixed_state()) / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"no checkpoint is usable.*step-00000002.*step-00000001"):
        checkpoints.load()


def test_another_version_of_the_format_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("lead_fast.checkpoint.FORMAT", "lead-fast checkpoint 0")
    Checkpoints(tmp_path).write(1, mixed_state())
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="expected the format 'lead-fast checkpoint 2', got 'lead-fast checkpoint 0'"):
        Checkpoints(tmp_path).load()


# The state of a training


CONFIG = TrainConfig(step_tokens=24, max_grad_norm=1.0, learning_rate=1e-2)
ROWS = 40
PARTS = ("weights", "optimizer", "engine", "random", "identity")


def small_pool(shift=0.0):
    r = np.random.default_rng(0)
    return Pool.from_arrays(
        arm=np.where(np.arange(ROWS) < 3, 0, 1 + np.arange(ROWS) % 2),
        task=np.arange(ROWS) % 2,
        utility=(r.random(ROWS) + 1 + shift).astype(np.float32),
    )


def sample_of(row):
    r = np.random.default_rng(row)
    ids = r.integers(1, 40, size=8 + row % 5)
    return Sample(ids, np.arange(len(ids)) >= 3, np.ones(len(ids), bool))


def make(tuning="lora", estimator="grad_norm", reward="drop", *, base_seed=0, shift=0.0):
    """Engine and model of a training whose steps draw random numbers (dropout)."""
    torch.manual_seed(base_seed)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
    model = prepare_model(LlamaForCausalLM(LlamaConfig(**shape, attention_dropout=0.2)))
    if tuning == "lora":
        model = add_lora(model, rank=2, alpha=4.0, seed=0)
    optimization = Optimization(model, Accelerator(cpu=True), CONFIG)
    lead = LeadConfig(
        budget=ROWS, rate=0.4, min_rounds=0, max_uses=1, exclude_top=0.0, reward=reward, estimator=estimator, seed=3
    )
    engine = LeadEngine(small_pool(shift), lead)
    return TrainingState(engine, optimization, Signals(engine))


class Stop(Exception):
    pass


def train(state, run=None, *, until=lambda run: False):
    """Trains to the end, or to the first boundary at which `until(run)`."""

    def at_boundary(now):
        nonlocal stopped
        if until(now):
            stopped = now
            raise Stop

    stopped = TrainingRun()
    arguments = (state.engine, state.optimization, lambda rows: [sample_of(row) for row in rows], CONFIG)
    try:
        return run_rounds(*arguments, run=run, at_boundary=at_boundary)
    except Stop:
        return stopped


def two_steps(run):
    return run.num_steps == 2


@pytest.mark.parametrize("inside", [True, False], ids=["inside a round", "between rounds"])
@pytest.mark.parametrize(
    ("tuning", "estimator", "reward"),
    [(t, *method) for t in ("lora", "full") for method in (("grad_norm", "drop"), ("historical", "idu"))]
    + [("lora", "first_order", "drop")],
)
def test_a_run_goes_on_from_a_file_as_if_nothing_had_happened(tuning, estimator, reward, inside, tmp_path):
    method = tuning, estimator, reward
    seed_generators(5)
    whole = make(*method)
    end = train(whole)
    assert len(end.rounds) >= 6 and end.num_steps > len(end.rounds)
    expected = whole.capture(end)

    seed_generators(5)
    first = make(*method)

    def place(run):  # an arm has nothing more to give
        return len(run.rounds) >= 3 and (run.open is not None) == inside and bool((first.engine.table.left == 0).any())

    half = train(first, until=place)
    assert place(half) and half.num_steps < end.num_steps
    Checkpoints(tmp_path).write(half.num_steps, first.capture(half))

    seed_generators(77)  # as in another process
    second = make(*method)
    loaded = Checkpoints(tmp_path).load().state
    run = second.restore(loaded, half.rounds)
    again = second.capture(run)
    for part in PARTS:
        assert same(again[part], loaded[part]), part
    resumed = train(second, run)
    one, two = (
        [{k: v for k, v in r.items() if k not in ("seconds", "performance")} for r in rounds]
        for rounds in (resumed.rounds, end.rounds)
    )
    assert one == two
    captured = second.capture(resumed)
    for part in PARTS:
        assert same(captured[part], expected[part]), part
    assert not same(loaded["random"]["0"]["torch"], captured["random"]["0"]["torch"])  # dropout drew


def test_the_gradient_scaler_is_part_of_the_state(tmp_path):
    one, two = make(), make()
    for state, scale in ((one, 512.0), (two, 2.0)):
        state.optimization.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=7)
    run = train(one, until=two_steps)
    Checkpoints(tmp_path).write(2, one.capture(run))
    two.restore(Checkpoints(tmp_path).load().state, [])
    assert two.optimization.accelerator.scaler.state_dict() == one.optimization.accelerator.scaler.state_dict()
    assert two.optimization.accelerator.scaler.get_scale() == 512.0
    three = make()
    with pytest.raises(ValueError, match="scaler: True, got False"):
        three.restore(Checkpoints(tmp_path).load().state, [])


def test_which_implementation_of_adamw_runs_is_the_device_s_own():
    """A run of a GPU, whose AdamW is one kernel, goes on on a CPU as a run of a CPU does."""
    state = make()
    saved = state.capture(train(state, until=two_steps))
    for group in saved["optimizer"]["groups"]:
        group["fused"] = True
    again = make()
    again.restore(saved, [])
    assert all(group["fused"] is None for group in again.optimization.optimizer.param_groups)


def test_generators_go_on_where_they_were(tmp_path):
    seed_generators(1)
    random.gauss(0, 1)
    np.random.standard_normal()
    state = make()
    torch.manual_seed(9)
    Checkpoints(tmp_path).write(1, state.capture(TrainingRun()))

    def draw():
        return random.gauss(0, 1), random.random(), np.random.standard_normal(), np.random.random(), float(torch.rand(()))

    expected = draw()
    seed_generators(2)
    state.restore(Checkpoints(tmp_path).load().state, [])
    assert draw() == expected


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"base_seed": 1}, "frozen weights must be those the run began with"),
        ({"shift": 0.5}, "pool must be those the run began with"),
        ({"tuning": "full"}, "frozen weights"),
    ],
)
def test_another_model_or_pool_is_refused(other, message, tmp_path):
    state = make()
    Checkpoints(tmp_path).write(2, state.capture(train(state, until=two_steps)))
    loaded = Checkpoints(tmp_path).load().state
    with pytest.raises(ValueError, match=message):
        make(**other).restore(loaded, [])


def test_other_parameters_are_refused():
    one, two = make("full"), make("full")
    saved = one.capture(train(one, until=two_steps))
    name = next(iter(saved["weights"]))
    for change, message in (
        (lambda w: w.pop(name), "1 others, as"),
        (lambda w: w.update({name: torch.zeros(3)}), rf"{name} must be torch.float32 \[40, 16\], got torch.float32 \[3\]"),
    ):
        weights = dict(saved["weights"])
        change(weights)
        with pytest.raises(ValueError, match=message):
            two.restore(saved | {"weights": weights}, [])


def test_weights_that_are_not_finite_are_not_kept(tmp_path):
    state = make()
    run = train(state, until=two_steps)
    name, parameter = next((n, p) for n, p in state.optimization.bare.named_parameters() if p.requires_grad)
    parameter.data.view(-1)[0] = math.inf
    with pytest.raises(TrainingError, match=f"{name} holds NaN or infinity"):
        state.capture(run)


def test_one_number_of_any_stride_is_saved(tmp_path):
    odd = torch.arange(5.0).view(5, 1)[:1].as_strided((1,), (5,))
    path = Checkpoints(tmp_path).write(1, {"run": {"odd": odd}})
    assert torch.equal(Checkpoints(tmp_path).load().state["run"]["odd"], odd), path


def test_checkpoints_that_a_launcher_would_cut_are_told_once(tmp_path, monkeypatch, caplog):
    ranks = SimpleNamespace(world=2, is_first=True, on_first=lambda write: write())
    optimization = SimpleNamespace(ranks=ranks, is_zero=False)
    state = SimpleNamespace(optimization=optimization, capture=lambda run: mixed_state(run.num_steps))
    run = TrainingRun()
    checkpointer = Checkpointer(Checkpoints(tmp_path), state, TrainConfig(), RoundLog(None), StopSignals(), run, 0.0)
    for grace, told in ((60.0, 0), (0.0, 1), (0.0, 1)):
        monkeypatch.setattr(resume, "_LAUNCHER_GRACE", grace)
        run.num_steps += 1
        checkpointer.write(run)
        assert caplog.text.count("launchers kill processes") == told
