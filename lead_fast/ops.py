"""Public operators: schemas, argument checks, fake and autograd rules.

An operator has one overload a backend, all with the same schema and the same contract, which `lead_fast.reference`
states: `lead_fast::linear_cross_entropy.reference` (any device), `.cpp` (CPU, from the extension), `.triton` (CUDA).
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lead_fast import extension, reference

Backend = Literal["triton", "cpp", "reference"]
Operator = Callable[..., Any]
Reduction = Literal["mean", "sample_mean", "sum", "none"]
Stats = Literal["all", "loss"]

_OP = "linear_cross_entropy"
_STATS_LEVEL = {None: reference.STATS_NONE, "loss": reference.STATS_LOSS, "all": reference.STATS_ALL}
_SCHEMA = (
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor cu_seqlens, Tensor token_scale, "
    "int ignore_index, float softcap, float logit_scale, bool hidden_grad, bool weight_grad, bool bias_grad, "
    "int stats) -> (Tensor loss, Tensor nll, Tensor d_hidden, Tensor d_weight, Tensor d_bias, Tensor sample_stats, "
    "Tensor bad_labels)"
)
_SCALE_OP = "scaled_gradient"
_SCALE_SCHEMA = "(Tensor gradient, Tensor upstream, ScalarType out_dtype) -> Tensor"
_logger = logging.getLogger(__name__)
_bad_labels: dict[torch.device, Tensor] = {}


class SampleStats(NamedTuple):
    """Statistics of each sample of a batch under unit upstream gradient on each token's nll.

    All fields are detached [S], fp32 (fp64 for fp64 inputs), on the device of the hidden states. A sample without
    supervised tokens has 0 in all of them; a NaN stays in the entries of the sample it came from.

    Source: LEAD (arXiv 2505.07437); `grad_norm_sq` is this project's addition.
    """

    loss: Tensor
    """Mean negative log-likelihood per supervised token, nats."""
    num_tokens: Tensor
    """Number of supervised tokens."""
    logit_grad_sq: Tensor
    """Mean over supervised tokens of ||softmax(z_t) - onehot(y_t)||^2. NaN with `stats="loss"`."""
    hidden_grad_sq: Tensor
    """Mean over supervised tokens of ||d_t||^2, d_t the gradient of the token's nll at h_t. NaN with `stats="loss"`."""
    grad_norm_sq: Tensor
    """|| sum_t d_t h_t^T ||_F^2, G_i of the specification, at least 0. NaN with `stats="loss"`. Where the tokens' gradients
    cancel, what is left is rounding of the order of eps * (sum_t ||d_t|| ||h_t||)^2."""


class LinearCrossEntropyOutput(NamedTuple):
    """What `linear_cross_entropy` returns."""

    loss: Tensor
    """Differentiable: [] for "mean", "sample_mean" and "sum", the shape of `labels` for "none"."""
    samples: SampleStats | None
    """Statistics of each sample, None with `stats=None`."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: Reduction = "mean",
    num_items: int | Tensor | None = None,
    token_weights: Tensor | None = None,
    token_index: Tensor | None = None,
    stats: Stats | None = "all",
    backend: Backend | None = None,
) -> LinearCrossEntropyOutput:
    """Cross-entropy of a linear head, with statistics of each sample, never holding the logits of all tokens.

    The logits of token t are softcap(logit_scale * (weight @ hidden[t] + bias)). With a frozen head it costs two matrix
    products for every reduction; with a trained head three, and four for "none". Gradients are exact under any upstream
    gradient. A token of weight 0 contributes exactly 0 to the loss and to every gradient, also when its nll is inf or
    NaN. A supervised label outside [0, V) is never dereferenced: its token's nll, gradient and statistics are NaN, and
    `bad_label_count` says how many there were. Under autocast, hidden, weight and bias are cast to its dtype.

    Args:
        hidden: last hidden states, [T, H] or [B, L, H]; fp32, bf16 or fp16 (fp64 on the reference).
        weight: [V, H], the head; dtype and device of `hidden`. Its gradient is accumulated in fp32.
        labels: int64 [T] or [B, L]. Already aligned: labels[t] is the target of hidden[t].
        cu_seqlens: int32 or int64 [S + 1], where samples begin and end in the flattened tokens, from 0 to T (B * L),
            not decreasing. None: one sample a row of [B, L, H], or all of [T, H] as one sample.
        bias: [V], dtype and device of `weight`, or None.
        ignore_index: label of tokens without supervision.
        softcap: logits become softcap * tanh(logits / softcap); None for no cap.
        logit_scale: factor on the logits, before the cap.
        reduction: "mean" over supervised tokens, "sample_mean" over samples that have supervised tokens of their mean,
            "sum", or "none": each token's, in the shape of `labels`, 0 where ignored. Without supervised tokens: 0.
        num_items: divides the sum in place of the number of supervised tokens, for accumulation over micro-batches; an
            int or a tensor with one element (no synchronisation). With "mean" only.
        token_weights: floating, shape of `labels`: a constant factor on each token's nll. Denominators and statistics
            do not depend on it.
        token_index: int64 [M], strictly increasing positions in the flattened tokens, all supervised ones among them;
            the matrix products run over these tokens only. Tokens not listed are ignored.
        stats: "all", "loss" (the gradient statistics are NaN) or None (no `samples`).
        backend: "triton", "cpp", "reference", or None for the best on the device.

    Returns:
        `loss`, differentiable once by hidden, weight and bias, fp32 (fp64 for fp64 inputs), and `samples`.

    Raises:
        TypeError: a tensor of the wrong dtype.
        ValueError: a wrong shape, device or option. Values of `cu_seqlens` and `token_index` are checked on the CPU, outside
            torch.compile; on CUDA a wrong `cu_seqlens` trips a device-side assertion.
        RuntimeError: `backend` names one that is not available here.
        NotImplementedError: on backward with create_graph=True.

    Determinism: bitwise from run to run with "cpp" and "triton".
    """
    hidden, weight, bias = _autocast(hidden, weight, bias)
    _check_arguments(hidden, weight, labels, cu_seqlens, bias, token_weights, token_index)
    _check_options(softcap, logit_scale, reduction, num_items, stats)
    op = _resolve(backend, hidden)

    if cu_seqlens is None:
        rows, length = labels.shape if labels.dim() == 2 else (1, labels.shape[0])
        cu_seqlens = torch.arange(rows + 1, device=hidden.device) * length
    labels_shape, num_tokens = labels.shape, labels.numel()
    hidden, labels = hidden.reshape(num_tokens, hidden.shape[-1]), labels.reshape(-1)
    if token_weights is not None:
        token_weights = token_weights.detach().reshape(-1)
    if token_index is not None:
        hidden, labels = hidden.index_select(0, token_index), labels.index_select(0, token_index)
        cu_seqlens = torch.searchsorted(token_index, cu_seqlens)
        token_weights = None if token_weights is None else token_weights.index_select(0, token_index)

    token_scale = _token_scale(labels, cu_seqlens, ignore_index, reduction, num_items, token_weights, hidden.dtype)
    # Only a gradient that is known in forward, up to one factor for all tokens, can reach dW there.
    reduced = reduction != "none"
    loss, nll, _, _, _, sample_stats, bad_labels = op(
        hidden, weight, bias, labels, cu_seqlens, token_scale,
        ignore_index, softcap or 0.0, logit_scale,
        torch.is_grad_enabled() and hidden.requires_grad,
        torch.is_grad_enabled() and weight.requires_grad and reduced,
        torch.is_grad_enabled() and bias is not None and bias.requires_grad and reduced,
        _STATS_LEVEL[stats],
    )  # fmt: skip
    _count_bad_labels(bad_labels)
    if not reduced:
        loss = nll if token_weights is None else torch.where(token_scale == 0, 0, token_scale * nll)
        if token_index is not None:
            loss = loss.new_zeros(num_tokens).index_copy(0, token_index, loss)
        loss = loss.reshape(labels_shape)
    samples = None if stats is None else SampleStats(*sample_stats.detach().t().contiguous())
    return LinearCrossEntropyOutput(loss, samples)


def bad_label_count(*, reset: bool = False) -> int:
    """Number of supervised labels outside [0, V) that `linear_cross_entropy` has met in this process, on all devices.

    Reading it synchronises with the devices; counting does not.

    Args:
        reset: start again from 0.
    """
    count = sum(int(counter) for counter in _bad_labels.values())
    if reset:
        for counter in _bad_labels.values():
            counter.zero_()
    return count


def _count_bad_labels(bad_labels: Tensor) -> None:
    counter = _bad_labels.get(bad_labels.device)
    if counter is None:
        if _is_fake(bad_labels) or (bad_labels.is_cuda and torch.cuda.is_current_stream_capturing()):
            return  # a counter made here would not outlive the trace, or would belong to the graph
        with torch.inference_mode(False):  # a tensor of inference mode could never count in training
            counter = _bad_labels[bad_labels.device] = torch.zeros_like(bad_labels)
    if not _is_fake(bad_labels):
        counter.add_(bad_labels)


def _is_fake(tensor: Tensor) -> bool:
    return not torch.compiler.is_compiling() and isinstance(tensor, FakeTensor)


def _token_scale(
    labels: Tensor,
    cu_seqlens: Tensor,
    ignore_index: int,
    reduction: Reduction,
    num_items: int | Tensor | None,
    token_weights: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """[T] derivative of the loss by each token's nll, exactly 0 for ignored tokens; fp32, or fp64 for fp64 inputs."""
    dtype = torch.promote_types(dtype, torch.float32)
    supervised = labels != ignore_index
    if reduction == "mean":
        count = supervised.sum().clamp(min=1) if num_items is None else num_items
        scale = supervised.to(dtype) / (count.reshape(()) if isinstance(count, Tensor) else count)
    elif reduction == "sample_mean":
        ends = torch.cat([supervised.new_zeros(1, dtype=torch.int64), supervised.cumsum(0)])[cu_seqlens]
        per_sample = ends.diff()
        positions = torch.arange(labels.shape[0], device=labels.device)
        sample = torch.searchsorted(cu_seqlens[1:].contiguous(), positions.to(cu_seqlens.dtype), right=True)
        scale = supervised.to(dtype) / (per_sample[sample] * (per_sample > 0).sum())
    else:
        scale = supervised.to(dtype)
    if token_weights is not None:
        scale = torch.where(token_weights == 0, 0, scale * token_weights.to(dtype))
    return scale.masked_fill(~supervised, 0)


def _autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    return repr(value)


def _require(condition: bool, argument: str, expected: str, got: Any, error: type[Exception] = ValueError) -> None:
    if not condition:
        raise error(f"{_OP}: `{argument}` must be {expected}, got {_describe(got)}")


def _check_arguments(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    bias: Tensor | None,
    token_weights: Tensor | None,
    token_index: Tensor | None,
) -> None:
    _require(hidden.is_floating_point(), "hidden", "fp64, fp32, bf16 or fp16", hidden, TypeError)
    _require(hidden.dim() in (2, 3), "hidden", "[T, H] or [B, L, H]", hidden)
    tokens = hidden.shape[:-1]
    num_tokens = tokens.numel()
    expected = f"{list(tokens)}, one for each row of `hidden`"
    _require(labels.dtype == torch.int64, "labels", f"int64 {expected}", labels, TypeError)
    _require(labels.shape == tokens, "labels", f"int64 {expected}", labels)
    _require(weight.dtype == hidden.dtype, "weight", f"{hidden.dtype} like `hidden`", weight, TypeError)
    _require(weight.dim() == 2 and weight.shape[1] == hidden.shape[-1], "weight", f"[V, {hidden.shape[-1]}]", weight)
    _require(weight.shape[0] > 0 and weight.shape[1] > 0, "weight", "[V, H] with V > 0 and H > 0", weight)
    if bias is not None:
        _require(bias.dtype == weight.dtype, "bias", f"{weight.dtype} like `weight`", bias, TypeError)
        _require(bias.shape == weight.shape[:1], "bias", f"[{weight.shape[0]}]", bias)
    if cu_seqlens is not None:
        is_index = cu_seqlens.dtype in (torch.int32, torch.int64)
        _require(is_index, "cu_seqlens", "int32 or int64 [S + 1]", cu_seqlens, TypeError)
        _require(cu_seqlens.dim() == 1 and cu_seqlens.shape[0] > 0, "cu_seqlens", "int32 or int64 [S + 1]", cu_seqlens)
    if token_weights is not None:
        _require(token_weights.is_floating_point(), "token_weights", f"floating {expected}", token_weights, TypeError)
        _require(token_weights.shape == tokens, "token_weights", f"floating {expected}", token_weights)
        is_constant = not (token_weights.requires_grad and torch.is_grad_enabled())
        _require(is_constant, "token_weights", "a constant (detached)", "a tensor that requires a gradient")
    if token_index is not None:
        _require(token_index.dtype == torch.int64, "token_index", "int64 [M]", token_index, TypeError)
        _require(token_index.dim() == 1, "token_index", "int64 [M]", token_index)
    others = {
        "weight": weight, "labels": labels, "bias": bias, "cu_seqlens": cu_seqlens,
        "token_weights": token_weights, "token_index": token_index,
    }  # fmt: skip
    for name, tensor in others.items():
        on_device = tensor is None or tensor.device == hidden.device
        _require(on_device, name, f"on {hidden.device}, the device of `hidden`", tensor)
    if not torch.compiler.is_compiling():
        _check_values(cu_seqlens, token_index, num_tokens)


def _check_values(cu_seqlens: Tensor | None, token_index: Tensor | None, num_tokens: int) -> None:
    """Checks that need values: on the host for CPU tensors, by a device-side assertion for `cu_seqlens` elsewhere."""
    if cu_seqlens is not None:
        covers = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == num_tokens) & (cu_seqlens.diff() >= 0).all()
        expected = f"[S + 1] from 0 to {num_tokens}, not decreasing"
        if cu_seqlens.device.type == "cpu":
            _require(bool(covers), "cu_seqlens", expected, cu_seqlens.tolist())
        else:
            torch.ops.aten._assert_async.msg(covers, f"{_OP}: `cu_seqlens` must be {expected}")
    if token_index is not None and token_index.device.type == "cpu":
        ordered = bool((token_index.diff() > 0).all())
        inside = token_index.numel() == 0 or bool((token_index[0] >= 0) & (token_index[-1] < num_tokens))
        _require(ordered and inside, "token_index", f"strictly increasing in [0, {num_tokens})", token_index)


def _check_options(
    softcap: float | None,
    logit_scale: float,
    reduction: str,
    num_items: int | Tensor | None,
    stats: str | None,
) -> None:
    _require(softcap is None or 0 < softcap < math.inf, "softcap", "a positive number or None", softcap)
    _require(-math.inf < logit_scale < math.inf, "logit_scale", "finite", logit_scale)
    _require(reduction in get_args(Reduction), "reduction", f"one of {get_args(Reduction)}", reduction)
    _require(stats in _STATS_LEVEL, "stats", f"one of {tuple(_STATS_LEVEL)}", stats)
    if num_items is not None:
        _require(reduction == "mean", "num_items", f"None with reduction {reduction!r}", num_items)
        if isinstance(num_items, Tensor):
            _require(num_items.numel() == 1, "num_items", "an int or a tensor with one element", num_items)
        else:
            _require(num_items >= 0, "num_items", "0 or more", num_items)


def _resolve(backend: Backend | None, hidden: Tensor) -> Operator:
    """The operator overload that serves `backend`, or the best one for the device and dtype of `hidden`."""
    device, dtype = hidden.device.type, hidden.dtype
    if backend is None:
        best = {"cuda": "triton", "cpu": "cpp"}.get(device, "reference")
        if best != "reference" and (why := _unavailable(best, device, dtype)) is not None:
            if not torch.compiler.is_compiling():
                _log_fallback(why)
            best = "reference"
        return _operators[best]
    _require(backend in get_args(Backend), "backend", f"one of {get_args(Backend)} or None", backend)
    if (why := _unavailable(backend, device, dtype)) is not None:
        raise RuntimeError(f"{_OP}: backend {backend!r} is not available: {why}")
    return _operators[backend]


def _unavailable(backend: str, device: str, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot serve, None when it can."""
    if backend == "reference":
        return None
    if backend == "cpp":
        if device != "cpu":
            return f"it serves CPU tensors, got {device}"
        if dtype not in (torch.float32, torch.bfloat16):
            return f"it serves float32 and bfloat16, got {dtype}"
        return None if _HAS_CPP else "the extension is not built (pip install without LEAD_FAST_NO_EXT=1)"
    if not _HAS_TRITON:
        return "triton is not installed"
    if device != "cuda" and not _TRITON_INTERPRETED:
        return f"it serves CUDA tensors, got {device}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it serves float32, bfloat16 and float16, got {dtype}"
    if device == "cuda" and (capability := torch.cuda.get_device_capability()) < (8, 0):
        return f"it serves cards of compute capability 8.0 and newer, got {'.'.join(map(str, capability))}"
    return None


@cache
def _log_fallback(why: str) -> None:
    _logger.warning("%s runs on the plain PyTorch reference: %s", _OP, why)


def _forward_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    cu_seqlens: Tensor,
    token_scale: Tensor,
    ignore_index: int,
    softcap: float,
    logit_scale: float,
    hidden_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
    stats: int,
) -> tuple[Tensor, ...]:
    acc = torch.promote_types(hidden.dtype, torch.float32)
    num_samples = cu_seqlens.shape[0] - 1
    return (
        hidden.new_empty((), dtype=acc),
        hidden.new_empty(hidden.shape[0], dtype=acc),
        hidden.new_empty(hidden.shape if hidden_grad else 0),
        hidden.new_empty(weight.shape if weight_grad else 0, dtype=acc),
        hidden.new_empty(weight.shape[0] if bias_grad else 0, dtype=acc),
        hidden.new_empty((num_samples if stats != reference.STATS_NONE else 0, 5), dtype=acc),
        labels.new_empty(()),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, cu_seqlens, token_scale, *options = inputs
    _, nll, d_hidden, d_weight, d_bias, sample_stats, bad_labels = output
    *_, hidden_grad, ctx.weight_grad, ctx.bias_grad, _ = options
    needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    if needs_hidden and not hidden_grad:
        raise ValueError(f"{_OP}: `hidden_grad` must be True where `hidden` requires a gradient, got False")
    ctx.options, ctx.weight_dtype = options[:3], weight.dtype
    ctx.set_materialize_grads(False)
    fixed = [d_hidden, d_weight, d_bias, sample_stats, bad_labels]
    if ctx.weight_grad or ctx.bias_grad:
        fixed.append(nll)  # dW in forward holds for one upstream factor on `loss` alone
    ctx.mark_non_differentiable(*fixed)
    recompute = (needs_weight and not ctx.weight_grad) or (needs_bias and not ctx.bias_grad)
    inputs_again = (hidden, weight, bias, labels, cu_seqlens) if recompute else (None,) * 5
    ctx.save_for_backward(token_scale, d_hidden, d_weight, d_bias, *inputs_again)


def _backward(op: Operator, scaled_gradient: Operator) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(ctx: Any, grad_loss: Tensor | None, grad_nll: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(f"{_OP}: backward with create_graph=True (a second derivative) is not supported")
        token_scale, d_hidden, d_weight, d_bias, *inputs = ctx.saved_tensors
        grads: list[Tensor | None] = [None] * 13
        if grad_loss is None and grad_nll is None:
            return tuple(grads)
        upstream = torch.zeros_like(token_scale) if grad_nll is None else grad_nll
        if grad_loss is not None:
            upstream = upstream + grad_loss * token_scale
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        if needs_hidden:
            grads[0] = scaled_gradient(d_hidden, upstream, d_hidden.dtype)
        if ctx.weight_grad and grad_loss is not None:
            grads[1] = scaled_gradient(d_weight, grad_loss, ctx.weight_dtype)
        if ctx.bias_grad and grad_loss is not None:
            grads[2] = scaled_gradient(d_bias, grad_loss, ctx.weight_dtype)
        again_weight, again_bias = needs_weight and not ctx.weight_grad, needs_bias and not ctx.bias_grad
        if again_weight or again_bias:
            # The upstream gradient of each token is known only now: the logits once more, then dW.
            again = op(*inputs, upstream, *ctx.options, False, again_weight, again_bias, reference.STATS_NONE)
            if again_weight:
                grads[1] = again[3].to(ctx.weight_dtype)
            if again_bias:
                grads[2] = again[4].to(ctx.weight_dtype)
        return tuple(grads)

    return backward


def _scaled_gradient_fake(gradient: Tensor, upstream: Tensor, out_dtype: torch.dtype) -> Tensor:
    return gradient.new_empty(gradient.shape, dtype=out_dtype)


def _triton_forward(*args: Any) -> tuple[Tensor, ...]:
    # Imported at the first call: triton takes a second to import.
    from lead_fast.kernels import linear_cross_entropy as kernels  # pyright: ignore[reportMissingImports]

    return kernels.linear_cross_entropy(*args)


def _triton_scaled_gradient(gradient: Tensor, upstream: Tensor, out_dtype: torch.dtype) -> Tensor:
    from lead_fast.kernels import scaled_gradient as kernels  # pyright: ignore[reportMissingImports]

    return kernels.scaled_gradient(gradient, upstream, out_dtype)


def _register(library: torch.library.Library) -> dict[str, Operator]:
    """Defines the overloads and their rules; the extension brings the kernels of `.cpp`."""
    operators: dict[str, Operator] = {}
    for backend in get_args(Backend):
        overloads: list[Operator] = []
        for name, schema, fake in ((_SCALE_OP, _SCALE_SCHEMA, _scaled_gradient_fake), (_OP, _SCHEMA, _forward_fake)):
            library.define(f"{name}.{backend}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
            torch.library.register_fake(f"{library.ns}::{name}.{backend}", fake, lib=library)
            overloads.append(getattr(getattr(torch.ops.lead_fast, name), backend))
        scaled_gradient, operators[backend] = overloads
        rule = _backward(operators[backend], scaled_gradient)
        qualified = f"{library.ns}::{_OP}.{backend}"
        torch.library.register_autograd(qualified, rule, setup_context=_setup_context, lib=library)
    kernels: dict[str, Callable[..., Any]] = {
        f"{_OP}.reference": reference.linear_cross_entropy,
        f"{_SCALE_OP}.reference": reference.scaled_gradient,
        f"{_OP}.triton": _triton_forward,
        f"{_SCALE_OP}.triton": _triton_scaled_gradient,
    }
    for name, kernel in kernels.items():
        library.impl(name, kernel, "CompositeExplicitAutograd")
    return operators


_HAS_CPP = extension.available()["_ops_cpu"]
_HAS_TRITON = find_spec("triton") is not None
_TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_library = torch.library.Library("lead_fast", "FRAGMENT")
_operators = _register(_library)
