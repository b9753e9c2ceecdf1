"""Numerics of the fused loss under Triton's interpreter. Run by test_interpreter.py, with TRITON_INTERPRET=1.

The interpreter's blocks are so small that these shapes cross the borders of chunks, blocks and tiles, and have several
tiles for a program. It truncates to bf16 where a card rounds, which doubles the error and gives it a sign.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace

import pytest
import torch
from lead_fast.kernels.card import chunk_rows, padded_row
from lead_fast.kernels.linear_cross_entropy import linear_cross_entropy as triton_forward
from lead_fast.kernels.logit_rows import logit_rows
from lead_fast.kernels.scaled_gradient import scaled_gradient
from lead_fast.kernels.single_pass_rows import put_targets, single_pass_rows
from loss_batches import IGNORE, OUTPUTS, Batch, assert_close, gradient_statistics, make_batch

import lead_fast as lf
import lead_fast.ops  # defines the operators
from lead_fast import reference

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 3e-2}
RAGGED = [0, 3, 17, 0, 1, 4, 0]
LONG = [20, 5, 13, 0, 2]  # of which two are longer than a hidden size of 8


@pytest.fixture(autouse=True)
def _uninitialised_is_nan() -> Iterator[None]:
    """torch.empty gives NaN, so that nothing is read before it is written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def single_pass_forward(*args) -> tuple[torch.Tensor, ...]:
    return triton_forward(*args, single_pass=True)


FORWARDS = (triton_forward, single_pass_forward)


def check(batch: Batch, forward=triton_forward, **options) -> dict[str, torch.Tensor]:
    got = batch.run(forward, **options)
    assert_close(got, batch.truth(**options), TOLERANCE[batch.hidden.dtype])
    return got


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("softcap, logit_scale, bias", [(0.0, 1.0, False), (3.0, 0.7, True)])
@pytest.mark.parametrize("forward", FORWARDS)
def test_all_outputs(forward, dtype, softcap, logit_scale, bias):
    batch = make_batch(RAGGED, 24, 150, dtype=dtype, softcap=softcap, logit_scale=logit_scale, bias=bias)
    assert chunk_rows(25, 24, 150, batch.hidden.element_size(), "interpreter", True) < 25, "one chunk tests too little"
    check(batch, forward)


@pytest.mark.parametrize("softcap", [30.0, 1e3, 1e6, 1e8])
@pytest.mark.parametrize("forward", FORWARDS)
def test_a_cap_far_above_the_logits_keeps_their_digits(forward, softcap):
    check(make_batch(RAGGED, 24, 150, softcap=softcap), forward)


@pytest.mark.parametrize("weight_grad", [True, False])
def test_torch_s_own_checks_pass(weight_grad):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=generator, requires_grad=True) for shape in ((7, 8), (11, 8), (11,)))
    labels = torch.tensor([1, 2, -100, 4, 10, 0, 3])
    scale, bounds = (labels != -100) * torch.rand(7, generator=generator), torch.tensor([0, 3, 3, 7])
    flags = (True, weight_grad, weight_grad, reference.STATS_ALL)
    arguments = (hidden, weight, bias, labels, bounds, scale, -100, 3.0, 0.7, *flags)
    torch.library.opcheck(torch.ops.lead_fast.linear_cross_entropy.triton, arguments)
    scaled = (torch.randn(5, 4, generator=generator), torch.randn(5, generator=generator), torch.float16)
    torch.library.opcheck(torch.ops.lead_fast.scaled_gradient.triton, scaled)


def test_a_gradient_norm_is_never_negative():
    """Equal hidden states under a head that gives them equal logits, labels in balance: the sample's gradient is 0."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(1, 16, generator=generator), torch.randn(3, 16, generator=generator)
    weight -= (weight @ hidden.T) @ hidden / hidden.square().sum()
    labels = torch.arange(12) % 3
    out = lf.linear_cross_entropy(hidden.repeat(12, 1), weight, labels, torch.tensor([0, 12]), backend="triton")
    assert 0.0 <= float(out.samples.grad_norm_sq[0]) < 1e-3


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_samples_longer_than_the_hidden_size(dtype):
    check(make_batch(LONG, 8, 40, dtype=dtype))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_samples_as_long_as_the_hidden_size(dtype):
    check(make_batch([4, 5, 6], 5, 40, dtype=dtype, ignored=0.0))


@pytest.mark.parametrize("vocab, hidden_size", [(1, 3), (2, 1), (64, 16), (128, 17), (129, 33), (257, 40)])
@pytest.mark.parametrize("forward", FORWARDS)
def test_sizes_at_block_borders(forward, vocab, hidden_size):
    check(make_batch([5, 2], hidden_size, vocab), forward)


@pytest.mark.parametrize("softcap, logit_scale, bias", [(0.0, 1.0, False), (2.0, 1.5, True)])
@pytest.mark.parametrize("lengths, hidden_size", [([1, 4, 0, 6], 12), ([11, 3], 4)])
def test_statistics_match_autograd(lengths, hidden_size, softcap, logit_scale, bias):
    batch = make_batch(lengths, hidden_size, 70, softcap=softcap, logit_scale=logit_scale, bias=bias)
    stats = batch.run(triton_forward)["sample_stats"][:, 2:].double()
    torch.testing.assert_close(stats, gradient_statistics(batch), rtol=5e-6, atol=1e-12)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_no_tokens(lengths):
    batch = make_batch(lengths, 8, 20, bias=True)
    got = check(batch)
    assert all(not got[name].any() for name in OUTPUTS)


def test_all_ignored():
    got = check(make_batch([3, 2], 8, 20, bias=True, ignored=1.0))
    assert all(not got[name].any() for name in OUTPUTS)


def test_int32_offsets_and_strided_inputs():
    batch = make_batch([3, 7, 2], 24, 50, bias=True)

    def every_second(tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack([tensor, tensor], dim=-1)[..., 0]

    tensors = {f.name: every_second(getattr(batch, f.name)) for f in fields(Batch)[:6]}
    strided = replace(batch, **tensors | {"cu_seqlens": every_second(batch.cu_seqlens.int())})
    assert not any(tensor.is_contiguous() for tensor in tensors.values())
    got, want = strided.run(triton_forward), batch.run(triton_forward)
    assert all(torch.equal(got[name], want[name]) for name in OUTPUTS)


def test_inputs_stay_as_they_are():
    batch = make_batch([3, 7, 2], 24, 50, bias=True)
    before = {f.name: getattr(batch, f.name).clone() for f in fields(Batch)[:6]}
    batch.run(triton_forward)
    assert all(torch.equal(getattr(batch, name), value) for name, value in before.items())


@pytest.mark.parametrize("forward", FORWARDS)
def test_two_runs_give_the_same_bits(forward):
    batch = make_batch([9, 2, 0, 4], 6, 90, dtype=torch.bfloat16, bias=True)
    first, second = batch.run(forward), batch.run(forward)
    assert all(torch.equal(first[name], second[name]) for name in OUTPUTS)


@pytest.mark.parametrize("stats", [reference.STATS_NONE, reference.STATS_LOSS])
@pytest.mark.parametrize("hidden_grad, weight_grad", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("forward", FORWARDS)
def test_only_what_is_asked_for(forward, stats, hidden_grad, weight_grad):
    batch = make_batch([3, 0, 4], 12, 90, bias=True)
    check(batch, forward, stats=stats, hidden_grad=hidden_grad, weight_grad=weight_grad)


def test_statistics_without_gradients():
    check(make_batch(RAGGED, 12, 90), hidden_grad=False, weight_grad=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("forward, hidden_size", [(triton_forward, 12), (triton_forward, 3), (single_pass_forward, 12)])
def test_non_finite_hidden_states_stay_in_their_sample(forward, hidden_size, value):
    clean = make_batch([2, 5, 2], hidden_size, 90, ignored=0.0)
    hidden = clean.hidden.clone()
    hidden[0, 2] = value  # the row that masked loads would fall on
    got, want = replace(clean, hidden=hidden).run(forward), clean.run(forward)
    assert got["nll"][0].isnan() and got["d_hidden"][0].isnan().all()
    assert got["sample_stats"][0, [0, 2, 3, 4]].isnan().all() and got["sample_stats"][0, 1] == 2
    assert torch.equal(got["nll"][1:], want["nll"][1:])
    assert torch.equal(got["d_hidden"][1:], want["d_hidden"][1:])
    assert torch.equal(got["sample_stats"][1:], want["sample_stats"][1:])


def test_ignored_rows_may_hold_anything():
    batch = make_batch([2, 5, 2], 12, 90, bias=True)
    want = batch.run(triton_forward)
    ignored = batch.labels == IGNORE
    got = replace(batch, hidden=batch.hidden.masked_fill(ignored[:, None], torch.nan)).run(triton_forward)
    assert ignored.any() and all(torch.equal(got[name], want[name]) for name in OUTPUTS)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("forward", FORWARDS)
def test_a_token_under_weight_zero_adds_exactly_nothing(forward, value):
    batch = make_batch([2, 5, 2], 12, 90, bias=True, ignored=0.0)
    batch.token_scale[5] = 0
    want = batch.run(forward)
    hidden = batch.hidden.clone()
    hidden[5] = value
    got = replace(batch, hidden=hidden).run(forward)
    assert got["nll"][5].isnan()
    assert all(torch.equal(got[name], want[name]) for name in ("loss", "d_weight", "d_bias"))


@pytest.mark.parametrize("forward", FORWARDS)
def test_vocabulary_entries_that_are_masked_out(forward):
    batch = make_batch([6], 12, 300, bias=True, ignored=0.0)
    bias = batch.bias.clone()
    bias[100:290] = float("-inf")
    labels = torch.tensor([3, 99, 290, 120, 299, 5])
    got = replace(batch, bias=bias, labels=labels).run(forward)
    want = replace(batch, bias=bias, labels=labels).truth()
    assert got["nll"][3] == float("inf") and want["nll"][3] == float("inf")
    torch.testing.assert_close(got["nll"].double(), want["nll"], rtol=2e-6, atol=0)
    torch.testing.assert_close(got["d_hidden"].double(), want["d_hidden"], rtol=0, atol=2e-6)


@pytest.mark.parametrize("bad", [-1, 128, 1 << 40, -(1 << 40)])  # 128 would be the next row's first logit
@pytest.mark.parametrize("forward", FORWARDS)
def test_labels_out_of_range(forward, bad):
    clean = make_batch([2, 5, 2], 12, 128, ignored=0.2)
    labels = clean.labels.clone()
    labels[[3, 5]] = bad
    batch = replace(clean, labels=labels)
    got = check(batch, forward)
    assert got["bad_labels"] == 2
    assert got["nll"][[3, 5]].isnan().all() and got["nll"].isnan().sum() == 2
    assert got["sample_stats"][1].isnan().sum() == 4 and not got["sample_stats"][[0, 2]].isnan().any()


def rows_of_logits(
    logits: torch.Tensor, labels: torch.Tensor, single_pass: bool, softcap: float = 0.0
) -> tuple[torch.Tensor, ...]:
    """nll, ||delta||^2 and the gradient of given logits."""
    rows, vocab = logits.shape
    chunk = torch.full((rows, padded_row(vocab)), torch.nan, dtype=logits.dtype)[:, :vocab]
    chunk.copy_(logits)
    nll, delta_sq = torch.empty(rows), torch.empty(rows)
    options = {"ignore_index": IGNORE, "softcap": softcap, "logit_scale": 1.0}
    if not single_pass:
        logit_rows(chunk, labels, nll, delta_sq, write_delta=True, **options)
        return nll, delta_sq, chunk
    inverse, target = single_pass_rows(chunk, labels, nll, delta_sq, **options)
    assert not chunk.gather(1, labels[:, None]).any(), "the target waits outside"
    put_targets(chunk, labels, target)
    return nll, delta_sq, inverse[:, None] * chunk


@pytest.mark.parametrize("single_pass", [False, True])
def test_losses_near_zero_and_above_200_keep_their_digits(single_pass):
    vocab = 200
    margins = torch.tensor([-250.0, -90.0, -52.0, -49.0, -3.0, 0.0, 1.0, 7.0, 20.0, 40.0, 60.0])  # of the target
    logits = torch.full((len(margins), vocab), 11.0)
    logits[:, 150] += margins
    nll, delta_sq, delta = rows_of_logits(logits, torch.full((len(margins),), 150), single_pass)
    others = (vocab - 1) * torch.exp(-margins.double())
    total = 1 + others
    torch.testing.assert_close(nll.double(), others.log1p(), rtol=2e-6, atol=0)
    torch.testing.assert_close(delta[:, 150].double(), -others / total, rtol=8e-6, atol=0)
    torch.testing.assert_close(delta_sq.double(), (others / total) ** 2 * (1 + 1 / (vocab - 1)), rtol=2e-5, atol=1e-30)


@pytest.mark.parametrize("softcap", [0.0, 80.0])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_rows_that_single_pass_must_repair(dtype, tolerance, softcap):
    logits = torch.randn(7, 700)
    labels = torch.tensor([650, 3, 300, 300, 699, 0, 9])
    logits[0, 5] = 60.0  # passes the limit in the first block,
    logits[1, 690] = 55.0  # in the last one,
    logits[2, [140, 520]] = torch.tensor([70.0, 400.0])  # twice,
    logits[3, 140:580] = 56.0  # in many groups,
    logits[4] -= 300  # nowhere, although the logits are far from 0,
    logits[5, 0] = -75.0  # everywhere,
    logits[6] = 48.5  # in one group, but all others are close
    logits[6, [9, 444]] = torch.tensor([0.0, 51.0])
    logits = logits.to(dtype)
    nll, delta_sq, delta = rows_of_logits(logits, labels, single_pass=True, softcap=softcap)
    z = logits.double().requires_grad_()
    capped = softcap * torch.tanh(z / softcap) if softcap > 0 else z
    want = torch.nn.functional.cross_entropy(capped, labels, reduction="none")
    want.sum().backward()
    at_logits = capped.detach().softmax(1) - torch.nn.functional.one_hot(labels, 700)
    torch.testing.assert_close(nll.double(), want.detach(), rtol=2e-6, atol=0)
    torch.testing.assert_close(delta_sq.double(), at_logits.square().sum(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(delta.double(), z.grad, rtol=0, atol=tolerance)


@pytest.mark.parametrize("single_pass", [False, True])
def test_a_cap_that_every_logit_has_reached(single_pass):
    """1 - tanh^2 from 1e-3 to 1e-13 keeps its digits."""
    logits = torch.linspace(4.0, 15.0, 150).repeat(3, 1) * torch.where(torch.arange(150) % 3 > 0, 1.0, -1.0)
    labels = torch.tensor([0, 70, 149])
    _, _, delta = rows_of_logits(logits, labels, single_pass, softcap=1.0)
    z = logits.double().requires_grad_()
    torch.nn.functional.cross_entropy(torch.tanh(z), labels, reduction="sum").backward()
    torch.testing.assert_close(delta.double(), z.grad, rtol=2e-5, atol=1e-15)


@pytest.mark.parametrize("single_pass", [False, True])
@pytest.mark.parametrize("column, value", [(0, float("inf")), (7, float("inf")), (0, float("nan")), (7, float("nan"))])
def test_logits_that_are_not_finite_give_nan(single_pass, column, value):
    logits = torch.randn(2, 150)
    logits[0, column] = value
    nll, delta_sq, delta = rows_of_logits(logits, torch.tensor([7, 7]), single_pass)
    assert nll[0].isnan() and delta_sq[0].isnan() and delta[0].isnan().all()
    assert nll[1].isfinite() and delta[1].isfinite().all()


@pytest.mark.parametrize("single_pass", [False, True])
def test_a_row_of_minus_infinity_is_nan_like_in_torch(single_pass):
    nll, _, delta = rows_of_logits(torch.full((1, 150), float("-inf")), torch.tensor([7]), single_pass)
    assert nll.isnan().all() and delta.isnan().all()


def test_small_weights_in_fp16():
    batch = make_batch([20], 24, 40, dtype=torch.float16)
    batch.token_scale.mul_(1e-7)
    got, want = batch.run(triton_forward)["d_weight"].double(), batch.truth()["d_weight"]
    assert (got - want).abs().max() <= 2e-3 * want.abs().max()


def test_logits_are_scaled_before_the_cap():
    batch = make_batch([4], 6, 30, softcap=2.0, logit_scale=3.0, ignored=0.0)
    logits = 2 * torch.tanh(3 * (batch.hidden @ batch.weight.T) / 2)
    want = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="none")
    torch.testing.assert_close(batch.run(triton_forward)["nll"], want)


@pytest.mark.parametrize("dtype, out_dtype", [(torch.float32, torch.float16), (torch.float16, torch.float16)])
@pytest.mark.parametrize("shape, rows", [((5, 40), 5), ((5, 40), None), ((40,), None), ((0, 4), 0), ((3, 0), 3)])
def test_scaled_gradient(shape, rows, dtype, out_dtype):
    gradient = torch.randn(shape).to(dtype)
    upstream = torch.randn([] if rows is None else [rows])
    if rows:
        upstream[1:2] = 0
        gradient[1:2] = torch.nan
    got = scaled_gradient(gradient, upstream, out_dtype)
    want = upstream[..., None] * gradient.float() if rows is not None else upstream * gradient.float()
    assert got.dtype == out_dtype
    torch.testing.assert_close(got, want.masked_fill(want.isnan(), 0).to(out_dtype), rtol=1e-3, atol=1e-6)
    assert not scaled_gradient(gradient, torch.zeros_like(upstream), out_dtype).any()


@pytest.mark.parametrize("reduction", ["mean", "sample_mean", "sum", "none"])
@pytest.mark.parametrize("trained", [False, True])
def test_how_many_products_a_step_takes(monkeypatch, trained, reduction):
    """Of all supervised tokens, forward and backward: 2 with a frozen head, 3 with a trained one, 4 where "none" needs dW."""
    batch = make_batch([20, 3, 30], 12, 70)
    index = (batch.labels != IGNORE).nonzero().flatten()
    flops = []

    def counted(product, first):
        def call(*args, **kwargs):
            a, b = args[first : first + 2]
            flops.append(a.shape[0] * a.shape[1] * b.shape[1])
            return product(*args, **kwargs)

        return call

    monkeypatch.setattr(torch, "mm", counted(torch.mm, 0))
    monkeypatch.setattr(torch, "addmm", counted(torch.addmm, 1))
    hidden, weight = batch.hidden.clone().requires_grad_(), batch.weight.clone().requires_grad_(trained)
    out = lf.linear_cross_entropy(
        hidden, weight, batch.labels, batch.cu_seqlens, reduction=reduction, token_index=index, backend="triton"
    )
    out.loss.sum().backward()
    products = 2 + trained * (2 if reduction == "none" else 1)
    assert len(index) < 53 and sum(flops) == products * len(index) * 12 * 70


@pytest.mark.parametrize("reduction", ["mean", "sample_mean", "sum", "none"])
def test_the_public_operator(reduction):
    batch = make_batch([2, 5, 2], 12, 70, bias=True)
    index = torch.tensor([0, 2, 3, 4, 5, 8])
    results = {}
    for backend in ("triton", "reference"):
        inputs = [t.clone().requires_grad_() for t in (batch.hidden, batch.weight, batch.bias)]
        out = lf.linear_cross_entropy(
            inputs[0], inputs[1], batch.labels, batch.cu_seqlens, bias=inputs[2], softcap=4.0, reduction=reduction,
            token_index=index, backend=backend,
        )  # fmt: skip
        out.loss.sum().backward()
        results[backend] = [out.loss.detach(), *(t.grad for t in inputs), *out.samples]
    for got, want in zip(results["triton"], results["reference"], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
