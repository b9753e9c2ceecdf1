"""LeadTrainer: losses, gradients and statistics are those of the samples, and rounds are barriers."""

import copy
import dataclasses
import math
import re

import numpy as np
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from host_runs import (
    CHOICE,
    FIVE_ROWS,
    StopAfter,
    TokenRows,
    Watcher,
    alone,
    arguments,
    array_pool,
    lead_trainer,
    lora,
    tiny,
    watch,
)
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from transformers import TrainerCallback

import lead_fast as lf
from lead_fast.attention import PACKED_ATTENTION
from lead_fast.first_order import FirstOrder
from lead_fast.integrations.transformers import LeadTrainer

KINDS = [
    ("llama", {}),
    ("gemma2", {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 20.0, "sliding_window": 8}),
    ("gpt2", {}),
]


def assert_close_gradients(got, expected):
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = max(float(gradient.abs().max()), 1e-2)
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=[k for k, _ in KINDS])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient_checkpointing"])
def test_a_step_has_the_loss_and_gradient_of_its_samples_alone(kind, options, checkpointing, tmp_path):
    model, watcher = tiny(kind, **options), Watcher()
    start = copy.deepcopy(model)
    trainer = lead_trainer(
        tmp_path, model, callbacks=[watcher], max_grad_norm=0.0, gradient_accumulation_steps=3, max_steps=1,
        gradient_checkpointing=checkpointing, logging_strategy="steps", logging_steps=1, lead=FIVE_ROWS,
    )  # fmt: skip
    calls, attention = watch(trainer.engine), set()
    layers = [module for module in model.modules() if type(module).__name__.endswith("Attention")]
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, _: attention.add(module.config._attn_implementation))
    trainer.train()
    assert layers and attention == {PACKED_ATTENTION}  # when backward recomputes, too
    observed = [call for call in calls if call[0] == "observe"]
    rows = [row for _, some, _ in observed for row in some]
    assert len(observed) == 3 and len(rows) == len(set(rows)) == 5
    loss, losses, gradients = alone(start, TokenRows(), rows)
    np.testing.assert_allclose([x for _, _, some in observed for x in some], losses, rtol=2e-5)
    assert_close_gradients(watcher.gradients[0], gradients)
    assert next(line["loss"] for line in watcher.logs if "loss" in line) == pytest.approx(loss, rel=2e-5)


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["none", "non-reentrant", "reentrant"])
def test_adapters_learn_the_same_with_and_without_gradient_checkpointing(reentrant, tmp_path):
    model, watcher = lora(tiny()), Watcher()
    for name, parameter in model.named_parameters():  # B starts at 0, and would hide A's gradient
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    start = copy.deepcopy(model)
    options = {} if reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    if reentrant:
        model.enable_input_require_grads()
    trainer = lead_trainer(
        tmp_path,
        model,
        callbacks=[watcher],
        max_grad_norm=0.0,
        max_steps=1,
        gradient_checkpointing=reentrant is not None,
        **options,
    )
    calls = watch(trainer.engine)
    trainer.train()
    rows = [row for call in calls if call[0] == "observe" for row in call[1]]
    base = start.get_base_model()
    _, _, gradients = alone(base, TokenRows(), rows)
    prefixed = {f"base_model.model.{name}": gradient for name, gradient in gradients.items()}
    assert len(gradients) == 12
    assert_close_gradients(watcher.gradients[0], prefixed)


class Graphs(TrainerCallback):
    """How many graphs were compiled, after each step."""

    def __init__(self):
        self.after_step = []

    def on_step_end(self, *args, **kwargs):
        self.after_step.append(counters["stats"]["unique_graphs"])


@pytest.fixture
def fresh_accelerate():
    """accelerate keeps one compiler a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient_checkpointing"])
def test_torch_compile_compiles_the_layers(checkpointing, fresh_accelerate, tmp_path):
    """The run learns what it learns without; the first graphs serve batches of every length, and keys of weights stay."""
    found = {}
    for name, options in ("plain", {}), ("compiled", {"torch_compile_backend": "aot_eager"}):
        AcceleratorState._reset_state(reset_partial_state=True)
        torch._dynamo.reset()
        counters.clear()
        graphs = Graphs()
        trainer = lead_trainer(
            tmp_path / name, lora(tiny()), gradient_checkpointing=checkpointing, callbacks=[graphs], **options
        )
        calls = watch(trainer.engine)
        trainer.train()
        trainer.save_model(str(tmp_path / name))
        found[name] = calls, load_file(tmp_path / name / "adapter_model.safetensors"), graphs.after_step
    assert set(found["plain"][2]) == {0}
    graphs = found["compiled"][2]
    assert len(graphs) > 10 and len(set(graphs[2:])) == 1 and graphs[-1] >= 1
    assert graphs[-1] == 1 or not checkpointing  # a layer that is recomputed cannot be split
    assert [c[:2] for c in found["compiled"][0] if c[0] != "step"] == [c[:2] for c in found["plain"][0] if c[0] != "step"]
    assert len(found["plain"][0]) > 20
    torch.testing.assert_close(found["compiled"][1], found["plain"][1], rtol=1e-4, atol=1e-5)


def test_the_whole_model_is_never_compiled(fresh_accelerate, monkeypatch, tmp_path):
    """Nor where it is evaluated first, which would leave a compiled whole to training."""
    compiled, compile_function = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda what, **options: compiled.append(what) or compile_function(what, **options))
    trainer = lead_trainer(tmp_path, eval_dataset=[TokenRows()[0]] * 4, torch_compile_backend="aot_eager", max_steps=3)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] != before
    assert len(compiled) == 2 and not any(isinstance(what, torch.nn.Module) for what in compiled)  # the calls of both layers


def test_first_order_reads_layers_that_are_not_compiled(fresh_accelerate, tmp_path):
    lead = dataclasses.replace(CHOICE, estimator="first_order")
    with pytest.raises(ValueError, match="`torch_compile` must be False: first_order reads layers"):
        lead_trainer(tmp_path, lead=lead, torch_compile_backend="eager").train()


@pytest.mark.parametrize(("batch_size", "accumulation"), [(2, 2), (3, 1), (1, 4), (8, 3)])
def test_each_round_is_whole_before_the_next_begins(batch_size, accumulation, tmp_path):
    trainer = lead_trainer(tmp_path, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation)
    calls = watch(trainer.engine)
    result = trainer.train()
    seen, chosen, round_rows, micro = 0, set(), None, 0
    for call in calls:
        if call[0] == "begin":
            assert round_rows is None
            round_rows, left, micro = call[1], list(call[1]), 0
        elif call[0] == "observe":
            micro += 1
            assert 1 <= len(call[1]) <= batch_size
            assert call[1] == left[: len(call[1])]  # the round's own order
            left = left[len(call[1]) :]
        elif call[0] == "step":
            assert 1 <= micro <= accumulation
            micro, seen = 0, seen + 1
        else:
            assert not left and micro == 0
            chosen |= set(round_rows)
            round_rows = None
    assert calls[-1] == ("end",)
    assert seen == result.global_step and len(chosen) == trainer.engine.budget == 30
    items = [call[2] for call in calls if call[0] == "step"]
    rows = TokenRows()
    expected = sum(sum(x != -100 for x in rows[row]["labels"]) for call in calls if call[0] == "begin" for row in call[1])
    assert sum(items) == expected


def test_reading_ahead_of_a_round_is_an_error(tmp_path):
    trainer = lead_trainer(tmp_path)
    loader = trainer.get_train_dataloader()
    with pytest.raises(RuntimeError, match="nothing may read ahead of a round"):
        list(loader)
    trainer = lead_trainer(tmp_path)
    # What accelerate makes of a loader fetches one batch more than it gives: the reason why this one is not prepared.
    ahead = iter(trainer.accelerator.prepare(trainer.get_train_dataloader()))
    batches = len(next(iter(_opened(trainer))))
    with pytest.raises(RuntimeError, match="nothing may read ahead of a round"):
        for _ in range(batches):
            next(ahead)


def _opened(trainer):
    trainer._rounds.begin()
    yield trainer._rounds.open.micro_batches


@pytest.mark.parametrize(
    "lead",
    [CHOICE, lf.LeadConfig(budget=1.0, rate=0.5, min_rounds=0), lf.LeadConfig(preset="paper", budget=20, rate=0.3, max_uses=2)],
    ids=["robust", "everything", "paper"],
)
def test_the_run_ends_with_the_budget_whatever_was_estimated(lead, tmp_path):
    trainer = lead_trainer(tmp_path, lead=lead)
    estimate = trainer._rounds.estimated_steps()
    calls = watch(trainer.engine)
    trainer.train()
    steps = sum(call[0] == "step" for call in calls)
    assert trainer.engine.num_used == trainer.engine.budget
    assert trainer.state.global_step == trainer.state.max_steps == steps
    assert steps <= trainer._rounds.most_steps()
    if lead.budget == 1.0:
        assert steps > estimate  # arms run dry and rows repeat: the estimate must not cut the run short


def test_a_run_ends_when_no_row_is_left(tmp_path):
    trainer = lead_trainer(tmp_path, save_strategy="steps", save_steps=1000)
    end = trainer.engine.end_round

    def ending():
        trainer.engine.table.left.zero_()
        return end()

    trainer.engine.end_round = ending
    trainer.train()
    assert trainer.engine.num_rounds == 3 and trainer.state.global_step == trainer.state.max_steps == 6
    assert (tmp_path / "checkpoint-6").is_dir()


def test_max_steps_stops_a_run_inside_a_round_and_leaves_it_closed(tmp_path):
    trainer = lead_trainer(tmp_path, max_steps=4, gradient_accumulation_steps=1)  # rounds of three steps
    calls = watch(trainer.engine)
    trainer.train()
    names = [call[0] for call in calls]
    assert names.count("step") == 4 == trainer.state.global_step and names.count("begin") == names.count("end") == 2
    assert calls[-1] == ("end",) and trainer.engine.num_used < trainer.engine.budget
    trainer.engine.state_dict()


def test_a_skipped_step_moves_no_clock(tmp_path, monkeypatch):
    trainer = lead_trainer(tmp_path, max_steps=2)
    monkeypatch.setattr(type(trainer.accelerator), "optimizer_step_was_skipped", property(lambda self: True))
    calls = watch(trainer.engine)
    trainer.train()
    assert [call[1] for call in calls if call[0] == "step"] == [0.0, 0.0]


def test_a_nan_changes_no_weight_and_a_whole_round_of_them_ends_the_run(tmp_path):
    model = tiny()
    trainer = lead_trainer(tmp_path, model, max_steps=1)
    before = copy.deepcopy(model.state_dict())
    calls = watch(trainer.engine)

    def poison(module, inputs, output):
        output = output.clone()
        output[0, -2] = math.nan  # supervised, in the last sample of the micro-batch
        return output

    hook = model.model.norm.register_forward_hook(poison)
    with pytest.raises(RuntimeError, match="round 1: the loss of all its 2 rows is not finite"):
        trainer.train()
    hook.remove()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [call[1] for call in calls if call[0] == "step"] == [0.0]
    bad = [call[1][-1] for call in calls if call[0] == "observe"]
    assert not torch.isfinite(torch.tensor([call[2][-1] for call in calls if call[0] == "observe"])).any()
    assert int(trainer.engine.clocks.counters[2]) == len(bad)  # quarantined


class Masked(TokenRows):
    """The same rows, of which every third has nothing to learn from."""

    def __getitem__(self, row):
        entry = self.rows[row]
        return entry if row % 3 else entry | {"labels": [-100] * len(entry["input_ids"])}


def test_samples_that_would_leak_run_one_by_one_in_a_host_too(tmp_path):
    """By the attention that the model came with, when backward recomputes, too; after a step the host has its own again."""
    torch.manual_seed(0)
    config = transformers.BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0, attention_dropout=0)
    model = transformers.BloomForCausalLM(config)
    own, watcher = model.config._attn_implementation, Watcher()
    trainer = lead_trainer(tmp_path, model, callbacks=[watcher], max_steps=1, max_grad_norm=0.0, gradient_checkpointing=True)
    assert trainer._packed.one_by_one
    calls = watch(trainer.engine)
    before = copy.deepcopy(model)
    trainer.train()
    rows = [row for call in calls if call[0] == "observe" for row in call[1]]
    _, losses, gradients = alone(before, TokenRows(), rows)
    assert [x for call in calls if call[0] == "observe" for x in call[2]] == pytest.approx(losses, rel=1e-5)
    for name, gradient in watcher.gradients[0].items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-4, atol=1e-5)
    assert model.config._attn_implementation == own


@pytest.mark.parametrize("stop", [1, 2])
def test_a_resumed_round_knows_its_rows_with_nothing_to_learn_from(stop, tmp_path):
    """Of a round of such rows alone: nothing is wrong with it."""

    class Barren(TokenRows):
        def __getitem__(self, row):
            return self.rows[row] | {"labels": [-100] * len(self.rows[row]["input_ids"])}

    def run(callbacks=None):
        return lead_trainer(
            tmp_path, dataset=Barren(), callbacks=callbacks, gradient_accumulation_steps=1, save_strategy="steps",
            save_steps=100, logging_strategy="steps", max_grad_norm=0.0,
        )  # fmt: skip

    run([StopAfter(stop)]).train()
    resumed = run()
    resumed.train(resume_from_checkpoint=True)
    lines = [line for line in resumed.state.log_history if "lead/round" in line]
    assert len(lines) > 3 and not any(line["lead/quarantined"] for line in lines)


def test_rows_with_nothing_to_learn_from_are_chosen_once(tmp_path, caplog):
    trainer = lead_trainer(tmp_path, dataset=Masked(), lead=dataclasses.replace(CHOICE, budget=60), logging_strategy="steps")
    trainer.train()
    entries = {entry["row"]: len(entry["rounds"]) for entry in trainer.engine.selected()}
    barren = {row for row in entries if row % 3 == 0}
    assert len(barren) > 10 and all(entries[row] == 1 for row in barren)
    said = [int(n) for n in re.findall(r"round \d+: (\d+) of its \d+ rows have no supervised token", caplog.text)]
    assert sum(said) == len(barren)
    assert not any(line.get("lead/quarantined") for line in trainer.state.log_history)


def test_the_clock_has_the_learning_rate_of_what_is_trained(tmp_path, caplog):
    model = tiny()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD([{"params": parameters[:1], "lr": 0.0}, {"params": parameters[1:], "lr": 1e-2}])
    trainer = LeadTrainer(
        model, arguments(tmp_path, max_steps=2, lr_scheduler_type="constant"), train_dataset=TokenRows(), pool=array_pool(),
        lead=CHOICE, optimizers=(optimizer, None),
    )  # fmt: skip
    calls = watch(trainer.engine)
    trainer.train()
    assert [call[1] for call in calls if call[0] == "step"] == [1e-2, 1e-2]
    assert "the optimizer's beta1 is 0, and grad_norm takes it for 0.9; give LeadConfig(adam_beta1=0)" in caplog.text
    caplog.clear()
    lead_trainer(tmp_path, max_steps=1).train()
    assert "beta1" not in caplog.text


def test_first_order_sees_the_gradients_of_each_step(tmp_path, monkeypatch):
    follow = FirstOrder.follow
    monkeypatch.setattr(
        FirstOrder, "follow", lambda self, model, seed: follow(self, model, k=64, seed=seed)
    )  # k > width: exact
    models = []

    class Keeper(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            models.append(copy.deepcopy(model))

    lead = dataclasses.replace(FIVE_ROWS, estimator="first_order")
    trainer = lead_trainer(tmp_path, lora(tiny()), lead=lead, callbacks=[Keeper()], gradient_checkpointing=True, max_steps=2)
    calls = watch(trainer.engine)
    trainer.train()
    assert [call[0] for call in calls].count("begin") == 1  # one round of two steps
    steps = [[]]
    for call in calls:
        if call[0] == "observe":
            steps[-1] += call[1]
        elif call[0] == "step":
            steps.append([])
    now = {name: p.detach() for name, p in trainer.model.named_parameters()}
    for model, rows in zip(models, steps[:2], strict=True):
        for row in rows:
            gradients = alone(model, TokenRows(), [row])[2]
            change = sum(float((g * (now[name] - model.get_parameter(name)).detach()).sum()) for name, g in gradients.items())
            at = torch.tensor([row])
            seen = trainer.engine.table.values[0, trainer.engine.table.position[at].long()]
            assert float(trainer.engine.predicted_loss(at) - seen) == pytest.approx(change, rel=2e-3, abs=1e-5)


def test_estimators_may_watch_beside_the_one_that_chooses(tmp_path):
    trainer = lead_trainer(tmp_path, lora(tiny()))
    trainer.engine.shadow(["first_order", "historical"])
    trainer.train()
    last = trainer.engine.history[-1][1]
    seen = trainer.engine.table.values[0, trainer.engine.table.position[last].long()]
    for name in ("first_order", "historical"):  # the weights moved since the last round's rows were seen
        falls = seen - trainer.engine.predicted_loss(last, name)
        assert torch.isfinite(falls).all() and (falls != 0.0).all()
    with pytest.raises(ValueError, match="must train LoRA weights"):
        lead_trainer(tmp_path, lead=dataclasses.replace(CHOICE, estimator="first_order")).train()


def test_a_router_keeps_its_auxiliary_loss(tmp_path):
    model, watcher = tiny("mixtral", num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5), Watcher()
    start = copy.deepcopy(model)
    trainer = lead_trainer(
        tmp_path, model, callbacks=[watcher], max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=1,
        logging_strategy="steps", logging_steps=1,
    )  # fmt: skip
    calls = watch(trainer.engine)
    trainer.train()
    ((row,),) = [call[1] for call in calls if call[0] == "observe"]
    ids, labels = (torch.tensor(TokenRows()[row][name])[None] for name in ("input_ids", "labels"))
    start.train()
    own = start(input_ids=ids, labels=labels)
    assert float(own.aux_loss) > 0.1
    assert next(line["loss"] for line in watcher.logs if "loss" in line) == pytest.approx(own.loss.item(), rel=1e-5)


def test_mixed_precision_is_the_hosts(tmp_path):
    model = tiny()
    dtypes = set()
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *arguments: dtypes.add(arguments[-1].dtype))
    trainer = lead_trainer(tmp_path, model, bf16=True, max_steps=2)
    dtypes.clear()  # of the checks at the start
    calls = watch(trainer.engine)
    start = copy.deepcopy(model)
    trainer.train()
    assert dtypes == {torch.bfloat16}
    observed = next(call for call in calls if call[0] == "observe")
    np.testing.assert_allclose(observed[2], alone(start, TokenRows(), observed[1])[1], rtol=2e-2)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_a_second_training_needs_a_new_trainer(tmp_path):
    trainer = lead_trainer(tmp_path, max_steps=1)
    trainer.train()
    with pytest.raises(RuntimeError, match="make a new trainer"):
        trainer.train()
