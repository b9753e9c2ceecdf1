"""Optimizer steps: accumulation equals the large batch, a bad sample changes no weight."""

import math

import pytest
import torch
from accelerate import Accelerator

from lead_fast.config import TrainConfig
from lead_fast.loading import build_model
from lead_fast.offline.pretrain import train_tokenizer
from lead_fast.optimization import Optimization, learning_rate, step_batches
from lead_fast.packing import ChatEncoder, pack

CPU = torch.device("cpu")
CONFIG = TrainConfig(max_grad_norm=0.0)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["some words to learn from, 1 2 3. " * 3], 300)


@pytest.fixture(scope="module")
def samples(tokenizer):
    chats = [
        [{"role": "user", "content": "q " * n}, {"role": "assistant", "content": "some words " * (1 + n % 3)}]
        for n in range(1, 9)
    ]
    return list(ChatEncoder(tokenizer, 128).encode(chats))


def fresh(tokenizer):
    return Optimization(build_model("tiny", tokenizer, seed=0, device=CPU), Accelerator(), CONFIG)


def test_accumulation_gives_the_step_of_the_large_batch(tokenizer, samples):
    whole, parts = fresh(tokenizer), fresh(tokenizer)
    seen = []
    one = whole.step([pack(samples)], 1e-2)
    many = parts.step([pack(samples[:1]), pack(samples[1:5]), pack(samples[5:])], 1e-2, lambda rows, s: seen.append(s.loss))
    assert one.num_items == many.num_items and one.num_tokens == many.num_tokens
    torch.testing.assert_close(one.loss, many.loss)
    for a, b in zip(whole.bare.parameters(), parts.bare.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4)
    assert sum(map(len, seen)) == len(samples)


def test_a_gradient_that_is_not_finite_changes_no_weight(tokenizer, samples):
    optimization, batch = fresh(tokenizer), pack(samples)
    before = [p.detach().clone() for p in optimization.bare.parameters()]
    losses = []

    def poison(module, arguments, output):
        return output.index_fill(1, batch.token_index[:1], math.nan)

    hook = optimization.bare.model.norm.register_forward_hook(poison)
    result = optimization.step([batch], 1e-2, lambda rows, s: losses.append(s.loss))
    assert not math.isfinite(float(result.loss))
    assert torch.isfinite(losses[0]).tolist() == [False] + [True] * (len(samples) - 1)  # in its own sample only
    assert all(torch.equal(a, b) for a, b in zip(before, optimization.bare.parameters(), strict=True))
    hook.remove()
    assert math.isfinite(float(optimization.step([batch], 1e-2).loss))
    assert not all(torch.equal(a, b) for a, b in zip(before, optimization.bare.parameters(), strict=True))


def test_steps_respect_their_size_and_keep_every_row(samples):
    config = TrainConfig(step_tokens=60, accumulation=2)
    rows = list(range(100, 108))
    steps = step_batches(samples, rows, config)
    assert [row for step in steps for batch in step for row in batch.rows.tolist()] == rows
    assert all(sum(batch.num_tokens for batch in step) <= 60 or len(step) == 1 for step in steps)
    assert all(1 <= len(step) <= 2 for step in steps)


def test_the_learning_rate_rises_and_falls():
    def rate(progress, schedule="cosine"):
        return learning_rate(progress, peak=1.0, schedule=schedule, warmup=0.1)

    assert 0.0 < rate(0.0) < rate(0.05) < rate(0.1) == pytest.approx(1.0)
    assert rate(0.55) == pytest.approx(0.5) and rate(1.0) == pytest.approx(0.0, abs=1e-12)
    assert rate(0.55, "linear") == pytest.approx(0.5) and rate(0.9, "constant") == 1.0
