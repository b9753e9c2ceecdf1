"""Sketched per-sample LoRA gradients against autograd, one sample at a time."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

import lead_fast as lf
from lead_fast.cli import main
from lead_fast.demo_pool import demo_rows
from lead_fast.first_order import FirstOrderRound, LoraSketch, SampleTiles
from lead_fast.loading import prepare_model
from lead_fast.models import PackedModel, trained_parameters
from lead_fast.packing import Sample, pack

VOCAB, FULL = 97, 10**6
LENGTHS = (1, 5, 64, 65, 130, 17, 2)


def samples_of(lengths, seed=0):
    """Samples whose first third is prompt; one of a single token has nothing to learn from."""
    generator = np.random.default_rng(seed)
    samples = []
    for length in lengths:
        supervised = np.arange(length) >= length // 3
        samples.append(Sample(generator.integers(0, VOCAB, length), supervised, supervised))
    return samples


def lora_model(dropout=0.0, **options):
    """A small Llama with LoRA on attention and MLP. B is not 0: it would hide the gradient of A."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        "llama", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, head_dim=8,
    )  # fmt: skip
    base = prepare_model(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    targets = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=4, lora_alpha=6, target_modules=targets, lora_dropout=dropout, task_type="CAUSAL_LM", **options)
    model = get_peft_model(base, lora)
    with torch.no_grad():
        for name, parameter in trained_parameters(model):
            if "lora_B" in name:
                parameter.normal_(0.0, 0.05)
    return model


def sketch_of(packed, batch, sketch, num_items=None):
    """Sketches of one forward and backward, and the trained parameters' gradients by name."""
    packed.zero_grad()
    with sketch.collect(batch.cu_seqlens) as sketches:
        packed(batch, num_items=batch.num_items if num_items is None else num_items).loss.backward()
    return sketches, [p.grad.clone() for _, p in trained_parameters(packed)]


def exact_gradients(packed, samples):
    """Each sample's gradient of its mean nll, fp32 [S, all trained weights], by autograd on the sample alone."""
    rows = []
    for sample in samples:
        packed.zero_grad()
        packed(pack([sample])).loss.backward()
        rows.append(torch.cat([p.grad.flatten() for _, p in trained_parameters(packed)]))
    packed.zero_grad()
    return torch.stack(rows)


def random_change(packed, seed, scale=0.01):
    """One vector in the order of `exact_gradients`."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.cat([torch.randn(p.numel(), generator=generator) for _, p in trained_parameters(packed)])


@torch.no_grad()
def move(packed, change):
    at = 0
    for _, parameter in trained_parameters(packed):
        parameter += change[at : at + parameter.numel()].view_as(parameter)
        at += parameter.numel()


def estimate(packed, samples, change, k, seed=0):
    """dL of each sample under `change`, from sketches; the model is left as it was."""
    sketch = LoraSketch(packed, k=k, seed=seed)
    batch = pack(samples, range(len(samples)))
    sketches, _ = sketch_of(packed, batch, sketch)
    order = FirstOrderRound(sketch)
    num_tokens = torch.diff(torch.searchsorted(batch.token_index, batch.cu_seqlens.long()))
    order.add(batch.rows, sketches, num_tokens, 1.0 / batch.num_items)
    move(packed, change)
    rows, changes = order.loss_changes()
    move(packed, -change)
    assert torch.equal(rows, batch.rows)
    return changes


@pytest.fixture(scope="module")
def packed():
    return PackedModel(lora_model())


def test_outer_sums_of_samples_of_any_length():
    cu = torch.tensor([0, *np.cumsum((0, *LENGTHS))], dtype=torch.int32)  # the first two samples are empty
    left, right = torch.randn(int(cu[-1]), 3), torch.randn(int(cu[-1]), 5)
    sums = SampleTiles(cu, torch.device("cpu")).outer_sums(left, right)
    expected = [left[a:b].T @ right[a:b] for a, b in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)]
    torch.testing.assert_close(sums, torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_a_sample_that_is_not_finite_spoils_no_other():
    cu = torch.tensor([0, 3, 70, 75])
    left, right = torch.randn(75, 3), torch.randn(75, 5)
    left[69], right[69] = torch.nan, torch.inf
    finite = SampleTiles(cu, torch.device("cpu")).outer_sums(left, right).isfinite().flatten(1).all(1)
    assert finite.tolist() == [True, False, True]


def test_full_projections_give_the_exact_change_of_each_sample(packed):
    samples, change = samples_of(LENGTHS), random_change(packed, 1)
    exact = exact_gradients(packed, samples[1:]) @ change
    changes = estimate(packed, samples, change, FULL)
    assert changes[0] == 0.0  # a single token has no target
    torch.testing.assert_close(changes[1:], exact, rtol=1e-4, atol=1e-6)


def test_full_projections_sum_to_the_gradients_of_the_batch_under_dropout():
    # Dropout draws once: what the sketch saw is what the step used. In the order of the trained parameters.
    packed = PackedModel(lora_model(dropout=0.3))
    packed.train()
    sketch = LoraSketch(packed, k=FULL)
    sketches, gradients = sketch_of(packed, pack(samples_of(LENGTHS)), sketch)
    torch.testing.assert_close(sketches.sum(0), torch.cat([g.flatten() for g in gradients]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("k", [1, 4])
def test_sketches_are_unbiased_and_as_noisy_as_stated(packed, k):
    samples, change, seeds = samples_of((40, 70, 25)), random_change(packed, 1), 150
    gradients = exact_gradients(packed, samples)
    exact = gradients @ change
    drawn = torch.stack([estimate(packed, samples, change, k, seed) for seed in range(seeds)]).double()
    error = drawn.std(0) / math.sqrt(seeds)
    assert ((drawn.mean(0) - exact).abs() < 4.0 * error).all()

    bound, at = torch.zeros(len(samples)), 0
    for name, parameter in trained_parameters(packed):
        part = slice(at, at + parameter.numel())
        at += parameter.numel()
        g, d = gradients[:, part].view(-1, *parameter.shape), change[part].view_as(parameter)
        product = d.T @ g if "lora_A" in name else d @ g.transpose(1, 2)
        bound += 2.0 / k * product.square().sum((1, 2))
    assert (drawn.var(0) < 1.25 * bound).all() and (drawn.var(0) > 0.1 * bound).all()


def test_a_sketch_ranks_samples_as_the_exact_changes_do(packed):
    # A change as training makes it: along the gradient of some of the samples.
    samples = samples_of(np.random.default_rng(3).integers(8, 90, 32))
    gradients = exact_gradients(packed, samples)
    change = -0.1 * gradients[:12].mean(0)
    exact = gradients @ change
    rank = exact.argsort().argsort().double()
    spearman = {}
    for k in (1, 16):
        ranks = [estimate(packed, samples, change, k, seed).argsort().argsort().double() for seed in range(3)]
        spearman[k] = [float(torch.corrcoef(torch.stack([r, rank]))[0, 1]) for r in ranks]
    assert min(spearman[16]) > 0.8 and np.mean(spearman[16]) > 0.1 + np.mean(spearman[1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(packed, reentrant):
    batch, sketch = pack(samples_of(LENGTHS)), LoraSketch(packed, k=3)
    plain, _ = sketch_of(packed, batch, sketch)
    causal = packed.causal_lm
    causal.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        causal.enable_input_require_grads()
    calls = []
    counter = sketch.adapters[0].module.register_forward_hook(lambda *_: calls.append(1))
    packed.train()
    try:
        checkpointed, _ = sketch_of(packed, batch, sketch)
    finally:
        counter.remove()
        causal.gradient_checkpointing_disable()
        causal.disable_input_require_grads() if reentrant else None
        packed.eval()
    assert len(calls) == 2  # the layer did run again
    torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-7)


def test_bf16_autocast_stays_within_its_rounding(packed):
    batch, sketch = pack(samples_of(LENGTHS)), LoraSketch(packed, k=3)
    full, _ = sketch_of(packed, batch, sketch)
    with torch.autocast("cpu", torch.bfloat16):
        half, _ = sketch_of(packed, batch, sketch)
    assert half.dtype == torch.float32
    assert float((half - full).norm() / full.norm()) < 0.05


def test_steps_accumulation_and_the_scaler_leave_each_sample_its_own_change(packed):
    sketch, samples = LoraSketch(packed, k=FULL), samples_of((9, 33, 21, 12))
    batches = [pack(samples[:2], [5, 3]), pack(samples[2:3], [8]), pack(samples[3:], [1])]
    num_items, scale, order = 1234, 2.0**10, FirstOrderRound(sketch)
    first, second = random_change(packed, 1), random_change(packed, 2)

    def add(batch):
        packed.zero_grad()
        with sketch.collect(batch.cu_seqlens) as sketches:
            out = packed(batch, num_items=num_items)
            (out.loss * scale).backward()
        order.add(batch.rows, sketches, out.samples.num_tokens, scale / num_items)

    seen_first = exact_gradients(packed, samples[:3])
    add(batches[0])  # two micro-batches of one step
    add(batches[1])
    move(packed, first)
    order.step()
    seen_second = exact_gradients(packed, samples[3:])
    add(batches[2])
    move(packed, second)
    rows, changes = order.loss_changes()
    move(packed, -first - second)
    assert rows.tolist() == [5, 3, 8, 1]
    torch.testing.assert_close(changes[:3], seen_first @ (first + second), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(changes[3:], seen_second @ second, rtol=1e-4, atol=1e-6)


def test_equal_seeds_give_equal_sketches_and_hooks_do_not_stay(packed):
    batch = pack(samples_of(LENGTHS))
    one, two, other = (sketch_of(packed, batch, LoraSketch(packed, k=2, seed=s))[0] for s in (3, 3, 4))
    assert torch.equal(one, two) and not torch.equal(one, other)
    sketch = LoraSketch(packed, k=2)
    wide = [adapter.projection for adapter in sketch.adapters if adapter.projection.shape[1] == 32]
    assert not any(torch.equal(a, b) for i, a in enumerate(wide) for b in wide[:i])
    with pytest.raises(RuntimeError, match="stop"), sketch.collect(batch.cu_seqlens):
        raise RuntimeError("stop")
    assert not any(adapter.module._forward_hooks for adapter in sketch.adapters)


def test_the_sketch_has_the_size_that_is_stated(packed):
    pairs = 2 * 5
    assert LoraSketch(packed, k=3).num_numbers == pairs * 3 * (4 + 4)
    assert LoraSketch(packed, k=3).snapshot().shape == (pairs * 3 * 8,)


def test_what_would_be_left_out_is_refused():
    with pytest.raises(ValueError, match="`k` must be at least 1"):
        LoraSketch(lora_model(), k=0)
    with pytest.raises(ValueError, match="must train LoRA weights, got Linear without any"):
        LoraSketch(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"got 1 other parameters, first .*embed_tokens"):
        LoraSketch(lora_model(modules_to_save=["embed_tokens"]))
    with pytest.raises(ValueError, match="plain LoRA layers, got Dora"):
        LoraSketch(lora_model(use_dora=True))


def test_the_estimator_foresees_the_losses_of_a_training(tmp_path, monkeypatch):
    """`lead-fast train --estimator first_order`, audited: its changes rank those that came better than no estimate does."""
    monkeypatch.setenv("LEAD_FAST_CACHE", str(tmp_path / "cache"))
    pool = tmp_path / "pool.jsonl"
    pool.write_text("".join(json.dumps(row) + "\n" for row in demo_rows(200, seed=3)), encoding="utf-8")
    options = {
        "pool": pool, "out": tmp_path / "run", "model-config": "tiny", "pretrain-epochs": 0.2, "estimator": "first_order",
        "min-rounds": 12, "budget": 60, "num-arms": 2, "tasks-per-arm": 2, "max-length": 96, "step-tokens": 512,
        "audit-every": 3, "audit-rows": 40, "audit-estimators": "none,grad_norm", "threads": 1, "learning-rate": 3e-3,
    }  # fmt: skip
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    assert main(["train", *arguments]) == 0
    errors = {e["estimator"]: e for e in lf.audit(tmp_path / "run").errors
              if (e["source"], e["rows"], e["slice"]) == ("rescored", "trained", "all")}  # fmt: skip
    assert errors["first_order"]["spearman_change"] > 0.4
    assert errors["first_order"]["mae"] < errors["none"]["mae"]
    with pytest.raises(RuntimeError, match=r"follow\(model\)"):
        engine = lf.LeadEngine(lf.Pool.from_arrays(arm=[0, 0], utility=[1.0, 2.0]), lf.LeadConfig(estimator="first_order"))
        engine.begin_round()
        statistics = torch.ones(1)
        engine.observe(torch.zeros(1, dtype=torch.int64), lf.SampleStats(*[statistics] * 5))
