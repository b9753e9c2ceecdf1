"""`linear_cross_entropy` against plain PyTorch in fp64, and its statistics against autograd one sample at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cross_entropy_truth import (
    BACKENDS,
    DTYPES,
    TOLERANCE,
    Case,
    assert_as_good,
    make_case,
    plain_stats,
    run,
    run_plain,
)
from torch import Tensor

from lead_fast.ops import linear_cross_entropy

REDUCTIONS = ["mean", "sample_mean", "sum", "none"]
BACKEND_DTYPES = [
    pytest.param(*backend.values, dtype, id=f"{backend.id}-{str(dtype).removeprefix('torch.')}", marks=backend.marks)
    for backend in BACKENDS
    for dtype in DTYPES[str(backend.id)]
]


def check(case: Case, backend: tuple[str, str], upstream: Tensor | None = None, tolerance: float | None = None) -> None:
    """Loss, every gradient and every statistic by the tolerance rule."""
    tolerance = TOLERANCE[case.dtype] if tolerance is None else tolerance
    found, stats = run(case, backend, upstream)
    truth, same_dtype = (run_plain(case, dtype, upstream) for dtype in (torch.float64, case.dtype))
    for name, value in found.items():
        assert_as_good(name, value, same_dtype[name], truth[name], tolerance)
    true_stats, plain = plain_stats(case, torch.float64), plain_stats(case, case.dtype)
    for name, value in stats._asdict().items():
        assert_as_good(name, value, getattr(plain, name), getattr(true_stats, name), tolerance)
    assert torch.equal(stats.num_tokens, true_stats.num_tokens)


@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_dtype_and_reduction(backend: tuple[str, str], dtype: torch.dtype, reduction: str) -> None:
    case = make_case(dtype=dtype, reduction=reduction, bias=True)
    upstream = torch.randn(case.labels.shape) if reduction == "none" else torch.tensor(-1.7)
    check(case, backend, upstream)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("softcap", "logit_scale", "bias"),
    [(3.0, 1.0, False), (None, 0.37, False), (2.0, -1.5, True), (0.5, 4.0, False)],  # the last one saturates the cap
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cap_and_scale(
    backend: tuple[str, str], softcap: float | None, logit_scale: float, bias: bool, dtype: torch.dtype
) -> None:
    check(make_case(softcap=softcap, logit_scale=logit_scale, bias=bias, dtype=dtype), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cap_that_every_logit_has_reached(backend: tuple[str, str]) -> None:
    """1 - tanh^2 from 1e-3 to 1e-13: the gradient keeps its digits where the difference itself has none left."""
    case = make_case((6, 5), width=4, vocab=90, ignored=0, bias=True, softcap=0.5, reduction="none")
    assert case.bias is not None
    signs = torch.where(torch.arange(90) % 3 > 0, 1.0, -1.0)
    case = replace(case, weight=case.weight * 0.1, bias=signs * torch.linspace(2.5, 7.5, 90))
    found, stats = run(case, backend)
    truth, true_stats = run_plain(case, torch.float64), plain_stats(case, torch.float64)
    for name in ("hidden", "weight", "bias"):
        size = truth[name].abs() if name == "bias" else truth[name].abs().amax(1, keepdim=True)
        assert ((found[name] - truth[name]).abs() <= 5e-5 * size + 1e-16).all(), name
    for name in ("hidden_grad_sq", "grad_norm_sq"):
        torch.testing.assert_close(getattr(stats, name), getattr(true_stats, name), rtol=5e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_that_cancels_large_products(backend: tuple[str, str], dtype: torch.dtype) -> None:
    """In bf16 a logit keeps the digits of the sum only where it is rounded after the bias was added."""
    case = make_case((1,), width=16, vocab=60, ignored=0, dtype=dtype, spread=20.0, softcap=0.5)
    bias = (torch.randn(60, dtype=torch.float64) - case.weight @ case.hidden[0]).to(dtype).double()
    check(replace(case, bias=bias), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_token_weights_index_and_num_items(backend: tuple[str, str], reduction: str) -> None:
    case = make_case(reduction=reduction, bias=True)
    weights = torch.rand(case.labels.shape) - 0.3
    weights[::4] = 0
    index = (case.labels != -100).nonzero().squeeze(1)
    upstream = torch.randn(case.labels.shape) if reduction == "none" else torch.tensor(0.6)
    options = {"num_items": torch.tensor([17])} if reduction == "mean" else {}
    check(case.with_options(token_weights=weights, **options), backend, upstream)
    check(case.with_options(token_weights=weights, token_index=index, **options), backend, upstream)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("lengths", "width", "vocab"),
    [
        pytest.param((1,), 1, 1, id="one-token-one-word"),
        pytest.param((5,), 3, 2, id="tiny"),
        pytest.param((16, 16), 32, 256, id="aligned"),
        pytest.param((3, 0, 0, 40, 2), 17, 2049, id="ragged-rows-over-a-block"),
        pytest.param((60, 31, 33), 40, 61, id="samples-shorter-and-longer-than-the-width"),
        pytest.param((300, 5, 290), 288, 67, id="gram-over-a-tile"),
        pytest.param((600, 2), 270, 50, id="outer-product-over-a-tile-and-several-chunks"),
        pytest.param((33, 7), 1289, 200, id="products-of-three-parts"),
    ],
)
def test_shapes(backend: tuple[str, str], lengths: tuple[int, ...], width: int, vocab: int) -> None:
    check(make_case(lengths, width, vocab, ignored=0.2 if sum(lengths) > 1 else 0.0), backend)


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend.id == "cpp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_share_the_vocabulary(backend: tuple[str, str], dtype: torch.dtype, threads: int) -> None:
    """Whichever thread has a token's label, or all of its probability; the last thread's rows end inside a tile."""
    case = make_case((150, 130), width=49, vocab=1153, ignored=0.1, bias=True, dtype=dtype)
    case = replace(case, hidden=case.hidden + 3 * case.weight[case.labels.clamp(min=0)])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(case, backend)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("tokens", [100, 700])
def test_losses_without_a_gradient_are_those_with_one(tokens: int) -> None:
    """To the bit: no logits are kept then, of any of a chunk's tokens."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(tokens, 64, requires_grad=True), torch.randn(3000, 64) / 8
    labels, boundaries = torch.randint(3000, (tokens,)), torch.tensor([0, 40, tokens])
    expected = linear_cross_entropy(hidden, weight, labels, boundaries, backend="cpp")
    got = linear_cross_entropy(hidden.detach(), weight, labels, boundaries, backend="cpp", stats="loss")
    assert expected.samples is not None and got.samples is not None
    assert torch.equal(got.loss, expected.loss.detach()) and torch.equal(got.samples.loss, expected.samples.loss)


def test_an_early_thread_takes_logits_from_the_others() -> None:
    """More threads than cores are never equally far: whoever computes a block, its sums are the same to the bit."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(1000, 96, requires_grad=True), torch.randn(9000, 96) / 10
    labels, boundaries = torch.randint(9000, (1000,)), torch.tensor([0, 1000])

    def run(backend: str) -> list[torch.Tensor]:
        out = linear_cross_entropy(hidden, weight, labels, boundaries, backend=backend)
        assert out.samples is not None
        return [out.loss.detach(), *torch.autograd.grad(out.loss, hidden), *out.samples]

    before = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        first, *others = [run("cpp") for _ in range(10)]
    finally:
        torch.set_num_threads(before)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    for got, expected in zip(first, run("reference"), strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(("threads", "tokens", "width", "vocab"), [(7, 130, 700, 300), (9, 100, 40, 50), (40, 260, 1200, 90)])
def test_more_threads_than_the_vocabulary_gives_work_to(threads, tokens, width, vocab, frozen) -> None:
    """With a frozen head they share the tokens as well, where parts of d_hidden would outgrow the logits."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(tokens, width), torch.randn(vocab, width) / width**0.5
    labels, boundaries = torch.randint(vocab, (tokens,)), torch.tensor([0, tokens // 3, tokens])
    before, found = torch.get_num_threads(), {}
    for backend in ("cpp", "reference"):
        torch.set_num_threads(threads if backend == "cpp" else before)
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)]
        try:
            out = linear_cross_entropy(*leaves, labels, boundaries, backend=backend)
        finally:
            torch.set_num_threads(before)
        assert out.samples is not None
        out.loss.backward()
        found[backend] = [out.loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None), *out.samples]
    for got, expected in zip(*found.values(), strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5 * float(expected.abs().max()))


def test_logits_that_rise_along_the_vocabulary_keep_the_loss_s_digits() -> None:
    """Each block of the vocabulary has a new maximum: rescaled in fp32, the sum would gather the rounding of each."""
    tokens, vocab = 32, 256_000
    rise = 1e-5 * torch.arange(vocab)
    hidden, weight = torch.ones(tokens, 1), rise[:, None].contiguous()
    labels, boundaries = torch.zeros(tokens, dtype=torch.int64), torch.tensor([0, tokens])
    out = linear_cross_entropy(hidden, weight, labels, boundaries, backend="cpp", stats=None)
    torch.testing.assert_close(out.loss.double(), rise.double().logsumexp(0), rtol=2e-7, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vocabulary_of_256_000(backend: tuple[str, str], dtype: torch.dtype) -> None:
    # The products of a sum over 256,000 terms in fp32 err by up to 4e-5, plain PyTorch's too.
    check(make_case((5, 4), 8, 256_000, dtype=dtype), backend, tolerance=max(5e-5, TOLERANCE[dtype]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_and_small_losses(backend: tuple[str, str]) -> None:
    """Losses of 1e-9 keep their digits; losses above 200 have gradients of the size they should have."""
    case = make_case((8, 8), width=20, vocab=50, ignored=0)
    best = (case.hidden @ case.weight.T).argmax(1)
    sharp = Case(case.hidden * 40, case.weight * 5, case.labels.clone(), case.cu_seqlens)
    sharp.labels[:8] = best[:8]
    found, stats = run(sharp, backend)
    truth, true_stats = run_plain(sharp, torch.float64), plain_stats(sharp, torch.float64)
    assert true_stats.loss[0] < 1e-3 and true_stats.loss[1] > 200
    for name, value in found.items():
        torch.testing.assert_close(value, truth[name], rtol=2e-5, atol=2e-5 * float(truth[name].abs().max()))
    # A logit of 400 carries an error of 3e-5 in fp32, and so does the logarithm of every small probability.
    for value, expected in zip(stats, true_stats, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_accumulation_with_num_items(backend: tuple[str, str]) -> None:
    """Micro-batches under the step's number of supervised tokens sum to the whole batch."""
    case = make_case((12, 9, 14, 5))
    whole, _ = run(case, backend)
    total = int((case.labels != -100).sum())
    parts = []
    for tokens, bounds in ((slice(0, 21), (0, 12, 21)), (slice(21, 40), (0, 14, 19))):
        part = Case(case.hidden[tokens], case.weight, case.labels[tokens], torch.tensor(bounds))
        parts.append(run(part.with_options(num_items=total), backend)[0])
    torch.testing.assert_close(parts[0]["loss"] + parts[1]["loss"], whole["loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(parts[0]["weight"] + parts[1]["weight"], whole["weight"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(torch.cat([p["hidden"] for p in parts]), whole["hidden"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padded_batch_is_one_sample_a_row(backend: tuple[str, str]) -> None:
    case = make_case((10, 10, 10), reduction="none")
    flat, flat_stats = run(case, backend)
    name, device = backend
    given = case.at(case.dtype, device)
    del given["cu_seqlens"]
    given["hidden"], given["labels"] = given["hidden"].reshape(3, 10, -1), given["labels"].reshape(3, 10)
    out = linear_cross_entropy(**given, backend=name)
    assert out.loss.shape == (3, 10)
    assert torch.equal(out.loss.flatten().double().cpu(), flat["loss"])
    assert out.samples is not None
    for padded, packed in zip(out.samples, flat_stats, strict=True):
        assert torch.equal(padded.double().cpu(), packed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_inputs(backend: tuple[str, str]) -> None:
    case = make_case(bias=True)
    expected, expected_stats = run(case, backend)
    strided = Case(
        hidden=case.hidden.T.contiguous().T,
        weight=torch.stack([case.weight, case.weight], 2)[:, :, 1],
        labels=torch.stack([case.labels, case.labels], 1)[:, 0],
        cu_seqlens=torch.stack([case.cu_seqlens, case.cu_seqlens], 1)[:, 0],
        bias=None if case.bias is None else torch.stack([case.bias, case.bias], 1)[:, 1],
    )
    assert not any(t.is_contiguous() for t in (strided.hidden, strided.weight, strided.labels, strided.cu_seqlens))
    found, stats = run(strided, backend)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)
    for value, other in zip(stats, expected_stats, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-6, atol=0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction: str) -> None:
    case = make_case((3, 0, 4), 4, 9, bias=True, reduction=reduction, softcap=4.0, logit_scale=0.8)
    given = case.at(torch.float64)
    leaves = [given.pop(name) for name in ("hidden", "weight", "bias")]
    labels = given.pop("labels")

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, labels, bias=bias, backend="reference", **given).loss

    assert torch.autograd.gradcheck(loss, leaves)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(lambda lengths: sum(lengths) > 0),
    width=st.integers(1, 40),
    vocab=st.integers(2, 70),
    reduction=st.sampled_from(REDUCTIONS),
    softcap=st.sampled_from([None, 0.2, 5.0, 1e4]),
    logit_scale=st.sampled_from([1.0, -0.7, 3.0]),
    bias=st.booleans(),
    weighted=st.booleans(),
    indexed=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_cpp_agrees_with_the_reference(
    lengths: list[int],
    width: int,
    vocab: int,
    reduction: str,
    softcap: float | None,
    logit_scale: float,
    bias: bool,
    weighted: bool,
    indexed: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    options = {"reduction": reduction, "softcap": softcap, "logit_scale": logit_scale}
    case = make_case(tuple(lengths), width, vocab, bias=bias, **options)
    if weighted:
        case = case.with_options(token_weights=(torch.rand(case.labels.shape) - 0.4).clamp(min=0))
    if indexed:
        case = case.with_options(token_index=(case.labels != -100).nonzero().squeeze(1))
    upstream = torch.randn(case.labels.shape) if reduction == "none" else torch.tensor(-1.7)
    expected, expected_stats = run(case, ("reference", "cpu"), upstream)
    found, stats = run(case, ("cpp", "cpu"), upstream)
    pairs = [(name, found[name], value) for name, value in expected.items()]
    pairs += [(f"samples.{name}", value, getattr(expected_stats, name)) for name, value in stats._asdict().items()]
    for name, value, other in pairs:
        torch.testing.assert_close(value, other, rtol=2e-5, atol=2e-5 * float(other.abs().max()) + 1e-9, msg=name)


@pytest.mark.parametrize("instruction_set", ["avx2", "portable"])
def test_other_instruction_sets(instruction_set: str) -> None:
    """The kernels that this CPU does not choose by itself, in a process of their own: the choice is made once."""
    environment = {**os.environ, "LEAD_FAST_CPU": instruction_set}
    selected = "cpp and (test_cap_and_scale or test_a_cap_that_every_logit_has_reached or test_shapes or test_threads)"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", selected]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-2000:]
