"""The fused loss on a real card: numerics, determinism, no synchronisation, CUDA graphs, sizes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from loss_batches import IGNORE, OUTPUTS, Batch, assert_close, make_batch

pytest.importorskip("triton", reason="triton is not installed")

from lead_fast.kernels.card import padded_row
from lead_fast.kernels.linear_cross_entropy import linear_cross_entropy as triton_forward
from lead_fast.kernels.logit_rows import logit_rows

import lead_fast as lf
from lead_fast import reference

pytestmark = pytest.mark.cuda
single_pass_forward = partial(triton_forward, single_pass=True)
FORWARDS = [pytest.param(triton_forward, id="two_pass"), pytest.param(single_pass_forward, id="single_pass")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
BESIDE_PLAIN = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # about one unit in the last place
MIXED = [300, 0, 1, 77, 512, 64, 65, 0, 200]


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """fp32 products in fp32, whatever another test has set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def plain(batch: Batch) -> dict[str, torch.Tensor]:
    """nll, d_hidden and d_weight by ordinary PyTorch in the dtype of the batch."""
    hidden, weight = batch.hidden.clone().requires_grad_(), batch.weight.clone().requires_grad_()
    logits = batch.logit_scale * torch.nn.functional.linear(hidden, weight, batch.bias)
    if batch.softcap > 0:
        logits = batch.softcap * torch.tanh(logits / batch.softcap)
    nll = torch.nn.functional.cross_entropy(logits.float(), batch.labels, reduction="none", ignore_index=IGNORE)
    (d_hidden,) = torch.autograd.grad(nll.sum(), hidden, retain_graph=True)
    (d_weight,) = torch.autograd.grad((nll * batch.token_scale).sum(), weight)
    return {"nll": nll.detach(), "d_hidden": d_hidden, "d_weight": d_weight}


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap, logit_scale, bias", [(0.0, 1.0, False), (30.0, 0.5, True)])
@pytest.mark.parametrize("lengths, hidden_size, vocab", [(MIXED, 256, 5003), ([700, 3, 500], 96, 1024)])
def test_all_outputs(forward, dtype, softcap, logit_scale, bias, lengths, hidden_size, vocab):
    batch = make_batch(
        lengths, hidden_size, vocab, dtype=dtype, device="cuda", softcap=softcap, logit_scale=logit_scale, bias=bias
    )
    got, truth, ordinary = batch.run(forward), batch.truth(), plain(batch)
    assert_close(got, truth, TOLERANCE[dtype])
    for name, value in ordinary.items():
        scale = truth[name].abs().max()
        error = (got[name].double() - truth[name]).abs().max() / scale
        allowed = (value.double() - truth[name]).abs().max() / scale
        assert error <= allowed + BESIDE_PLAIN[dtype], f"{name}: {error} against {allowed} of plain PyTorch in {dtype}"


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("vocab", [1, 127, 32000, 50257, 151936, 256000])
def test_vocabularies(forward, vocab):
    batch = make_batch([40, 0, 24], 64, vocab, dtype=torch.bfloat16, device="cuda")
    assert_close(batch.run(forward), batch.truth(), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("lengths", [[3000], [1] * 3000, [2900, *[4] * 25], []])
def test_lengths_of_samples(lengths):
    batch = make_batch(lengths, 512, 2000, dtype=torch.bfloat16, device="cuda")
    assert_close(batch.run(triton_forward), batch.truth(), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_give_the_same_bits(forward, dtype):
    batch = make_batch(MIXED, 512, 20011, dtype=dtype, device="cuda", bias=True)
    first = batch.run(forward)
    for _ in range(5):
        again = batch.run(forward)
        assert all(torch.equal(first[name], again[name]) for name in OUTPUTS)


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("weight_grad", [False, True])
@pytest.mark.parametrize("stats", [reference.STATS_NONE, reference.STATS_LOSS, reference.STATS_ALL])
def test_nothing_synchronises_with_the_host(forward, weight_grad, stats):
    batch = make_batch(MIXED, 256, 5003, dtype=torch.bfloat16, device="cuda", bias=True)
    run = partial(batch.run, forward, weight_grad=weight_grad, stats=stats)
    want = run()
    with no_synchronisation():
        got = run()
    assert all(torch.equal(got[name].nan_to_num(), want[name].nan_to_num()) for name in OUTPUTS)


@pytest.mark.parametrize("forward", FORWARDS)
def test_cuda_graph(forward):
    """A captured call serves other labels and other lengths of the same totals."""
    batch = make_batch(MIXED, 256, 5003, dtype=torch.bfloat16, device="cuda", bias=True)
    other = make_batch(MIXED[::-1], 256, 5003, dtype=torch.bfloat16, device="cuda", bias=True, ignored=0.6, seed=1)
    inputs = replace(batch, **{f.name: getattr(batch, f.name).clone() for f in fields(Batch)[:6]})
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        inputs.run(forward)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = inputs.run(forward)
    for source in (batch, other):
        for field in fields(Batch)[:6]:
            getattr(inputs, field.name).copy_(getattr(source, field.name))
        graph.replay()
        want = source.run(forward)
        assert all(torch.equal(captured[name], want[name]) for name in OUTPUTS)


def loss_and_gradients(inputs: Batch, reduction: str) -> list[torch.Tensor]:
    """Forward and backward of the public operator under an upstream gradient of its own for each token or for all."""
    leaves = [t.detach().requires_grad_() for t in (inputs.hidden, inputs.weight, inputs.bias)]
    out = lf.linear_cross_entropy(
        leaves[0], leaves[1], inputs.labels, inputs.cu_seqlens, bias=leaves[2], reduction=reduction, backend="triton"
    )
    upstream = inputs.token_scale if reduction == "none" else inputs.token_scale.sum()
    gradients = torch.autograd.grad(out.loss, leaves, upstream)
    return [out.loss.detach(), *out.samples, *gradients]


@pytest.mark.parametrize("reduction", ["mean", "sample_mean", "none"])
def test_cuda_graph_of_forward_and_backward(reduction):
    """A captured step serves other values, labels, lengths and upstream gradients; "none" captures the recomputation."""
    batch = make_batch(MIXED, 256, 5003, dtype=torch.bfloat16, device="cuda", bias=True)
    other = make_batch(MIXED[::-1], 256, 5003, dtype=torch.bfloat16, device="cuda", bias=True, ignored=0.6, seed=1)
    inputs = replace(batch, **{f.name: getattr(batch, f.name).clone() for f in fields(Batch)[:6]})
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        loss_and_gradients(inputs, reduction)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss_and_gradients(inputs, reduction)
    for source in (other, batch):
        for field in fields(Batch)[:6]:
            getattr(inputs, field.name).copy_(getattr(source, field.name))
        graph.replay()
        want = loss_and_gradients(source, reduction)
        assert all(torch.equal(got, expected) for got, expected in zip(captured, want, strict=True))
        assert captured[0].any() and all(gradient.any() for gradient in captured[-3:])


def test_a_side_stream():
    batch = make_batch(MIXED, 256, 5003, dtype=torch.bfloat16, device="cuda")
    want = batch.run(triton_forward)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = batch.run(triton_forward)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(got[name], want[name]) for name in OUTPUTS)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_current():
    batch = make_batch(MIXED, 256, 5003, dtype=torch.bfloat16, device="cuda:1")
    with torch.cuda.device(0):
        got = batch.run(triton_forward)
    assert_close(got, batch.truth(), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_hidden_states_stay_in_their_sample(forward, value):
    clean = make_batch([100, 300, 20], 256, 5003, dtype=torch.bfloat16, device="cuda", ignored=0.0)
    hidden = clean.hidden.clone()
    hidden[0, 3] = value
    clean.token_scale[0] = 0
    got, want = replace(clean, hidden=hidden).run(forward), clean.run(forward)
    assert got["nll"][0].isnan() and got["sample_stats"][0, [0, 2, 3, 4]].isnan().all()
    assert torch.equal(got["nll"][1:], want["nll"][1:]) and torch.equal(got["d_hidden"][1:], want["d_hidden"][1:])
    assert torch.equal(got["sample_stats"][1:], want["sample_stats"][1:])
    assert torch.equal(got["loss"], want["loss"]) and torch.equal(got["d_weight"], want["d_weight"])


@pytest.mark.parametrize("forward", FORWARDS)
def test_labels_out_of_range(forward):
    batch = make_batch([100, 300, 20], 256, 5003, dtype=torch.bfloat16, device="cuda")
    batch.labels[[100, 101, 399]] = torch.tensor([-1, 5003, 1 << 40], device="cuda")
    got = batch.run(forward)
    assert_close(got, batch.truth(), TOLERANCE[torch.bfloat16])
    assert got["bad_labels"] == 3 and got["nll"].isnan().sum() == 3


@pytest.mark.parametrize("forward", FORWARDS)
def test_rows_that_overflow_the_anchor(forward):
    """Losses from 0 to above 200, in one batch."""
    batch = make_batch([600], 64, 5003, dtype=torch.float32, device="cuda", ignored=0.0)
    spread = torch.linspace(0, 60, 600, device="cuda")[:, None]
    batch = replace(batch, hidden=batch.hidden * spread, weight=batch.weight / 2)
    got, truth = batch.run(forward), batch.truth()
    assert truth["nll"].max() > 200
    torch.testing.assert_close(got["nll"].double(), truth["nll"], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(got["d_hidden"].double(), truth["d_hidden"], rtol=0, atol=1e-4)


def test_logits_beyond_2_to_the_31_elements():
    vocab = 128256
    rows = (1 << 31) // padded_row(vocab) + 64
    if torch.cuda.mem_get_info()[0] < 3 * rows * vocab * 2:
        pytest.skip("needs 13 GiB of free device memory")
    logits = torch.zeros(rows, padded_row(vocab), dtype=torch.bfloat16, device="cuda")[:, :vocab]
    last = torch.randn(64, vocab, device="cuda").bfloat16()
    logits[-64:] = last
    labels = torch.arange(rows, device="cuda") % vocab
    nll, delta_sq = torch.empty(2, rows, device="cuda")
    logit_rows(logits, labels, nll, delta_sq, ignore_index=IGNORE, softcap=0.0, logit_scale=1.0, write_delta=True)
    want = torch.nn.functional.cross_entropy(last.float(), labels[-64:], reduction="none")
    torch.testing.assert_close(nll[-64:], want, rtol=1e-5, atol=1e-5)
    probability = last.float().softmax(1)
    torch.testing.assert_close(logits[-64:, :9].float(), probability[:, :9], rtol=1e-2, atol=1e-9)


@pytest.mark.parametrize("weight_grad", [False, True])
def test_more_than_2_to_the_31_logits_in_chunks(weight_grad):
    batch = make_batch([4096] * 5, 128, 128256, dtype=torch.bfloat16, device="cuda", bias=weight_grad)
    assert batch.hidden.shape[0] * batch.weight.shape[0] > 1 << 31
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    got = batch.run(triton_forward, weight_grad=weight_grad)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 5 << 30 if weight_grad else peak < 3 << 29
    some = torch.arange(0, 20480, 331, device="cuda")
    logits = torch.nn.functional.linear(batch.hidden[some].float(), batch.weight.float())
    logits = logits if batch.bias is None else logits + batch.bias.float()
    want = torch.nn.functional.cross_entropy(logits, batch.labels[some], reduction="none", ignore_index=IGNORE)
    torch.testing.assert_close(got["nll"][some], want, rtol=0, atol=5e-2)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_public_operator_compiles_into_one_graph(reduction):
    batch = make_batch([100, 300, 20], 128, 5003, dtype=torch.bfloat16, device="cuda")

    def step(hidden, weight):
        options = {"reduction": reduction, "backend": "triton"}
        out = lf.linear_cross_entropy(hidden, weight, batch.labels, batch.cu_seqlens, **options)
        return out.loss.sum(), out.samples.grad_norm_sq

    results = []
    for call in (step, torch.compile(step, fullgraph=True)):
        hidden, weight = batch.hidden.clone().requires_grad_(), batch.weight.clone().requires_grad_()
        loss, statistic = call(hidden, weight)
        loss.backward()
        results.append((loss.detach(), statistic, hidden.grad, weight.grad))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-2, atol=1e-4)
