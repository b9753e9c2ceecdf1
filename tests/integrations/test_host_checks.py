"""What a front end refuses, and how it says so; how a round is cut into steps."""

import json
import types

import numpy as np
import pytest
import torch
from host_runs import CHOICE, N, TokenRows, arguments, array_pool, lead_trainer, tiny, words_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import IterableDataset
from transformers import DataCollatorForLanguageModeling

import lead_fast as lf
from lead_fast.integrations.rounds import HostRounds
from lead_fast.integrations.samples import ChatSamples, DatasetSamples
from lead_fast.integrations.transformers import LeadTrainer
from lead_fast.packing import ChatEncoder, PackedBatch, Sample


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataloader_num_workers": 2}, "`dataloader_num_workers` must be 0: workers read ahead of the round, got 2"),
        ({"train_sampling_strategy": "group_by_length"}, "`train_sampling_strategy` must be 'random'"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` must be 0"),
        ({"neftune_noise_alpha": 5.0}, "`neftune_noise_alpha` must be None"),
        ({"auto_find_batch_size": True}, "`auto_find_batch_size` must be False"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_arguments_that_cannot_be_right_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=f"LeadTrainer: {message}"):
        lead_trainer(tmp_path, **options)


def test_an_epoch_is_the_whole_run_which_is_said(tmp_path, caplog):
    lead_trainer(tmp_path, save_strategy="epoch")
    assert "`save_strategy` 'epoch' means once, at its end" in caplog.text
    caplog.clear()
    lead_trainer(tmp_path, save_strategy="steps")
    assert "epoch" not in caplog.text


def test_samples_that_would_change_their_neighbours_are_refused(tmp_path):
    """Dynamic rotary embeddings follow the longest sample of a batch."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    trainer = lead_trainer(tmp_path, tiny(rope_parameters=rope, max_position_embeddings=12))
    rows = TokenRows()
    short, long = (next(i for i in range(N) if (len(rows[i]["input_ids"]) > 12) == is_long) for is_long in (False, True))
    samples = trainer._rounds.samples_of
    assert len(samples([short])) == 1
    with pytest.raises(ValueError, match=f"row {long} must have at most 12 tokens: the rotary embeddings"):
        samples([long])


def test_an_adapted_embedding_is_no_reason_to_crash(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny(tie_word_embeddings=False), LoraConfig(target_modules=["q_proj", "embed_tokens"]))
    assert lead_trainer(tmp_path, model)._packed.checked


def test_a_row_whose_answer_the_template_does_not_write_is_set_aside_before_any_round(tmp_path, caplog):
    tokenizer = words_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.content != 'some' %}{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}"
    )
    answers = ["some words", "some", "words to learn from"]
    with (tmp_path / "pool.jsonl").open("w") as file:
        for answer in answers:
            turns = [{"role": "user", "content": "some words"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"id": answer, "messages": turns}) + "\n")
    pool = lf.Pool.from_jsonl(tmp_path / "pool.jsonl").with_arrays(arm=np.zeros(3, int), utility=np.ones(3, np.float32))
    assert ChatEncoder(tokenizer, 64).template.render(pool.messages(1)) == "user: some words\n"  # it refuses nothing
    samples = ChatSamples(pool, tokenizer, 64)
    assert samples.pool.aside.tolist() == [False, True, False] and "1 of 3 rows; the first is 'some'" in caplog.text
    assert len(samples([0, 2])) == 2 and samples.encoder.cuts.samples == 2


def test_functions_in_the_place_of_the_fused_loss_or_the_model_are_refused(tmp_path):
    made = dict(args=arguments(tmp_path), train_dataset=TokenRows(), pool=array_pool(), lead=CHOICE)
    with pytest.raises(ValueError, match="`compute_loss_func` must be None"):
        LeadTrainer(tiny(), compute_loss_func=lambda *_: 0, **made)
    with pytest.raises(ValueError, match="`model_init` must be None"):
        LeadTrainer(model_init=lambda: tiny(), **made)


def test_several_devices_in_one_process_are_refused(tmp_path, monkeypatch):
    from transformers import TrainingArguments

    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="make one GPU visible"):
        lead_trainer(tmp_path)


def test_models_that_cannot_be_served_are_refused(tmp_path):
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    prompt = get_peft_model(tiny(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="learned prompt"):
        lead_trainer(tmp_path, prompt)
    with pytest.raises(ValueError, match=r"plain nn\.Linear without adapter"):
        lead_trainer(tmp_path, get_peft_model(tiny(), LoraConfig(target_modules=["lm_head"])))


def test_datasets_that_do_not_fit_the_pool_are_refused(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(TokenRows())

    with pytest.raises(ValueError, match=f"must have the pool's 7 rows in order, got {N} rows"):
        lead_trainer(tmp_path, pool=array_pool(n=7))
    with pytest.raises(ValueError, match="must have the pool's 60 rows in order, got Stream"):
        lead_trainer(tmp_path, dataset=Stream(), max_steps=3)
    with pytest.raises(ValueError, match="`pool` must have text where there is no `train_dataset`"):
        LeadTrainer(tiny(), arguments(tmp_path), pool=array_pool(), processing_class=words_tokenizer())
    with pytest.raises(ValueError, match="`processing_class` must be a tokenizer"):
        LeadTrainer(tiny(), arguments(tmp_path), pool=array_pool())
    with pytest.raises(ValueError, match=r"`pool\.utility` must be set"):
        lead_trainer(tmp_path, pool=lf.Pool.from_arrays(arm=[0] * N))


IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": IDS}, "must have `input_ids` and `labels` after the collator"),
        ({"input_ids": IDS, "labels": IDS, "pixel_values": IDS}, r"has \['pixel_values'\]"),
        ({"input_ids": IDS, "labels": IDS + 1}, "labels that are its input_ids or -100"),
        ({"input_ids": IDS, "labels": IDS[:, :2]}, "a label a token, got 2 for 4"),
        ({"input_ids": IDS, "labels": IDS, "attention_mask": torch.zeros(1, 4)}, "must have a token, got none"),
        ({"input_ids": IDS, "labels": IDS, "position_ids": torch.tensor([[0, 1, 0, 1]])}, "other `position_ids`"),
    ],
    ids=["labels", "images", "shifted", "short", "empty", "packed"],
)
def test_rows_that_are_no_samples_are_refused(batch, message):
    with pytest.raises(ValueError, match=f"train_dataset: row 0 .*{message}"):
        DatasetSamples([None], lambda items: batch)([0])


def test_masked_language_modelling_is_refused(tmp_path):
    rows = TokenRows(masked=False)
    collator = DataCollatorForLanguageModeling(words_tokenizer_with_mask(), mlm=True, mlm_probability=0.9)
    with pytest.raises(ValueError, match="labels that are its input_ids or -100"):
        lead_trainer(tmp_path, dataset=rows, data_collator=collator).train()


def words_tokenizer_with_mask():
    tokenizer = words_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    return tokenizer


def test_padding_of_the_hosts_collator_is_left_out():
    ids, mask = torch.tensor([[0, 0, 5, 6, 7, 0]]), torch.tensor([[0, 0, 1, 1, 1, 0]])
    batch = {"input_ids": ids, "labels": torch.tensor([[-100, -100, -100, 6, 7, -100]]), "attention_mask": mask}
    (sample,) = DatasetSamples([None], lambda items: batch)([0])
    assert sample.input_ids.tolist() == [5, 6, 7] and sample.supervised.tolist() == [False, True, True]


def test_adapters_that_act_outside_the_layers_are_refused(tmp_path):
    from peft import AdaLoraConfig, LoraConfig, get_peft_model

    targets = ["q_proj", "v_proj"]
    for config, message in (
        (LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6]), "activated LoRA"),
        (AdaLoraConfig(target_modules=targets, task_type="CAUSAL_LM", total_step=10), "ADALORA, whose wrapper adds"),
    ):
        with pytest.raises(ValueError, match=f"`model` must be a causal LM .* layers, got {message}"):
            lead_trainer(tmp_path, get_peft_model(tiny(), config))


@pytest.mark.parametrize("kind", ["tokens", "empty", "padded"])
def test_rows_that_cannot_be_served_are_named_before_training(kind, tmp_path):
    from datasets import Dataset

    rows = [dict(row) for row in TokenRows().rows]
    longer = 33 - len(rows[7]["input_ids"])
    if kind == "empty":
        rows[7] = {"input_ids": [], "labels": [], "attention_mask": []}
    else:
        rows[7]["input_ids"] = [*rows[7]["input_ids"], *[5] * longer]
        rows[7]["labels"] = [*rows[7]["labels"], *[5 if kind == "tokens" else -100] * longer]
        rows[7]["attention_mask"] = [*rows[7]["attention_mask"], *[int(kind == "tokens")] * longer]
    model = tiny("gpt2")
    model.config.max_position_embeddings = 32
    dataset, aside = Dataset.from_list(rows), np.arange(N) == 7
    if kind != "padded":  # padding goes
        message = "a token, got none" if kind == "empty" else "at most 32 tokens: GPT2LMHeadModel has no more positions, got 33"
        with pytest.raises(ValueError, match=f"train_dataset: row 7 must have {message}"):
            lead_trainer(tmp_path, model, dataset=dataset)
    else:
        lead_trainer(tmp_path, model, dataset=dataset)
    lead_trainer(tmp_path, tiny("gpt2"), dataset=dataset, pool=array_pool().with_arrays(aside=aside))


def test_what_is_no_pool_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"LeadTrainer: `pool` must be a Pool, by Pool.load\(folder\) .* got str"):
        LeadTrainer(tiny(), arguments(tmp_path), train_dataset=TokenRows(), pool="out/pool")


def test_rounds_smaller_than_a_step_are_said(tmp_path, caplog):
    lead_trainer(tmp_path, per_device_train_batch_size=8)
    assert "about 5 rows, and an optimizer step is to have 16" in caplog.text
    caplog.clear()
    lead_trainer(tmp_path)
    assert "optimizer step is to have" not in caplog.text


def test_samples_longer_than_the_pool_knows_are_said(tmp_path, caplog):
    words = "a rather long question of many words " * 9
    chats = [[{"role": "user", "content": words}, {"role": "assistant", "content": "yes"}]] * 3
    (tmp_path / "pool.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    pool = lf.Pool.open(tmp_path / "pool.jsonl", cache_dir=tmp_path / "cache")
    pool = pool.with_arrays(num_tokens=np.full(3, 40, np.int32))
    ChatSamples(pool, words_tokenizer(), 40)
    assert not caplog.text
    ChatSamples(pool, words_tokenizer(), 100)
    assert "`pool.num_tokens` at most 40: `max_length` must be what the pool was prepared with" in caplog.text


@settings(max_examples=300, deadline=None)
@given(num_rows=st.integers(1, 200), batch_size=st.integers(1, 9), accumulation=st.integers(1, 9))
def test_a_round_fills_whole_optimizer_steps(num_rows, batch_size, accumulation):
    engine = types.SimpleNamespace(num_used=0)
    rounds = HostRounds(engine, list, batch_size, accumulation)
    rows = torch.arange(num_rows).flip(0)
    opened = rounds._opened(types.SimpleNamespace(rows=rows), 0)
    parts = opened.micro_batches
    assert [row for part in parts for row in part] == rows.tolist()
    assert len(parts) == opened.num_steps * accumulation
    assert opened.num_steps == -(-num_rows // (batch_size * accumulation))  # as few steps as the host's batch size allows
    assert max(map(len, parts)) <= batch_size
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert all(parts[i] for i in range(accumulation - 1, len(parts), accumulation))  # a step ends with a real micro-batch


def test_a_resumed_run_has_the_date_of_its_beginning():
    engine = lf.LeadEngine(array_pool(), lf.LeadConfig())
    samples = types.SimpleNamespace(date="2024-02-29")
    state = HostRounds(engine, samples, 2, 1).state_dict()
    later = types.SimpleNamespace(date="2024-03-01")
    HostRounds(lf.LeadEngine(array_pool(), lf.LeadConfig()), later, 2, 1).load_state_dict(state)
    assert later.date == "2024-02-29"


@pytest.mark.parametrize("error", [0.0, 0.05, 0.3])
def test_utilities_of_another_model_are_said(error, caplog):
    engine = lf.LeadEngine(array_pool(), lf.LeadConfig(preset="paper", rate=0.5, budget=1.0))
    rounds = HostRounds(engine, lambda rows: [Sample(np.arange(9), np.ones(9, bool), np.ones(9, bool)) for _ in rows], 2, 2)
    for _ in range(2):
        assert rounds.begin()
        for number, columns in enumerate(rounds.batches()):
            batch = PackedBatch(**columns)
            known = torch.from_numpy(np.asarray(engine.pool.utility))[batch.rows]
            # Once trained on, samples may have any loss; those of no row of the pool are not compared.
            loss = known * (1 + error) if engine.clocks.num_steps == 0 else known * 9
            unread = torch.full_like(loss, torch.nan)
            rounds.observe(batch, lf.SampleStats(loss, torch.full_like(loss, 8.0), unread, unread, loss))
            if number % 2:
                rounds.step(1e-3, 32)
        rounds.end()
    assert ("`pool.utility` says" in caplog.text) == (error > 0.1)
    assert caplog.text.count("before any training, 3 samples") == (error > 0.1)


def test_a_step_that_is_made_again_is_counted_once():
    """A host may save between a step's micro-batches and its optimizer step (enable_jit_checkpoint)."""

    def samples_of(rows):
        return [Sample(np.arange(9), np.ones(9, bool), np.ones(9, bool)) for _ in rows]

    def made():
        return HostRounds(lf.LeadEngine(array_pool(), lf.LeadConfig(preset="paper", rate=1.0, budget=1.0)), samples_of, 1, 2)

    def play(rounds, saved_at=None):
        for number, columns in enumerate(rounds.batches()):
            if len(columns["rows"]):  # a step's first micro-batch may be empty
                batch = PackedBatch(**columns)
                one = torch.ones(len(batch.rows))
                rounds.observe(batch, lf.SampleStats(one, 8 * one, one, one, one))
            if number == saved_at:
                return rounds.state_dict()
            if number % 2:
                rounds.step(1e-3, 32)
        return rounds.end()

    whole, cut, again = made(), made(), made()
    assert whole.begin() and cut.begin()
    expected = play(whole)
    again.load_state_dict(play(cut, saved_at=2))
    assert play(again) == expected and expected["lead/tokens"] > 0
