"""LeadTrainer: callbacks, logs, schedules, evaluation and data are what the host's users know."""

import math

import pytest

pytest.importorskip("datasets", reason="some of the host's data sets are those of datasets, which is not installed")

import numpy as np
import torch
from datasets import Dataset
from host_runs import FIVE_ROWS, TokenRows, Watcher, arguments, array_pool, lead_trainer, tiny, watch, words_tokenizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq, Trainer, TrainerCallback

import lead_fast as lf
from lead_fast.integrations.transformers import LeadTrainer
from lead_fast.packing import ChatEncoder


def test_callbacks_logs_and_saves_are_the_hosts(tmp_path):
    watcher = Watcher()
    trainer = lead_trainer(
        tmp_path, callbacks=[watcher], logging_strategy="steps", logging_steps=1, eval_dataset=TokenRows(1),
        eval_strategy="steps", eval_steps=7, save_strategy="steps", save_steps=5, per_device_eval_batch_size=1,
    )  # fmt: skip
    trainer.train()
    steps = trainer.state.global_step
    assert watcher.events.count("step_begin") == watcher.events.count("step_end") == steps == trainer.state.max_steps
    losses = [line for line in watcher.logs if "loss" in line]
    rounds = [line for line in watcher.logs if "lead/round" in line]
    assert len(losses) == steps  # no line of the host's is lost to a round's
    assert [line["lead/round"] for line in rounds] == list(range(1, trainer.engine.num_rounds + 1))
    assert sum(line["lead/steps"] for line in rounds) == steps
    for line in rounds:
        assert {"lead/arm", "lead/reward", "lead/scaled_reward", "lead/mean_loss", "lead/samples", "lead/tokens",
                "lead/supervised_tokens", "lead/rows_used", "lead/progress"} <= line.keys()  # fmt: skip
        assert sum(line[f"lead/prob_{arm}"] for arm in range(3)) == pytest.approx(1.0)
    assert rounds[-1]["lead/progress"] == 1.0 and rounds[-1]["lead/rows_used"] == 30
    assert [h for h in trainer.state.log_history if "lead/round" in h][-1]["step"] == steps
    assert watcher.events.count("evaluate") == math.ceil(steps / 7)
    saved = sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*"))
    assert saved == sorted({*range(5, steps, 5), steps})
    assert all((tmp_path / f"checkpoint-{step}" / "lead_state.safetensors").exists() for step in saved)
    epochs = [line["epoch"] for line in losses]
    assert epochs == sorted(epochs) and epochs[-1] == 1.0


def test_the_bar_knows_the_end_when_the_last_round_begins(tmp_path, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "0")
    totals = []

    class Bar(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            (bar,) = [c.training_bar for c in trainer.callback_handler.callbacks if hasattr(c, "training_bar")]
            totals.append((bar.n, bar.total, state.max_steps))

    trainer = lead_trainer(tmp_path, callbacks=[Bar()], disable_tqdm=False)
    trainer.train()
    assert all(total == end > done for done, total, end in totals)
    assert totals[-1][1] == trainer.state.global_step


class Epochs(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(state.epoch)


def test_every_callback_sees_the_share_of_the_budget(tmp_path):
    given, added = Epochs(), Epochs()
    trainer = lead_trainer(tmp_path, callbacks=[given])
    trainer.add_callback(added)
    trainer.train()
    assert given.seen == added.seen and given.seen[-1] == 1.0 and given.seen[0] > 0.0


def test_no_logging_means_none(tmp_path):
    watcher = Watcher()
    lead_trainer(tmp_path, callbacks=[watcher], logging_strategy="no").train()
    assert not [line for line in watcher.logs if "lead/round" in line]


def test_the_schedule_runs_on_progress(tmp_path):
    trainer = lead_trainer(tmp_path, logging_strategy="steps", logging_steps=1, learning_rate=1e-2)
    calls = watch(trainer.engine)
    trainer.train()
    used, progress, inside = 0, [], []
    distinct = set()
    for call in calls:
        if call[0] == "begin":
            used, inside = len(distinct), []
            distinct |= set(call[1])
        elif call[0] == "step":
            inside.append(call[1])
        elif call[0] == "end":
            progress += [(used + (len(distinct) - used) * i / len(inside)) / 30 for i in range(len(inside))]
    rates = [call[1] for call in calls if call[0] == "step"]
    np.testing.assert_allclose(rates, [1e-2 * (1.0 - p) for p in progress], rtol=1e-6)
    logged = [h["learning_rate"] for h in trainer.state.log_history if "learning_rate" in h]
    np.testing.assert_allclose(rates, logged, rtol=1e-9)


def test_with_max_steps_the_schedule_is_the_hosts(tmp_path):
    trainer = lead_trainer(tmp_path, max_steps=5, learning_rate=1e-2)
    calls = watch(trainer.engine)
    trainer.train()
    np.testing.assert_allclose([call[1] for call in calls if call[0] == "step"], [1e-2 * (1 - i / 5) for i in range(5)])


def test_a_schedule_of_the_users_is_left_alone(tmp_path):
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = LambdaLR(optimizer, lambda step: 0.5**step)
    trainer = lead_trainer(tmp_path, model, max_steps=-1)
    trainer.optimizer, trainer.lr_scheduler = optimizer, schedule
    calls = watch(trainer.engine)
    trainer.train()
    rates = [call[1] for call in calls if call[0] == "step"]
    np.testing.assert_allclose(rates, [0.5 * 0.5**i for i in range(len(rates))])


@pytest.mark.parametrize("side", ["left", "right"])
def test_evaluation_is_the_hosts(side, tmp_path):
    tokenizer = words_tokenizer()
    tokenizer.padding_side = side
    model = tiny()
    own, collator, held_out = model.config._attn_implementation, DataCollatorForSeq2Seq(tokenizer), TokenRows(1)
    seen = []
    trainer = lead_trainer(
        tmp_path, model, eval_dataset=held_out, data_collator=collator, max_steps=1, per_device_eval_batch_size=4
    )
    model.model.register_forward_pre_hook(lambda *_: seen.append(model.config._attn_implementation))
    trainer.train()
    assert set(seen) != {own} and model.config._attn_implementation == own
    seen.clear()
    got = trainer.evaluate()["eval_loss"]
    assert set(seen) == {own}
    host = Trainer(model, trainer.args, eval_dataset=held_out, data_collator=collator)
    assert got == host.evaluate()["eval_loss"]
    trainer.save_model(str(tmp_path / "saved"))
    assert "lead_fast" not in (tmp_path / "saved" / "config.json").read_text()


def test_the_hosts_collator_makes_the_labels(tmp_path):
    tokenizer = words_tokenizer()
    rows = TokenRows()
    for row in rows.rows:
        del row["labels"]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False, pad_to_multiple_of=16)
    trainer = lead_trainer(tmp_path, dataset=rows, data_collator=collator, max_steps=1)
    calls = watch(trainer.engine)
    trainer.train()
    expected = sum(len(rows[row]["input_ids"]) - 1 for call in calls if call[0] == "observe" for row in call[1])
    assert [call[2] for call in calls if call[0] == "step"] == [expected]


@pytest.mark.parametrize("kind", ["datasets", "list"])
def test_columns_that_the_model_does_not_take_are_left_out(kind, tmp_path):
    rows = TokenRows()
    for number, row in enumerate(rows.rows):
        row["source"] = f"name {number}"
    dataset = rows if kind == "list" else Dataset.from_list(rows.rows)
    trainer = lead_trainer(tmp_path, dataset=dataset, max_steps=1)
    assert [sample.input_ids.tolist() for sample in trainer._rounds.samples_of([7, 3])] == [
        rows[7]["input_ids"],
        rows[3]["input_ids"],
    ]
    trainer.train()


def test_a_pool_with_text_needs_no_dataset(tmp_path, caplog):
    tokenizer, path = words_tokenizer(), tmp_path / "pool.jsonl"
    lines = [f'{{"prompt": "{"q " * (1 + i % 5)}", "response": "{"words " * (1 + i % 3)}", "arm": {i % 3}, "utility": {1 + i}}}'
             for i in range(30)]  # fmt: skip
    path.write_text("\n".join(lines))
    pool = lf.Pool.open(path, cache_dir=tmp_path / "cache")
    model = tiny(vocab=len(tokenizer))
    choice = lf.LeadConfig(budget=12, min_rounds=3)
    trainer = LeadTrainer(model, arguments(tmp_path), processing_class=tokenizer, pool=pool, lead=choice, max_length=40)
    calls = watch(trainer.engine)
    trainer.train()
    encoder = ChatEncoder(tokenizer, 40)
    rows = [row for call in calls if call[0] == "observe" for row in call[1]]
    samples = {row: next(encoder.encode([pool.messages(row)])) for row in rows}
    assert sum(int(samples[row].supervised[1:].sum()) for row in rows) == sum(c[2] for c in calls if c[0] == "step")
    assert len(set(rows)) == 12
    cut = sum(sample.cut_prompt > 0 for sample in samples.values())
    assert cut and f"{cut} of {len(rows)} samples had their prompt cut" in caplog.text


def test_two_configurations_reach_their_hosts(tmp_path):
    other = lf.LeadConfig(budget=12, min_rounds=2, rate=1.0, choose="topk", exclude_top=0.0, gamma=0.5, seed=2)
    leads = [FIVE_ROWS, other]
    trainers = [lead_trainer(tmp_path, lead=lead) for lead in leads]
    for trainer, lead in zip(trainers, leads, strict=True):
        trainer.train()
        assert trainer.engine.config == lead.resolve() and trainer.engine.num_used == lead.budget
    first, second = ([len(rows) for _, rows, _ in trainer.engine.history] for trainer in trainers)
    assert max(first) == 5 and max(second) == 6
    top = trainers[1].engine.history[0]  # the arm's six highest utilities
    arm = np.asarray(array_pool().arm)[top[1][0]]
    utilities = np.sort(np.asarray(array_pool().utility)[np.asarray(array_pool().arm) == arm])[::-1]
    assert len(top[1]) == 6 and float(top[2].min()) >= np.float32(utilities[11])
