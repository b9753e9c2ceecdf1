"""`linear_cross_entropy` at its limits: NaN, inf, empty batches, bad labels, zero weights, very many logits."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from linear_cross_entropy_truth import BACKENDS, Case, make_case, plain_stats, run, run_plain
from torch import Tensor

from lead_fast.ops import SampleStats, bad_label_count, linear_cross_entropy


def clean_and_broken(break_token: int, value: float, **options: object) -> tuple[Case, Case]:
    """A case, and the same with one hidden state of sample 1 of 3 set to `value`."""
    case = make_case((6, 5, 7), ignored=0, **options)  # type: ignore[arg-type]
    hidden = case.hidden.clone()
    hidden[break_token] = value
    return case, Case(hidden, case.weight, case.labels, case.cu_seqlens, options=case.options)


def others(values: Tensor) -> Tensor:
    """Entries of samples 0 and 2."""
    return values[[0, 2]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_nan_stays_in_its_own_sample(backend: tuple[str, str], value: float) -> None:
    clean, broken = clean_and_broken(8, value, reduction="none")
    expected, expected_stats = run(clean, backend)
    found, stats = run(broken, backend)
    assert found["loss"][8].isnan() and found["hidden"][8].isnan().all()
    for name in ("loss", "hidden"):
        rest = torch.arange(18) != 8
        torch.testing.assert_close(found[name][rest], expected[name][rest], rtol=1e-6, atol=1e-7)
    for name in ("loss", "logit_grad_sq", "hidden_grad_sq", "grad_norm_sq"):
        assert getattr(stats, name)[1].isnan(), name
        found_rest, expected_rest = others(getattr(stats, name)), others(getattr(expected_stats, name))
        torch.testing.assert_close(found_rest, expected_rest, rtol=1e-6, atol=0)
    assert stats.num_tokens.tolist() == [6, 5, 7]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sample_mean", "sum", "none"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_of_0_contributes_exactly_0(backend: tuple[str, str], reduction: str, value: float) -> None:
    weights = torch.ones(18)
    weights[8] = 0
    clean, broken = clean_and_broken(8, value, reduction=reduction, token_weights=weights)
    expected, _ = run(clean, backend)
    found, _ = run(broken, backend)
    assert (found["hidden"][8] == 0).all()
    if reduction == "none":
        assert found["loss"][8] == 0
    for name in ("loss", "hidden", "weight"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_may_hold_anything(backend: tuple[str, str]) -> None:
    case = make_case((6, 5, 7), bias=True)
    hidden = case.hidden.clone()
    hidden[case.labels == -100] = torch.nan
    expected, expected_stats = run(case, backend)
    found, stats = run(Case(hidden, case.weight, case.labels, case.cu_seqlens, case.bias), backend)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    for value, other in zip(stats, expected_stats, strict=True):
        assert torch.equal(value, other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nan_in_the_head_stays_out_of_ignored_tokens(
    backend: tuple[str, str], softcap: float | None, dtype: torch.dtype
) -> None:
    case = make_case((6, 5, 7), bias=True, softcap=softcap, reduction="none", dtype=dtype)
    assert case.bias is not None
    case.bias[3] = torch.nan
    case.labels[6:11] = -100
    ignored = case.labels == -100
    found, stats = run(case, backend)
    assert torch.equal(found["loss"].isnan(), ~ignored) and (found["hidden"][ignored] == 0).all()
    assert all(value[1] == 0 for value in stats) and others(stats.grad_norm_sq).isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_upstream_gradient_is_exactly_zero(backend: tuple[str, str]) -> None:
    """Also for a token whose nll is inf, and per token under reduction "none"."""
    _, broken = clean_and_broken(8, torch.nan)
    found, _ = run(broken, backend, torch.tensor(0.0))
    assert (found["hidden"] == 0).all() and (found["weight"] == 0).all()

    upstream = torch.ones(18)
    upstream[8] = 0
    found, _ = run(broken.with_options(reduction="none"), backend, upstream)
    assert (found["hidden"][8] == 0).all() and found["weight"].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_minus_infinity(backend: tuple[str, str]) -> None:
    """A word that a bias of -inf forbids: probability 0 for the others' tokens, a loss of inf for its own."""
    case = make_case((6, 5), ignored=0, bias=True, reduction="none")
    assert case.bias is not None
    case.bias[3] = -torch.inf
    case.labels[:] = 7
    found, stats = run(case, backend)
    truth = run_plain(case, torch.float64)
    for name in ("loss", "hidden", "weight", "bias"):
        torch.testing.assert_close(found[name], truth[name], rtol=1e-5, atol=1e-6)
    assert found["bias"][3] == 0 and stats.grad_norm_sq.isfinite().all()

    case.labels[2] = 3
    found, stats = run(case, backend)
    assert found["loss"][2] == torch.inf and stats.loss.tolist()[0] == torch.inf
    assert found["hidden"].isfinite().all() and stats.logit_grad_sq.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [131, -1, -(2**62), 2**62])
def test_labels_out_of_range(backend: tuple[str, str], bad: int) -> None:
    case = make_case((6, 5, 7), ignored=0)
    _, expected = run(case, backend)
    bad_label_count(reset=True)
    case.labels[8] = bad
    found, stats = run(case, backend)
    assert bad_label_count() == 1
    run(case.with_options(reduction="sum"), backend)
    assert bad_label_count(reset=True) == 2 and bad_label_count() == 0
    assert found["loss"].isnan() and stats.loss[1].isnan() and stats.grad_norm_sq[1].isnan()
    for value, other in zip(stats, expected, strict=True):
        torch.testing.assert_close(others(value), others(other), rtol=1e-6, atol=0)
    assert stats.num_tokens.tolist() == [6, 5, 7]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sample_mean", "sum", "none"])
@pytest.mark.parametrize("lengths", [(0,), (0, 0, 0), (4, 3)], ids=["no-tokens", "empty-samples", "all-ignored"])
def test_nothing_supervised(backend: tuple[str, str], reduction: str, lengths: tuple[int, ...]) -> None:
    case = make_case(lengths, bias=True, reduction=reduction)
    case.labels[:] = -100
    found, stats = run(case, backend)
    for name, value in found.items():
        assert (value == 0).all(), name
    assert all((value == 0).all() and value.shape == (len(lengths),) for value in stats)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_samples_at_all(backend: tuple[str, str]) -> None:
    case = make_case(())
    found, stats = run(case, backend)
    assert found["loss"] == 0 and all(value.shape == (0,) for value in stats)


@pytest.mark.parametrize("backend", BACKENDS)
def test_num_items_of_0_without_supervised_tokens(backend: tuple[str, str]) -> None:
    case = make_case((4, 3), num_items=torch.tensor(0))
    case.labels[:] = -100
    found, _ = run(case, backend)
    assert found["loss"] == 0 and (found["hidden"] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_levels_of_statistics(backend: tuple[str, str]) -> None:
    case = make_case((6, 0, 7))
    found, stats = run(case, backend)
    name, device = backend
    given = case.at(torch.float32, device)
    only_loss = linear_cross_entropy(**given, stats="loss", backend=name)
    none = linear_cross_entropy(**given, stats=None, backend=name)
    assert none.samples is None and only_loss.samples is not None
    assert none.loss.item() == only_loss.loss.item() == found["loss"].item()
    losses = SampleStats(*(value.double().cpu() for value in only_loss.samples))
    assert torch.equal(losses.loss, stats.loss) and torch.equal(losses.num_tokens, stats.num_tokens)
    assert losses.grad_norm_sq[[0, 2]].isnan().all() and losses.grad_norm_sq[1] == 0
    gradient = torch.autograd.grad(only_loss.loss, given["hidden"])[0]
    assert torch.equal(gradient.double().cpu(), found["hidden"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stats", ["all", "loss", None])
def test_without_gradients(backend: tuple[str, str], stats: str | None) -> None:
    """Evaluation: no graph, and the same numbers."""
    case = make_case()
    name, device = backend
    given = case.at(torch.float32, device)
    with_graph = linear_cross_entropy(**given, stats=stats, backend=name)  # type: ignore[arg-type]
    with torch.no_grad():
        out = linear_cross_entropy(**given, stats=stats, backend=name)  # type: ignore[arg-type]
    assert not out.loss.requires_grad and torch.equal(out.loss, with_graph.loss)
    if out.samples is not None and with_graph.samples is not None:
        assert not any(value.requires_grad for value in with_graph.samples)
        for value, other in zip(out.samples, with_graph.samples, strict=True):
            assert torch.equal(value.nan_to_num(-1), other.nan_to_num(-1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("weight", "bias")])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_any_part_may_be_frozen(backend: tuple[str, str], trained: tuple[str, ...], reduction: str) -> None:
    case = make_case(bias=True, reduction=reduction)
    expected, _ = run(case, backend)
    name, device = backend
    given = case.at(torch.float32, device)
    for leaf in ("hidden", "weight", "bias"):
        given[leaf].requires_grad_(leaf in trained)
    out = linear_cross_entropy(**given, backend=name)
    gradients = torch.autograd.grad(out.loss, [given[leaf] for leaf in trained], torch.ones_like(out.loss))
    for leaf, gradient in zip(trained, gradients, strict=True):
        torch.testing.assert_close(gradient.double().cpu(), expected[leaf], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("backend", [p for p in BACKENDS if p.id != "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_are_bitwise_equal(backend: tuple[str, str], dtype: torch.dtype) -> None:
    case = make_case((300, 40, 5, 200), 64, 1000, bias=True, dtype=dtype)
    first, first_stats = run(case, backend)
    for _ in range(2):
        again, again_stats = run(case, backend)
        assert all(torch.equal(again[name], value) for name, value in first.items())
        assert all(torch.equal(a, b) for a, b in zip(again_stats, first_stats, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("backend", [p for p in BACKENDS if p.id != "reference"])
def test_more_than_2_31_logits(backend: tuple[str, str]) -> None:
    """T * V = 2.3e9: loss and gradient of tokens whose logits lie where a 32-bit offset would have wrapped."""
    tokens, width, vocab = 9_000, 2, 256_000
    hidden, weight = torch.randn(tokens, width), torch.randn(vocab, width)
    labels = torch.randint(vocab, (tokens,))
    name, device = backend
    leaf = hidden.to(device).requires_grad_()
    out = linear_cross_entropy(leaf, weight.to(device), labels.to(device), reduction="none", backend=name)
    gradient = torch.autograd.grad(out.loss, leaf, torch.ones_like(out.loss))[0]
    last = slice(tokens - 5, tokens)
    case = Case(hidden[last].double(), weight.double(), labels[last], torch.tensor([0, 5]))
    truth = run_plain(case.with_options(reduction="none"), torch.float64)
    torch.testing.assert_close(out.loss[last].double().cpu(), truth["loss"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient[last].double().cpu(), truth["hidden"], rtol=1e-3, atol=1e-4)
    assert out.samples is not None and out.samples.num_tokens.item() == tokens
    assert plain_stats(case, torch.float64).num_tokens.item() == 5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_logits_of_all_tokens_are_never_in_memory(dtype: str) -> None:
    """Forward and backward with a trained head, in a process of its own: the most memory that it ever had tells."""
    tokens, vocab = 6_000, 50_000
    program = f"""
import resource, torch
from lead_fast.ops import linear_cross_entropy

def step(tokens, reduction):
    hidden, weight = (torch.randn(rows, 8, dtype=torch.{dtype}, requires_grad=True) for rows in (tokens, {vocab}))
    loss = linear_cross_entropy(hidden, weight, torch.zeros(tokens, dtype=torch.int64), reduction=reduction, backend="cpp").loss
    loss.sum().backward()

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(200, "mean")
before = peak()
step({tokens}, "mean")
step({tokens}, "none")
print(peak() - before)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    all_logits = tokens * vocab * (4 if dtype == "float32" else 2) / 1024
    assert int(run.stdout) < 0.1 * all_logits, f"{run.stdout} KiB more; all logits take {all_logits:.0f} KiB"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_norm_is_never_negative(backend: tuple[str, str]) -> None:
    """Equal hidden states under a head that gives them equal logits, labels in balance: the samples' gradients are 0."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        hidden, weight = torch.randn(1, 300, generator=generator), torch.randn(3, 300, generator=generator)
        weight -= (weight @ hidden.T) @ hidden / hidden.square().sum()
        labels = torch.arange(300 + 12) % 3
        case = Case(hidden.repeat(len(labels), 1), weight, labels, torch.tensor([0, 300, 312]), options={"reduction": "sum"})
        _, stats = run(case, backend)
        assert (stats.grad_norm_sq >= 0.0).all() and stats.grad_norm_sq.max() < 1e4  # of 300^2 * ||d||^2 ||h||^2, about 1e9


@pytest.mark.parametrize("ignore_index", [-1, 3, 10_000])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_number_may_say_ignored(backend: tuple[str, str], ignore_index: int) -> None:
    case = make_case((6, 5, 7))
    labels = case.labels.masked_fill(case.labels == -100, ignore_index)
    masked = case.labels.masked_fill(labels == ignore_index, -100)  # label 3 is a word that is ignored, too
    expected, expected_stats = run(Case(case.hidden, case.weight, masked, case.cu_seqlens, options=case.options), backend)
    options = case.options | {"ignore_index": ignore_index}
    found, stats = run(Case(case.hidden, case.weight, labels, case.cu_seqlens, options=options), backend)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert all(torch.equal(a, b) for a, b in zip(stats, expected_stats, strict=True))


def test_a_first_call_without_gradients_leaves_training_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from lead_fast import ops

    hidden, weight, labels = torch.randn(5, 8), torch.randn(11, 8), torch.tensor([1, 2, 3, 4, 99])
    monkeypatch.setattr(ops, "_bad_labels", {})
    with FakeTensorMode():
        linear_cross_entropy(torch.randn(5, 8), torch.randn(11, 8), torch.zeros(5, dtype=torch.int64))
    with torch.inference_mode():
        linear_cross_entropy(hidden, weight, labels)
    hidden.requires_grad_()
    linear_cross_entropy(hidden, weight, labels).loss.backward()
    assert bad_label_count(reset=True) == 2 and bad_label_count() == 0
