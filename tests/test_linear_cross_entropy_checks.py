"""`linear_cross_entropy` as an operator: argument errors, opcheck, torch.compile, autocast, the choice of a backend."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from linear_cross_entropy_truth import BACKENDS, make_case, run
from torch import Tensor

from lead_fast import ops
from lead_fast.ops import linear_cross_entropy

T, H, V = 6, 4, 9


def arguments(**changes: Any) -> dict[str, Any]:
    given = {
        "hidden": torch.randn(T, H),
        "weight": torch.randn(V, H),
        "labels": torch.randint(V, (T,)),
        "cu_seqlens": torch.tensor([0, 2, T]),
    }
    return {**given, **changes}


@pytest.mark.parametrize(
    ("error", "argument", "value"),
    [
        (TypeError, "hidden", torch.zeros(T, H, dtype=torch.int64)),
        (ValueError, "hidden", torch.zeros(H)),
        (TypeError, "weight", torch.zeros(V, H, dtype=torch.float64)),
        (ValueError, "weight", torch.zeros(V, H + 1)),
        (ValueError, "weight", torch.zeros(0, H)),
        (ValueError, "weight", torch.zeros(V, H, device="meta")),
        (TypeError, "labels", torch.zeros(T, dtype=torch.int32)),
        (ValueError, "labels", torch.zeros(T + 1, dtype=torch.int64)),
        (ValueError, "labels", torch.zeros(T, 1, dtype=torch.int64)),
        (TypeError, "cu_seqlens", torch.tensor([0.0, T])),
        (ValueError, "cu_seqlens", torch.tensor([[0, T]])),
        (ValueError, "cu_seqlens", torch.tensor([], dtype=torch.int64)),
        (ValueError, "cu_seqlens", torch.tensor([0, T - 1])),
        (ValueError, "cu_seqlens", torch.tensor([1, T])),
        (ValueError, "cu_seqlens", torch.tensor([0, T + 1])),
        (ValueError, "cu_seqlens", torch.tensor([0, 4, 3, T])),
        (TypeError, "bias", torch.zeros(V, dtype=torch.float16)),
        (ValueError, "bias", torch.zeros(V + 1)),
        (TypeError, "token_weights", torch.zeros(T, dtype=torch.int64)),
        (ValueError, "token_weights", torch.zeros(T + 1)),
        (ValueError, "token_weights", torch.zeros(T, requires_grad=True)),
        (TypeError, "token_index", torch.tensor([0], dtype=torch.int32)),
        (ValueError, "token_index", torch.tensor([[0]])),
        (ValueError, "token_index", torch.tensor([2, 1])),
        (ValueError, "token_index", torch.tensor([1, 1])),
        (ValueError, "token_index", torch.tensor([0, T])),
        (ValueError, "token_index", torch.tensor([-1, 0])),
        (ValueError, "softcap", 0.0),
        (ValueError, "softcap", float("nan")),
        (ValueError, "logit_scale", float("inf")),
        (ValueError, "reduction", "batchmean"),
        (ValueError, "stats", "some"),
        (ValueError, "num_items", -1),
        (ValueError, "num_items", torch.ones(2)),
        (ValueError, "backend", "cuda"),
    ],
    ids=lambda value: None if isinstance(value, Tensor) else getattr(value, "__name__", str(value)),
)
def test_errors_name_the_argument(error: type[Exception], argument: str, value: Any) -> None:
    with pytest.raises(error, match=rf"^linear_cross_entropy: `{argument}` must be .*, got "):
        linear_cross_entropy(**arguments(**{argument: value}))


def test_num_items_is_for_mean_only() -> None:
    with pytest.raises(ValueError, match="`num_items` must be None with reduction 'sum', got 3"):
        linear_cross_entropy(**arguments(reduction="sum", num_items=3))


@pytest.mark.parametrize("backend", ["triton", "cpp"])
def test_a_backend_that_cannot_serve_is_refused(backend: str) -> None:
    hidden = torch.randn(T, H, dtype=torch.float64)
    given = arguments(hidden=hidden, weight=torch.randn(V, H, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=f"backend '{backend}' is not available: "):
        linear_cross_entropy(**given, backend=backend)  # type: ignore[arg-type]


def test_the_fallback_is_logged_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    ops._log_fallback.cache_clear()
    monkeypatch.setattr(ops, "_HAS_CPP", False)
    with caplog.at_level(logging.WARNING, logger="lead_fast.ops"):
        losses = [linear_cross_entropy(**arguments()).loss for _ in range(2)]
    assert len(losses) == 2 and len(caplog.records) == 1
    assert "runs on the plain PyTorch reference: the extension is not built" in caplog.text


def test_the_extension_checks_a_direct_call() -> None:
    given = arguments(cu_seqlens=torch.tensor([0, T + 1]))
    operator = torch.ops.lead_fast.linear_cross_entropy.cpp
    rest = (torch.ones(T), -100, 0.0, 1.0, True, False, False, 2)
    with pytest.raises(RuntimeError, match="`cu_seqlens` must be"):
        operator(given["hidden"], given["weight"], None, given["labels"], given["cu_seqlens"], *rest)
    with pytest.raises(RuntimeError, match="`labels` must be int64"):
        operator(given["hidden"], given["weight"], None, given["labels"][:-1], torch.tensor([0, T]), *rest)
    with pytest.raises(RuntimeError, match=r"`hidden` must be .* with H > 0"):
        nothing = (given["hidden"][:, :0], given["weight"][:, :0])
        operator(*nothing, None, given["labels"], torch.tensor([0, T]), *rest)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weight_grad", [True, False], ids=["dW-in-forward", "dW-recomputed"])
def test_opcheck(backend: tuple[str, str], weight_grad: bool) -> None:
    name, device = backend
    case = make_case((5, 0, 7), bias=True)
    given = case.at(torch.float32, device)
    tensors = (given["hidden"], given["weight"], given["bias"], given["labels"], given["cu_seqlens"])
    scale = torch.rand(12, device=device) * (given["labels"] != -100)
    operator = getattr(torch.ops.lead_fast.linear_cross_entropy, name)
    torch.library.opcheck(operator, (*tensors, scale, -100, 3.0, 0.7, True, weight_grad, weight_grad, 2))
    frozen = tuple(t.detach() if i in (1, 2) else t for i, t in enumerate(tensors))
    torch.library.opcheck(operator, (*frozen, scale, -100, 0.0, 1.0, True, False, False, 0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(7,), (5, 3), (40, 1000), (3, 40_000), (0, 4)], ids=str)
def test_scaled_gradient(backend: tuple[str, str], shape: tuple[int, ...]) -> None:
    """One factor, or one a row; a factor of 0 clears NaN; the product is rounded once."""
    name, device = backend
    operator = getattr(torch.ops.lead_fast.scaled_gradient, name)
    has_rows = len(shape) == 2 and shape[0] > 0
    factors = [torch.tensor(-1.3), torch.tensor(0.0)]
    if has_rows:
        factors.append(torch.randn(shape[0]))
        factors[-1][1] = 0
    for dtype, out_dtype in ((torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16,) * 2):
        gradient = torch.randn(shape).to(dtype)
        if has_rows:
            gradient[1] = torch.nan
        for factor in factors:
            rows = factor[:, None] if factor.dim() else factor
            expected = (gradient.float() * rows).masked_fill(rows == 0, 0).to(out_dtype)
            found = operator(gradient.to(device), factor.to(device), out_dtype)
            torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    torch.library.opcheck(operator, (torch.ones(shape, device=device), factors[0].to(device), torch.float32))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["sample_mean", "none"])
def test_under_torch_compile(backend: tuple[str, str], reduction: str) -> None:
    """One graph, forward and backward, the numbers of eager mode; a second shape does not change them."""
    name, device = backend

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def step(hidden: Tensor, weight: Tensor, labels: Tensor, cu_seqlens: Tensor) -> Tensor:
        out = linear_cross_entropy(hidden * 2, weight, labels, cu_seqlens, reduction=reduction, backend=name)  # type: ignore[arg-type]
        assert out.samples is not None
        return out.loss.sum() + 0 * out.samples.grad_norm_sq.sum()

    for lengths in ((5, 0, 7), (4, 9)):
        case = make_case(lengths)
        given = case.at(torch.float32, device)
        compiled = step(given["hidden"], given["weight"], given["labels"], given["cu_seqlens"])
        gradients = torch.autograd.grad(compiled, (given["hidden"], given["weight"]))
        again = case.at(torch.float32, device)
        out = linear_cross_entropy(again.pop("hidden") * 2, **again, reduction=reduction, backend=name)  # type: ignore[arg-type]
        torch.testing.assert_close(compiled, out.loss.sum())
        assert all(gradient.isfinite().all() for gradient in gradients) and gradients[1].abs().max() > 0


def test_bad_labels_are_counted_under_torch_compile() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, labels, backend="cpp").loss

    given = arguments()
    given["labels"][2] = V
    ops.bad_label_count(reset=True)
    assert step(given["hidden"], given["weight"], given["labels"]).isnan()
    assert step(given["hidden"], given["weight"], given["labels"]).isnan()
    assert ops.bad_label_count(reset=True) == 2


def test_a_second_derivative_is_refused() -> None:
    given = arguments(hidden=torch.randn(T, H, requires_grad=True))
    loss = linear_cross_entropy(**given).loss
    with pytest.raises(NotImplementedError, match="create_graph=True"):
        torch.autograd.grad(loss, given["hidden"], create_graph=True)


def test_autocast_casts_the_head() -> None:
    case = make_case(bias=True)
    given = case.at(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(**given).loss
    gradients = torch.autograd.grad(loss, (given["hidden"], given["weight"], given["bias"]))
    assert loss.dtype == torch.float32 and all(gradient.dtype == torch.float32 for gradient in gradients)
    exact, _ = run(case, ("cpp", "cpu"))
    assert not torch.equal(loss.double(), exact["loss"])
    torch.testing.assert_close(loss.double(), exact["loss"], rtol=1e-2, atol=0)


def test_backward_twice_through_one_graph() -> None:
    given = arguments(hidden=torch.randn(T, H, requires_grad=True), weight=torch.randn(V, H, requires_grad=True))
    loss = linear_cross_entropy(**given).loss
    leaves = (given["hidden"], given["weight"])
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves, torch.tensor(3.0))
    for once, thrice in zip(first, second, strict=True):
        torch.testing.assert_close(thrice, 3 * once)


@pytest.mark.parametrize(("capability", "serves"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_triton_s_kernels_are_for_ampere_and_newer(capability, serves, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(ops, "_HAS_TRITON", True)
    why = ops._unavailable("triton", "cuda", torch.bfloat16)
    assert (why is None) == serves and (serves or "compute capability 8.0 and newer, got 7.5" in why)
