"""A run that stops at a checkpoint and resumes is the run that was not interrupted."""

import pytest
import torch
from host_runs import CHOICE, StopAfter, TokenRows, array_pool, lead_trainer, lora, tiny, words_tokenizer
from safetensors.torch import load_file, save_file
from transformers import DataCollatorForSeq2Seq

import lead_fast as lf


def trainer(folder, estimator, callbacks=None, **options):
    lead = lf.LeadConfig(budget=30, rate=0.5, min_rounds=5, estimator=estimator)
    # Dropout draws from the generator whose state the host saves.
    return lead_trainer(
        folder, lora(tiny(), dropout=0.3), lead=lead, callbacks=callbacks, gradient_accumulation_steps=1,
        per_device_train_batch_size=2, logging_strategy="steps", logging_steps=1, lr_scheduler_type="cosine", warmup_steps=3,
        **options,
    )  # fmt: skip


def outcome(run):
    rounds = [{k: v for k, v in line.items() if k != "step"} for line in run.state.log_history if "lead/round" in line]
    losses = [(line["step"], line["loss"], line["learning_rate"]) for line in run.state.log_history if "loss" in line]
    return run.engine.selected(), rounds, losses, run.state.global_step


@pytest.mark.parametrize("estimator", ["grad_norm", "historical", "first_order"])
@pytest.mark.parametrize("step", [4, 6, 8], ids=["in a round", "at its end", "in another"])
def test_a_resumed_run_is_identical(estimator, step, tmp_path):
    whole = trainer(tmp_path / "whole", estimator)
    whole.train()
    stopped = trainer(tmp_path / "parts", estimator, [StopAfter(step)], save_strategy="steps", save_steps=1000)
    stopped.train()
    inside = whole.state.log_history  # rounds of three steps: 4 and 8 are inside one
    assert [line["step"] for line in inside if "lead/round" in line][:2] == [3, 6]
    resumed = trainer(tmp_path / "parts", estimator, save_strategy="steps", save_steps=1000)
    resumed.train(resume_from_checkpoint=True)
    assert outcome(resumed) == outcome(whole)
    ours, theirs = (dict(run.model.named_parameters()) for run in (resumed, whole))
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in ours.items())
    assert resumed.state.max_steps == whole.state.max_steps == whole.state.global_step


def test_every_checkpoint_of_a_run_resumes_to_its_end(tmp_path):
    whole = trainer(tmp_path, "grad_norm", save_strategy="steps", save_steps=1)
    whole.train()
    for step in (1, 2, 3, whole.state.global_step):
        resumed = trainer(tmp_path / "again", "grad_norm")
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert resumed.engine.selected() == whole.engine.selected()
        theirs = dict(whole.model.named_parameters())
        assert all(torch.equal(p, theirs[name]) for name, p in resumed.model.named_parameters())


def test_a_run_may_be_interrupted_twice_in_one_round(tmp_path):
    whole = trainer(tmp_path / "whole", "historical")
    whole.train()
    for step in (4, 5, None):  # both inside the second round
        callbacks = None if step is None else [StopAfter(step)]
        run = trainer(tmp_path / "parts", "historical", callbacks, save_strategy="steps", save_steps=1000)
        run.train(resume_from_checkpoint=None if step == 4 else True)
    assert outcome(run) == outcome(whole)
    theirs = dict(whole.model.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in run.model.named_parameters())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    lead_trainer(folder, callbacks=[StopAfter(3)], save_strategy="steps", save_steps=1000).train()
    return folder / "checkpoint-3"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lead": lf.LeadConfig(budget=30, rate=0.3, min_rounds=6, seed=1)}, r"seed \(began with 0, got 1\)"),
        ({"gradient_accumulation_steps": 1}, r"accumulation \(began with 2, got 1\)"),
        ({"pool": array_pool(seed=1)}, "pool .*changed"),
    ],
    ids=["seed", "accumulation", "pool"],
)
def test_other_settings_are_refused(options, message, checkpoint, tmp_path):
    with pytest.raises(ValueError, match=message):
        lead_trainer(tmp_path, **options).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("name", ["lead_state.safetensors", "optimizer.pt", "scheduler.pt"])
def test_a_checkpoint_that_is_not_whole_is_refused(name, checkpoint, tmp_path):
    """The host itself goes on without an optimizer's state, and says nothing."""
    (checkpoint / name).rename(tmp_path / "moved")
    try:
        with pytest.raises(ValueError, match=rf"{checkpoint.name} holds no {name}: it was not written to its end"):
            lead_trainer(tmp_path).train(resume_from_checkpoint=str(checkpoint))
    finally:
        (tmp_path / "moved").rename(checkpoint / name)


def test_save_only_model_saves_no_engine(tmp_path):
    lead_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2, save_only_model=True).train()
    assert (tmp_path / "checkpoint-2").is_dir()
    assert not list(tmp_path.rglob("lead_state.safetensors"))


def test_the_state_has_no_pickle(checkpoint):
    data = (checkpoint / "lead_state.safetensors").read_bytes()
    header = int.from_bytes(data[:8], "little")
    assert data[8:9] == b"{" and len(data) > 8 + header
    assert CHOICE.resolve().preset.encode() in data[8 : 8 + header]
    assert len(TokenRows()) == 60


def experts(kind="mixtral"):
    shape = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return tiny(kind, **shape)


def test_experts_are_restored_which_are_saved_under_other_names(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1000, "logging_strategy": "steps", "logging_steps": 1}
    whole = lead_trainer(tmp_path / "whole", experts(), **options)
    whole.train()
    stopped = lead_trainer(tmp_path / "parts", experts(), callbacks=[StopAfter(4)], **options)
    stopped.train()
    resumed = lead_trainer(tmp_path / "parts", experts(), **options)
    resumed.train(resume_from_checkpoint=True)
    assert outcome(resumed) == outcome(whole)
    theirs = dict(whole.model.named_parameters())
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in resumed.model.named_parameters())


def test_the_best_experts_are_loaded_at_the_end(tmp_path):
    trainer = lead_trainer(
        tmp_path, experts("qwen3_moe"), eval_dataset=TokenRows(1), eval_strategy="steps", eval_steps=2, save_strategy="steps",
        save_steps=2, load_best_model_at_end=True, learning_rate=0.3, data_collator=DataCollatorForSeq2Seq(words_tokenizer()),
    )  # fmt: skip
    trainer.train()
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert min(losses) < losses[-1]  # so that there is a better one than the last
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)


def test_a_checkpoint_without_some_weights_is_an_error(tmp_path):
    stopped = lead_trainer(tmp_path, experts(), callbacks=[StopAfter(2)], save_strategy="steps", save_steps=1000)
    stopped.train()
    path = tmp_path / "checkpoint-2" / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=r"expected all weights of MixtralForCausalLM, got none for .*q_proj"):
        lead_trainer(tmp_path, experts(), save_strategy="steps").train(resume_from_checkpoint=True)
