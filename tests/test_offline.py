"""Warm-up, scoring and clustering: what they compute, and pools at the edge of what makes sense."""

import json
import logging
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from lead_fast.cli import main
from lead_fast.config import LeadConfig, PrepareConfig
from lead_fast.demo_pool import FAMILIES, demo_rows
from lead_fast.engine import LeadEngine
from lead_fast.files import read_jsonl, write_jsonl
from lead_fast.integrations.samples import ChatSamples
from lead_fast.loading import build_model, load_tokenizer, save_model
from lead_fast.models import PackedModel
from lead_fast.offline.clustering import difficulty_arms, fine_tasks
from lead_fast.offline.prepare import load_prepared, prepare
from lead_fast.offline.pretrain import train_tokenizer
from lead_fast.offline.scoring import EMBEDDING_SIZE, _taking_part, score_pool
from lead_fast.packing import ChatEncoder
from lead_fast.pool import Pool

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rows():
    return demo_rows(40, seed=3)


@pytest.fixture(scope="module")
def base(rows, tmp_path_factory):
    """A folder with a tiny model that was never trained."""
    tokenizer = train_tokenizer([m["content"] for row in rows for m in row["messages"]], 400)
    folder = tmp_path_factory.mktemp("base")
    save_model(build_model("tiny", tokenizer, seed=0, device=CPU), tokenizer, folder)
    return folder


def pool_of(rows, folder, monkeypatch):
    monkeypatch.setenv("LEAD_FAST_CACHE", str(folder / "cache"))
    write_jsonl(folder / "pool.jsonl", rows)
    return Pool.open(folder / "pool.jsonl")


def test_scores_are_what_two_plain_forward_passes_give(rows, base):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    samples = list(ChatEncoder(tokenizer, 256).encode([row["messages"] for row in rows]))
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    model = PackedModel(build_model("tiny", tokenizer, seed=0, device=CPU))
    scores = score_pool(model, iter(samples), len(samples), pack_tokens=300, device=CPU, seed=0)

    def loss(sample):
        ids, mask = torch.from_numpy(sample.input_ids)[None], torch.from_numpy(sample.supervised[1:])
        with torch.no_grad():
            logits = plain(ids).logits[0, :-1]
        return float(nn.functional.cross_entropy(logits[mask], ids[0, 1:][mask]))

    given, alone = [loss(s) for s in samples], [loss(s.alone()) for s in samples]
    np.testing.assert_allclose(scores.utility, given, rtol=1e-4)
    np.testing.assert_allclose(scores.difficulty, np.array(given) / alone, rtol=1e-4)
    assert scores.num_tokens.tolist() == [len(s) for s in samples]
    assert scores.embedding.shape == (40, EMBEDDING_SIZE) and np.isfinite(scores.embedding).all()
    assert scores.tokens == sum(len(s) + len(s.alone()) for s in samples)


def test_a_row_without_an_answer_token_left_has_no_score(rows, base):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    samples = list(ChatEncoder(tokenizer, 256).encode([row["messages"] for row in rows[:3]]))
    samples[1] = replace(samples[1], supervised=np.zeros_like(samples[1].supervised))
    model = PackedModel(build_model("tiny", tokenizer, seed=0, device=CPU))
    scores = score_pool(model, iter(samples), 3, pack_tokens=300, device=CPU, seed=0)
    assert np.isfinite(scores.utility).tolist() == np.isfinite(scores.difficulty).tolist() == [True, False, True]


def test_a_pool_is_scored_in_the_precision_that_training_has(rows, base, tmp_path, monkeypatch):
    seen, loss = set(), PackedModel.loss

    def spy(model, hidden, *arguments, **options):
        precision = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        seen.add((hidden.grad_fn is None, precision))
        return loss(model, hidden, *arguments, **options)

    monkeypatch.setattr(PackedModel, "loss", spy)
    pool = pool_of(rows, tmp_path, monkeypatch)
    for precision in ("bf16", "fp32"):
        AcceleratorState._reset_state(reset_partial_state=True)
        config = PrepareConfig(model=str(base), precision=precision, tuning="full", warmup_share=0.0)
        try:
            prepare(pool, config, LeadConfig(), tmp_path / precision)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
        assert seen == {(True, torch.bfloat16 if precision == "bf16" else torch.float32)}
        seen.clear()


NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ m['role'] + ', ' + strftime_now('%Y-%m-%d') + ': ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant, ' + strftime_now('%Y-%m-%d') + ': ' }}{% endif %}"
)


@pytest.fixture
def base_without_system(base, tmp_path):
    folder = tmp_path / "no-system"
    shutil.copytree(base, folder)
    (folder / "chat_template.jinja").write_text(NO_SYSTEM)
    return folder


def test_rows_that_the_template_refuses_are_named_or_left_out(rows, base_without_system, tmp_path, monkeypatch, caplog):
    bad = [{"id": name, "messages": [{"role": "system", "content": "x"}, *rows[0]["messages"][-2:]]} for name in ("one", "two")]
    pool = pool_of([*rows[:7], bad[0], *rows[7:], bad[1]], tmp_path, monkeypatch)
    config = PrepareConfig(model=str(base_without_system), out=str(tmp_path / "out"), on_bad_row="error")
    with pytest.raises(ValueError, match=r"2 of 42 rows cannot be rendered; the first is 'one': .*no system role"):
        prepare(pool, config, LeadConfig(), tmp_path / "out")
    prepared = prepare(pool, replace(config, on_bad_row="skip"), LeadConfig(), tmp_path / "out")
    assert len(prepared.pool) == 40 and prepared.summary["rows_rejected"] == 2
    assert not {"one", "two"} & set(prepared.pool.ids.to_pylist()) and "they are left out" in caplog.text
    rejects = read_jsonl(tmp_path / "out.rejects.jsonl")
    assert [line["id"] for line in rejects] == ["one", "two"] and "no system role" in rejects[0]["reason"]
    assert json.loads(rejects[1]["raw"]) == bad[1]["messages"]


def test_rows_set_aside_need_not_be_rendered(rows, base_without_system, tmp_path, monkeypatch, caplog):
    bad = {"id": "one", "messages": [{"role": "system", "content": "x"}, *rows[0]["messages"][-2:]]}
    pool = pool_of([*rows, bad], tmp_path, monkeypatch)
    numbers = {"arm": np.arange(41) % 3, "utility": np.ones(41, np.float32), "aside": np.arange(41) == 40}
    config = PrepareConfig(model=str(base_without_system), out=str(tmp_path / "out"))
    prepared = prepare(pool.with_arrays(**numbers), config, LeadConfig(), tmp_path / "out")
    assert len(prepared.pool) == 41 and prepared.summary["rows_rejected"] == 0
    numbers["aside"][:] = False
    skipping = replace(config, on_bad_row="skip")
    for _ in range(3):  # as resumed runs do
        prepared = prepare(pool.with_arrays(**numbers), skipping, LeadConfig(), tmp_path / "again")
        assert len(prepared.pool) == 40 and len(read_jsonl(tmp_path / "out.rejects.jsonl")) == 1
    samples = ChatSamples(pool.with_arrays(**numbers), load_tokenizer(base_without_system), 128)
    assert samples.pool.aside.tolist() == [False] * 40 + [True] and "they are set aside" in caplog.text
    samples.date = "2024-02-29"
    (sample,) = samples([0])
    assert samples.date == "2024-02-29" and "user, 2024-02-29: " in samples.encoder.tokenizer.decode(sample.input_ids)
    with pytest.raises(ValueError, match="ChatSamples: the chat template does not render 1 of 1 rows; the first is 'one'"):
        ChatSamples(pool.subset([40]), load_tokenizer(base_without_system), 128)


def test_a_held_out_row_that_the_template_refuses_is_named_at_once(rows, base_without_system, tmp_path, monkeypatch, capfd):
    bad = {"id": "one", "messages": [{"role": "system", "content": "x"}, *rows[0]["messages"][-2:]]}
    pool_of(rows, tmp_path, monkeypatch)
    write_jsonl(tmp_path / "heldout.jsonl", [*rows[:3], bad])
    paths = ["--model", str(base_without_system), "--pool", str(tmp_path / "pool.jsonl"), "--out", str(tmp_path / "out")]
    assert main(["train", *paths, "--heldout", str(tmp_path / "heldout.jsonl")]) == 1
    assert "heldout: row 'one': the chat template refuses" in capfd.readouterr().err
    assert not (tmp_path / "out" / "prepared" / "start").exists()


def test_a_template_s_date_is_that_of_the_preparation(rows, base_without_system, tmp_path, monkeypatch):
    pool = pool_of(rows, tmp_path, monkeypatch)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "date").write_text("2024-02-29")  # begun on another day, and interrupted
    config = PrepareConfig(model=str(base_without_system))
    prepared = prepare(pool, config, LeadConfig(), tmp_path / "out")
    assert prepared.summary["date"] == "2024-02-29"
    encoder = load_prepared(tmp_path / "out").encoder(config)
    (sample,) = encoder.encode([rows[0]["messages"]])
    assert encoder.tokenizer.decode(sample.input_ids).startswith("user, 2024-02-29: ")


def test_a_process_without_batches_takes_part_until_all_are_done():
    others = iter([True, True, False, False])  # whether another process has a batch
    together = SimpleNamespace(any=lambda mine: mine | next(others))
    assert list(_taking_part(iter([["a"]]), together)) == [["a"], None]
    assert list(_taking_part(iter([["a"], ["b"]]), None)) == [["a"], ["b"]]


def test_arms_are_numbered_from_the_easiest():
    difficulty = np.array([0.9, 0.1, 0.5, 0.11, 0.52, 0.91], np.float32)
    assert difficulty_arms(difficulty, 3, seed=0).tolist() == [2, 0, 1, 0, 1, 2]


@pytest.mark.parametrize(("difficulty", "arms"), [([0.5] * 6, 1), ([0.1, 0.9], 2)])
def test_fewer_arms_than_asked_for_are_said(difficulty, arms, caplog):
    assert difficulty_arms(np.array(difficulty, np.float32), 7, seed=0).max() + 1 == arms
    assert f"{arms} arms instead of 7" in caplog.text


def test_tasks_stay_inside_their_arm_and_never_outnumber_what_is_distinct():
    arm = np.array([0, 0, 0, 0, 1, 1, 1], np.int16)
    embedding = np.array([[0, 0], [0, 0], [9, 9], [9, 9], [1, 1], [2, 2], [50, 50]], np.float16)
    task = fine_tasks(arm, embedding, 8, seed=0)
    assert task[0] == task[1] != task[2] == task[3]
    assert len(set(task[4:])) == 3 and not set(task[:4]) & set(task[4:])


@pytest.mark.parametrize("hard_rows", ["aside", "zero"])
def test_rows_whose_prompt_does_not_help_go_where_the_preset_says(hard_rows, rows, base, tmp_path, monkeypatch, caplog):
    pool = pool_of(rows, tmp_path, monkeypatch)
    config = PrepareConfig(model=str(base), num_arms=3, tasks_per_arm=2, max_length=256, learning_rate=1e-4)
    prepared = prepare(pool, config, LeadConfig(hard_rows=hard_rows), tmp_path / "out")
    above = prepared.summary["difficulty"]["above_1"]
    assert 0 < above < 40
    assert "hardly uses the prompt" in caplog.text
    if hard_rows == "aside":
        assert prepared.pool.aside.sum() == above and (prepared.pool.difficulty[prepared.pool.aside] > 1).all()
    else:
        assert prepared.pool.aside.sum() == 0 and (prepared.pool.difficulty == 0).sum() == above
        assert (prepared.pool.arm[prepared.pool.difficulty == 0] == 0).all()
    again = load_prepared(tmp_path / "out")
    for name in ("arm", "task", "utility", "difficulty", "num_tokens", "aside"):
        np.testing.assert_array_equal(getattr(again.pool, name), getattr(prepared.pool, name))


@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_pool_with_fewer_rows_than_arms_still_makes_rounds(num_rows, rows, base, tmp_path, monkeypatch, caplog):
    pool = pool_of(rows[:num_rows], tmp_path, monkeypatch)
    config = PrepareConfig(model=str(base), max_length=256)
    with caplog.at_level(logging.INFO):
        prepared = prepare(pool, config, LeadConfig(hard_rows="zero"), tmp_path / "out")
    assert "arms instead of 7" in caplog.text
    engine = LeadEngine(prepared.pool, LeadConfig(budget=1.0))
    assert engine.begin_round().rows.numel() == 1


def test_cut_samples_are_counted_and_said(rows, base, tmp_path, monkeypatch, caplog):
    pool = pool_of(rows, tmp_path, monkeypatch)
    prepared = prepare(pool, PrepareConfig(model=str(base), max_length=24), LeadConfig(), tmp_path / "out")
    cuts = prepared.summary["scoring"]["cuts"]
    assert cuts["samples"] == 40 and cuts["prompts"] > 0
    assert "to fit 24 tokens" in caplog.text
    assert prepared.pool.num_tokens.max() <= 24


def test_a_pool_with_scores_of_its_own_is_taken_as_it_is(base, tmp_path, monkeypatch):
    official = [
        {
            "messages": row["messages"], "dataset": "demo", "dataset_id": n, "idf": 0.1 * (n % 5), "cross_entropy": 1.0 + n,
            "idf_cluster": n % 3, "task": n % 2, "query_token": 5,
        }
        for n, row in enumerate(demo_rows(12, seed=4))
    ]  # fmt: skip
    pool = pool_of(official, tmp_path, monkeypatch)
    prepared = prepare(pool, PrepareConfig(model=str(base)), LeadConfig(), tmp_path / "out")
    assert prepared.start is None and prepared.pool.arm.tolist() == [n % 3 for n in range(12)]
    np.testing.assert_allclose(prepared.pool.utility, [1.0 + n for n in range(12)])
    assert json.loads((tmp_path / "out" / "prepare.json").read_text())["rows"] == 12


def test_the_demo_pool_is_seeded_and_has_what_it_promises():
    rows = demo_rows(2000, seed=7)
    assert rows == demo_rows(2000, seed=7) != demo_rows(2000, seed=8)
    ids = [row["id"] for row in rows]
    assert len(set(ids)) == 2000 and {row["source"] for row in rows} == set(FAMILIES)
    assert 0.1 < np.mean([i.endswith("-noisy") for i in ids]) < 0.2
    assert 0.07 < np.mean([i.endswith("-duplicate") for i in ids]) < 0.13
    assert all(row["messages"][1]["content"].strip() for row in rows)
