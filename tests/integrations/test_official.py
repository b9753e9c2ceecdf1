"""The published loop on the engine: its pool file, its words, and a switch wherever its code left the paper."""

import gzip
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import lead_fast as lf
from lead_fast.integrations.official import Compat, OfficialLead

N, TASKS = 240, 3


def pool_lines():
    r = np.random.default_rng(0)
    for i in range(N):
        yield {
            "messages": [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": f"a {i}"}],
            "dataset": "x", "dataset_id": 7000 + 3 * i, "idf": float(r.random()), "cross_entropy": float(1 + r.random()),
            "idf_cluster": i % 4, "task": 2 if i < 12 else i % 2, "query_token": 3,
        }  # fmt: skip


def array_pool():
    rows = list(pool_lines())
    columns = {"arm": "idf_cluster", "task": "task", "utility": "cross_entropy"}
    return lf.Pool.from_arrays(**{name: [row[field] for row in rows] for name, field in columns.items()})


def official(compat=None, **options):
    defaults = dict(sample_rate=0.1, selected_top_number=60, seed=0)
    return OfficialLead(array_pool(), compat=compat, **defaults | options)


def train(lead, weight, rounds=None, fall=0.9):
    """The loop around a model of one weight: each visit shows a sample's loss a tenth lower than the last one did."""
    loss = {name: float(u) for name, u in zip(lead.dataset_ids.tolist(), lead.pool.utility, strict=True)}
    reports = []
    while (arm := lead.select_arm()) is not None and (rounds is None or len(reports) < rounds):
        names = lead.select_samples()
        assert all(int(lead.pool.arm[np.flatnonzero(lead.dataset_ids == name)[0]]) == arm for name in names)
        for name in names:
            lead.observe(torch.tensor([name]), torch.tensor([loss[name]]), torch.tensor([5.0]))
            loss[name] *= fall
            weight.data -= 0.1  # what an optimizer step at rate 0.01 did
            lead.step(0.01)
        reports.append(lead.update())
    return reports


def run(compat=None, **options):
    lead, weight = official(compat, **options), torch.nn.Parameter(torch.zeros(3))
    lead.track([weight])
    return lead, train(lead, weight)


@pytest.mark.parametrize("suffix", ["pool.jsonl", "pool.jsonl.gz"])
def test_the_published_pool_is_read_as_it_is(suffix, tmp_path, monkeypatch):
    monkeypatch.setenv("LEAD_FAST_CACHE", str(tmp_path / "cache"))
    path = tmp_path / suffix
    with (gzip.open if suffix.endswith("gz") else open)(path, "wt") as file:
        file.write("\n\n".join(json.dumps(row) for row in pool_lines()) + "\n")
    lead = OfficialLead.open(path, sample_rate=0.1, selected_top_number=60, seed=0)
    assert lead.dataset_ids.tolist() == [7000 + 3 * i for i in range(N)]
    assert lead.pool.messages(5)[1]["content"] == "a 5"
    weight = torch.nn.Parameter(torch.zeros(1))
    lead.track([weight])
    train(lead, weight)
    assert lead.engine.num_used == 60
    lead.export(tmp_path / "chosen.jsonl")
    chosen = [json.loads(line) for line in (tmp_path / "chosen.jsonl").read_text().splitlines()]
    assert len(chosen) == 60
    for row in chosen:
        assert row["messages"][1]["content"] == f"a {(row['dataset_id'] - 7000) // 3}"
        assert len(row["rounds"]) == len(row["utility_at_choice"]) >= 1


def test_the_rounds_are_those_of_the_engine():
    lead, _ = run()
    engine = lf.LeadEngine(array_pool(), lf.LeadConfig(preset="paper", budget=60, rate=0.1, estimator="historical", seed=0))
    weight = torch.nn.Parameter(torch.zeros(3))
    engine.track([weight])
    loss = [float(u) for u in array_pool().utility]
    while (rnd := engine.begin_round()) is not None:
        for row in rnd.rows:
            one, none = torch.tensor([loss[row]]), torch.zeros(1)
            engine.observe(row[None], lf.SampleStats(one, torch.tensor([5.0]), none, none, none))
            loss[row] *= 0.9
            weight.data -= 0.1
            engine.step(lr=0.01, num_items=1)
        engine.end_round()
    assert [entry["row"] for entry in engine.selected()] == [entry["row"] for entry in lead.engine.selected()]
    assert [rows.tolist() for _, rows, _ in engine.history] == [rows.tolist() for _, rows, _ in lead.engine.history]


def test_zero_reward_leaves_the_bandit_uniform():
    _, paper = run(selected_top_number=200)
    _, code = run(Compat(zero_reward=True), selected_top_number=200)
    assert all(len(set(report.probs[report.probs > 0].tolist())) == 1 for report in code)
    assert any(len(set(report.probs[report.probs > 0].tolist())) > 1 for report in paper)


def test_no_loss_change_keeps_the_loss_as_it_was_seen():
    for compat, changes in ((Compat(), True), (Compat(no_loss_change=True), False)):
        lead, _ = run(compat)
        rows = torch.tensor([entry["row"] for entry in lead.engine.selected()])
        seen = lead.engine.table.values[0, lead.engine.table.position[rows].long()]
        assert torch.equal(lead.engine.predicted_loss(rows), seen) != changes


def test_no_smoothing_forgets_earlier_utilities():
    for compat, history in ((Compat(no_loss_change=True), True), (Compat(no_loss_change=True, no_smoothing=True), False)):
        lead, _ = run(compat)
        rows = torch.tensor([entry["row"] for entry in lead.engine.selected() if len(entry["rounds"]) > 1])
        assert len(rows)
        assert torch.equal(lead.engine.utility(rows), lead.engine.predicted_loss(rows)) != history


def test_small_tasks_give_no_sample():
    small = set(range(12))  # three rows a task and arm, where a share of 0.1 is less than one
    chosen = {entry["row"] for entry in run(selected_top_number=200)[0].engine.selected()}
    assert chosen & small
    lead, _ = run(Compat(skip_small_tasks=True), selected_top_number=200)
    assert not {entry["row"] for entry in lead.engine.selected()} & small
    assert lead.pool.aside.nonzero()[0].tolist() == sorted(small)


def test_repeats_count_toward_the_budget():
    lead, reports = run(Compat(count_repeats=True), selected_top_number=151)
    chosen = [report.num_samples for report in reports]
    assert sum(chosen) == lead.num_selected > 151 > sum(chosen[:-1])  # the last round is not cut
    assert lead.engine.num_used < 151
    assert run(Compat(count_repeats=True), selected_top_number=2)[0].num_selected > 2
    assert run(selected_top_number=2)[0].num_selected == 2
    lead, reports = run(selected_top_number=151)
    assert lead.engine.num_used == 151 < lead.num_selected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_of_a_batch(dtype):
    logits = torch.randn(3, 7, 11).to(dtype).requires_grad_()
    labels = torch.randint(11, (3, 7))
    labels[0, :4], labels[1] = -100, -100
    losses, num_tokens = official().sample_losses(logits, labels)
    assert num_tokens.tolist() == [3.0, 0.0, 6.0] and losses[1] == 0.0 and not losses.requires_grad
    for i in (0, 2):
        torch.testing.assert_close(losses[i], F.cross_entropy(logits[i, :-1].float(), labels[i, 1:]).detach())
    # The published line, at its batch size of 1: each token is scored by logits that have seen it.
    for i in (0, 2):
        published = F.cross_entropy(
            torch.squeeze(logits[i : i + 1], dim=0).float(), labels[i : i + 1].squeeze(dim=0), ignore_index=-100
        )
        losses, num_tokens = official(Compat(unshifted_loss=True)).sample_losses(logits[i : i + 1], labels[i : i + 1])
        torch.testing.assert_close(losses[0], published.detach())
        assert num_tokens.tolist() == [float((labels[i] != -100).sum())]


def test_defaults_are_the_published_settings():
    config = OfficialLead(array_pool()).engine.config
    assert (config.preset, config.estimator, config.bandit, config.choose) == ("paper", "historical", "exp3", "topk")
    assert (config.rate, config.budget, config.gamma, config.smoothing, config.max_uses) == (0.015, 15000, 0.1, 0.1, 4)


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"`dataset_ids` must be 240 distinct integers, got others: .*'a0'"):
        OfficialLead(array_pool(), [f"a{i}" for i in range(N)])
    with pytest.raises(ValueError, match="`dataset_ids` must be 240 distinct integers, got 1"):
        OfficialLead(array_pool(), [1] * N)
    with pytest.raises(ValueError, match="must have arm and task"):
        OfficialLead(lf.Pool.from_arrays(arm=[0, 1], utility=[1.0, 1.0]), compat=Compat(skip_small_tasks=True))
    lead = official()
    with pytest.raises(RuntimeError, match="select_arm must come first"):
        lead.select_samples()
    with pytest.raises(RuntimeError, match="needs track"):
        lead.select_arm()
    lead.track([torch.nn.Parameter(torch.zeros(1))])
    lead.select_arm()
    with pytest.raises(RuntimeError, match="must be ended first"):
        lead.select_arm()
    with pytest.raises(ValueError, match=r"must be of the pool, got \[999\]"):
        lead.observe([0, 999], torch.ones(2), torch.ones(2))
