"""LeadSFTTrainer: the host's formats and masks reach the fused loss, row by row."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

pytest.importorskip("datasets", reason="LeadSFTTrainer takes the datasets of TRL")
pytest.importorskip("trl", reason="LeadSFTTrainer stands on trl, which is not installed")

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from host_runs import array_pool, tiny, watch, words_tokenizer
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import lead_fast as lf
from lead_fast.integrations.trl import LeadSFTTrainer

N = 40
CHOICE = lf.LeadConfig(budget=20, rate=0.5, min_rounds=5)


@pytest.fixture(scope="module")
def tokenizer():
    return words_tokenizer()


def chat(i):
    turns = [{"role": "user", "content": "q " * (1 + i % 7)}, {"role": "assistant", "content": "some words " * (1 + i % 4)}]
    return turns + ([{"role": "user", "content": "1 2"}, {"role": "assistant", "content": "learn"}] if i % 3 == 0 else [])


FORMATS = {
    "messages": ([{"messages": chat(i)} for i in range(N)], {"assistant_only_loss": True}),
    "all tokens": ([{"messages": chat(i)} for i in range(N)], {}),
    "prompt-completion": ([{"prompt": "1 2 " * (1 + i % 5), "completion": "words " * (1 + i % 3)} for i in range(N)], {}),
    "chat prompt-completion": ([{"prompt": chat(i)[:1], "completion": chat(i)[1:2]} for i in range(N)], {}),
    "text": ([{"text": "some words to learn from " * (1 + i % 4)} for i in range(N)], {}),
}


def config(folder, **options):
    defaults = dict(
        use_cpu=True, bf16=False, per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to="none",
        learning_rate=1e-2, save_strategy="no", logging_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    return SFTConfig(str(folder), **defaults | options)


def sft(folder, tokenizer, rows, *, lead=CHOICE, pool=None, peft_config=None, eval_dataset=None, **options):
    return LeadSFTTrainer(
        tiny(vocab=len(tokenizer)), config(folder, **options), train_dataset=None if rows is None else Dataset.from_list(rows),
        processing_class=tokenizer, pool=pool or array_pool(n=N), lead=lead, peft_config=peft_config, eval_dataset=eval_dataset,
    )  # fmt: skip


@pytest.mark.parametrize("kind", FORMATS)
def test_every_row_has_the_loss_that_the_host_gives_it(kind, tokenizer, tmp_path):
    rows, options = FORMATS[kind]
    trainer = sft(tmp_path, tokenizer, rows, **options)
    calls = watch(trainer.engine)
    trainer.args.max_steps, trainer.args.learning_rate = 3, 0.0  # the model stays the one that the host scores below
    trainer.train()
    host = SFTTrainer(
        trainer.model, config(tmp_path, **options), train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    observed = [pair for call in calls if call[0] == "observe" for pair in zip(*call[1:], strict=True)]
    assert len(observed) == 12
    for row, loss in observed:
        batch = host.data_collator([host.train_dataset[row]])
        with torch.no_grad():
            expected = host.compute_loss(host.model, batch)
        assert loss == pytest.approx(float(expected), rel=2e-5)
    items = [sum(x != -100 for x in host.train_dataset[row]["labels"][1:]) for row, _ in observed]
    assert sum(items) == sum(call[2] for call in calls if call[0] == "step")


def test_a_router_keeps_the_weight_that_the_arguments_give_its_loss(tokenizer, tmp_path):
    rows, options = FORMATS["messages"]
    options = options | {"router_aux_loss_coef": 0.7, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    model = tiny("mixtral", vocab=len(tokenizer), num_local_experts=4)
    trainer = LeadSFTTrainer(
        model, config(tmp_path, max_steps=1, learning_rate=0.0, logging_strategy="steps", logging_steps=1, **options),
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer, pool=array_pool(n=N), lead=CHOICE,
    )  # fmt: skip
    calls = watch(trainer.engine)
    trainer.train()
    ((row,),) = [call[1] for call in calls if call[0] == "observe"]
    host = SFTTrainer(model, config(tmp_path, **options), train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    model.train()
    expected = float(host.compute_loss(host.model, host.data_collator([host.train_dataset[row]])))
    assert next(line["loss"] for line in trainer.state.log_history if "loss" in line) == pytest.approx(expected, rel=1e-5)


def test_only_assistant_turns_and_completions_are_supervised(tokenizer, tmp_path):
    for kind in ("messages", "prompt-completion", "chat prompt-completion"):
        rows, options = FORMATS[kind]
        trainer = sft(tmp_path, tokenizer, rows, **options)
        (sample,) = trainer._rounds.samples_of([3])
        text = tokenizer.decode(sample.input_ids[sample.supervised])
        assert "words" in text and "q" not in text and "User" not in text
        assert ("learn" in text) == (kind == "messages")  # both turns of a conversation


def test_rows_keep_their_names_when_the_host_shuffles_and_drops(tokenizer, tmp_path):
    rows = [{"messages": chat(i)} for i in range(N)]
    for i in (5, 17):
        rows[i]["messages"][0]["content"] = "long " * 80  # nothing supervised is left of these
    trainer = sft(
        tmp_path,
        tokenizer,
        rows,
        assistant_only_loss=True,
        max_length=64,
        shuffle_dataset=True,
        lead=lf.LeadConfig(budget=1.0, rate=1.0),
    )
    assert trainer.engine.budget == N - 2 and trainer.engine.pool.aside.nonzero()[0].tolist() == [5, 17]
    untouched = sft(tmp_path, tokenizer, rows, assistant_only_loss=True, max_length=64)
    for row in (0, 4, 6, 30):
        ours, theirs = (run._rounds.samples_of([row])[0] for run in (trainer, untouched))
        assert np.array_equal(ours.input_ids, theirs.input_ids)
        assert tokenizer.decode(ours.input_ids).count("q") == 1 + row % 7
    trainer.train()
    chosen = {entry["row"] for entry in trainer.engine.selected()}
    assert chosen == set(range(N)) - {5, 17}


def test_adapters_of_peft_config_alone_are_trained(tokenizer, tmp_path):
    rows, options = FORMATS["messages"]
    trainer = sft(
        tmp_path, tokenizer, rows, gradient_checkpointing=True, logging_strategy="steps", logging_steps=1,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), save_strategy="steps", save_steps=1000,
        eval_dataset=Dataset.from_list(rows[:4]), eval_strategy="steps", eval_steps=2, **options,
    )  # fmt: skip
    frozen = {n: p.clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trained = {n: p.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    now = dict(trainer.model.named_parameters())
    assert trained and all("lora_" in name and not torch.equal(now[name], value) for name, value in trained.items())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())
    assert trainer.engine.num_used == 20
    tokens = [line["num_tokens"] for line in trainer.state.log_history if "num_tokens" in line]
    assert all("num_tokens" in line for line in trainer.state.log_history if "loss" in line)
    assert not any("lead/round" in line and "num_tokens" in line for line in trainer.state.log_history)
    assert tokens == sorted(tokens) and tokens[-1] == sum(h.get("lead/tokens", 0) for h in trainer.state.log_history)
    assert any("eval_mean_token_accuracy" in line for line in trainer.state.log_history)
    saved = tmp_path / f"checkpoint-{trainer.state.global_step}"
    assert (saved / "adapter_model.safetensors").exists() and (saved / "lead_state.safetensors").exists()


def test_a_pool_with_text_needs_no_dataset(tokenizer, tmp_path):
    path = tmp_path / "pool.jsonl"
    line = '{{"prompt": "{}", "response": "{}", "arm": {}, "utility": 2.5}}'
    path.write_text("\n".join(line.format("q " * (1 + i % 5), "words " * (1 + i % 3), i % 3) for i in range(30)))
    pool = lf.Pool.open(path, cache_dir=tmp_path / "cache")
    trainer = sft(tmp_path, tokenizer, None, pool=pool, assistant_only_loss=True)
    trainer.train()
    assert trainer.engine.num_used == 20


def test_a_resumed_run_is_identical(tokenizer, tmp_path):
    rows, options = FORMATS["messages"]

    def run(folder, **more):
        return sft(
            folder, tokenizer, rows, gradient_accumulation_steps=1, save_strategy="steps", save_steps=1, **options, **more
        )

    whole = run(tmp_path)
    whole.train()
    assert whole._rounds.estimated_steps() > 5
    resumed = run(tmp_path / "again")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))  # rounds of two steps: inside the second
    assert resumed.engine.selected() == whole.engine.selected()
    assert all(torch.equal(a, b) for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True))


def test_what_cannot_be_right_is_refused(tokenizer, tmp_path):
    rows, _ = FORMATS["text"]
    with pytest.raises(ValueError, match="`packing` must be False, got True"):
        sft(tmp_path, tokenizer, rows, packing=True)
    with pytest.raises(ValueError, match="`loss_type` must be 'nll', got 'dft'"):
        sft(tmp_path, tokenizer, rows, loss_type="dft")
    with pytest.raises(ValueError, match="LeadSFTTrainer: `dataloader_num_workers` must be 0"):
        sft(tmp_path, tokenizer, rows, dataloader_num_workers=1)
    with pytest.raises(ValueError, match="a Dataset of the pool's 40 rows, got 39 rows"):
        sft(tmp_path, tokenizer, rows[:39])
    stream = IterableDataset.from_generator(lambda: iter(rows))
    with pytest.raises(ValueError, match="got IterableDataset"):
        LeadSFTTrainer(
            tiny(), config(tmp_path, max_steps=3), train_dataset=stream, processing_class=tokenizer, pool=array_pool(n=N)
        )
    with pytest.raises(ValueError, match="`pool` must have text where there is no `train_dataset`"):
        sft(tmp_path, tokenizer, None)


def test_truncation_that_leaves_no_row_is_named(tokenizer, tmp_path):
    rows = [{"input_ids": list(range(3, 12)), "labels": [-100] * 8 + [5]} for _ in range(N)]
    with pytest.raises(ValueError, match="a row must have a supervised token within max_length 6, got none"):
        sft(tmp_path, tokenizer, rows, max_length=6)


def test_samples_that_the_host_cuts_are_counted(tokenizer, tmp_path, caplog):
    rows = [{"input_ids": list(range(3, 9 + i % 4)), "labels": list(range(3, 9 + i % 4))} for i in range(N)]
    sft(tmp_path, tokenizer, rows, max_length=8)
    expected = sum(len(row["input_ids"]) >= 8 for row in rows)
    assert f"{expected} of {N} samples reach max_length 8: the host cuts what is longer" in caplog.text
    caplog.clear()
    sft(tmp_path, tokenizer, rows, max_length=64)
    assert "reach max_length" not in caplog.text


@pytest.mark.parametrize("padding_free", [False, True])
def test_supervising_every_token_is_said(padding_free, tokenizer, tmp_path, caplog):
    options = {"padding_free": True, "max_length": None} if padding_free else {}
    sft(tmp_path, tokenizer, FORMATS["all tokens"][0], **options)
    assert "every token is supervised" in caplog.text
    caplog.clear()
    sft(tmp_path, tokenizer, FORMATS["messages"][0], assistant_only_loss=True)
    assert "every token is supervised" not in caplog.text
    caplog.clear()
    ids = [list(range(3, 9)), list(range(4, 12))] * (N // 2)
    tokens = [{"input_ids": row, "labels": [-100, -100, *row[2:]]} for row in ids]
    sft(tmp_path, tokenizer, tokens, dataset_kwargs={"skip_prepare_dataset": True})
    assert "every token is supervised" not in caplog.text
