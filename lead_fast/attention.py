"""Attention over packed samples, registered with transformers: no padding, and no sample sees another.

On a GPU in half precision it is one variable-length kernel: flash-attn where it is installed, else torch's own
`torch.nn.attention.varlen`. Their signatures differ from release to release, so each is called by what it takes. What the
kernel cannot serve, and every other device and dtype, goes sample by sample, which is said once.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

COMPILED_LAYER = "lead_fast_compiled_layer"  # (the layer,) as an attribute of its modules: a tuple is no child
PACKED_ATTENTION = "lead_fast_packed"
_HALF = (torch.bfloat16, torch.float16)
_FLASH_CAPABILITY, _FLASH_HEAD_DIM, _VARLEN_UNIT = (8, 0), 256, 8


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    s_aux: Tensor | None = None,
    block_indices: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each packed sample.

    Args:
        query: [1, heads, T, D]; key, value: [1, KV heads, T, D].
        scaling: of the scores; None is D ** -0.5.
        sliding_window: keys a query sees, itself included; None is all before it.
        softcap: cap * tanh(scores / cap) before the softmax.
        cu_seq_lens_q: int32 [S + 1], sample boundaries; None is one sample.
        max_length_q: tokens of the longest sample.

    Returns:
        [1, T, heads, D], and None for the weights.

    Raises:
        ValueError: the model has attention sinks (`s_aux`) or attends to some blocks alone (`block_indices`).
    """
    if s_aux is not None:
        raise ValueError("packed_attention: attention sinks (`s_aux`) are not served")
    if block_indices is not None:
        raise ValueError("packed_attention: attention to chosen blocks (`block_indices`) is not served")
    device = query.device.type
    if torch.is_autocast_enabled(device):  # it knows none of the kernels; rotary embeddings make fp32 of half precision
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    kernel, reason = _kernel_for(query, value.shape[-1], dropout, scaling, sliding_window, softcap)
    if kernel is None or cu_seq_lens_q is None or max_length_q is None:
        if reason is not None and not _unsaid:
            say_once(f"attention runs sample by sample: {reason}")
        recomputed = torch.compiler.is_compiling() and _is_recomputed(module)
        if recomputed and dropout > 0.0:
            say_once("attention has dropout: torch.compile makes no graph of layers that are recomputed")
        if recomputed and dropout == 0.0:
            return _per_sample_operator(query, key, value, cu_seq_lens_q, scaling, sliding_window, softcap), None
        return _uncompiled(query, key, value, cu_seq_lens_q, dropout, scaling, sliding_window, softcap), None
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # [T, heads, D]
    bounds = cu_seq_lens_q.to(torch.int32)
    return kernel(q, k, v, bounds, max_length_q, scaling, sliding_window, softcap, dropout).unsqueeze(0), None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)


def describe_attention(device: torch.device, dtype: torch.dtype) -> str:
    """What `packed_attention` will run on a device, in words."""
    if device.type != "cuda" or dtype not in _HALF or not _is_new_enough(device.index):
        return "sample by sample (scaled_dot_product_attention)"
    name = _library()
    return "sample by sample: neither flash-attn nor torch.nn.attention.varlen is there" if name is None else name


def _constant(function: Callable[P, R]) -> Callable[P, R]:
    """Called once for each of its arguments, and never by a compiled graph, which keeps what it returned."""
    cached = cache(function)

    @torch.compiler.assume_constant_result
    @wraps(function)
    def constant(*args: P.args, **kwargs: P.kwargs) -> R:
        return cached(*args, **kwargs)  # pyright: ignore[reportCallIssue]  hashable

    return constant


@_constant
def say_once(text: str) -> None:
    logger.warning("%s", text)


_unsaid: list[None] = []


@contextmanager
def unsaid() -> Iterator[None]:
    """Within, nothing is said of what runs sample by sample: a check of a model is not its training."""
    _unsaid.append(None)
    try:
        yield
    finally:
        _unsaid.pop()


@_constant
def _library() -> str | None:
    if find_spec("flash_attn") is not None:
        try:
            _function("flash-attn")
        except ImportError as error:  # built for another torch, or another package of that name
            logger.warning("flash-attn is installed, but not to be used: %s", error)
        else:
            return "flash-attn"
    return "torch.nn.attention.varlen" if find_spec("torch.nn.attention.varlen") is not None else None


@_constant
def _is_new_enough(device: int | None) -> bool:
    return torch.cuda.get_device_capability(device) >= _FLASH_CAPABILITY


def _function(library: str) -> Callable[..., Any]:
    """The library's variable-length attention."""
    if library == "flash-attn":
        from flash_attn import flash_attn_varlen_func as function  # pyright: ignore[reportMissingImports]
    else:
        from torch.nn.attention.varlen import varlen_attn as function
    return function


@_constant
def _takes(library: str, parameter: str) -> bool:
    return parameter in inspect.signature(_function(library)).parameters


def _kernel_for(
    query: Tensor, value_dim: int, dropout: float, scaling: float | None, window: int | None, softcap: float | None
) -> tuple[Callable[..., Tensor] | None, str | None]:
    """The kernel that serves these arguments, or None and what is in its way (nothing worth saying on a CPU)."""
    if query.device.type != "cuda":
        return None, None
    library = _library()
    if library is None:
        return None, "neither flash-attn nor torch.nn.attention.varlen is there"
    if not _is_new_enough(query.device.index):
        return None, f"{library} serves cards of compute capability 8.0 and newer"
    if query.dtype not in _HALF:
        return None, f"{library} serves bf16 and fp16, got {str(query.dtype).removeprefix('torch.')}"
    if query.shape[-1] > _FLASH_HEAD_DIM:
        return None, f"{library} serves heads of at most {_FLASH_HEAD_DIM}, got {query.shape[-1]}"
    if value_dim != query.shape[-1]:
        return None, f"{library} serves values as wide as keys, got {value_dim} and {query.shape[-1]}"
    if query.shape[-1] % _VARLEN_UNIT and library != "flash-attn":  # which pads them itself
        return None, f"{library} serves heads of a multiple of {_VARLEN_UNIT}, got {query.shape[-1]}"
    if softcap is not None and not _takes(library, "softcap"):
        return None, f"{library} has no softcap"
    if window is not None and not _takes(library, "window_size"):
        return None, f"{library} of torch {torch.__version__} has no windows"
    if dropout > 0.0 and not _takes(library, "dropout_p"):
        return None, f"{library} has no dropout"
    return (_flash if library == "flash-attn" else _varlen), None


def _flash(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scaling: float | None, window: int | None,
    softcap: float | None, dropout: float,
) -> Tensor:  # fmt: skip
    function = _function("flash-attn")
    options: dict[str, Any] = {} if softcap is None else {"softcap": softcap}
    if window is not None:
        options["window_size"] = (window - 1, 0)
    return function(
        q, k, v, bounds, bounds, longest, longest, dropout_p=dropout, softmax_scale=scaling, causal=True, **options
    )  # fmt: skip


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scaling: float | None, window: int | None,
    softcap: float | None, dropout: float,
) -> Tensor:  # fmt: skip
    library = "torch.nn.attention.varlen"
    function = _function(library)
    options: dict[str, Any] = {}
    # torch 2.10 has is_causal and neither scale nor windows; 2.11 has both; 2.12 shares KV heads among query heads.
    if _takes(library, "window_size"):
        options["window_size"] = (-1 if window is None else window - 1, 0)
    else:
        options["is_causal"] = True
    if _takes(library, "scale"):
        options["scale"] = scaling
    elif scaling is not None:
        q = q * (scaling * q.shape[-1] ** 0.5)
    if k.shape[1] != q.shape[1]:
        if _takes(library, "enable_gqa"):
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return function(q, k, v, bounds, bounds, longest, longest, **options)


def per_sample_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens_q: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The same, sample by sample: cost grows with the sum of squared lengths, not the square of the sum.

    Returns:
        [1, T, heads, D], contiguous.
    """
    bounds = [0, query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
    outputs = []
    for start, end in pairwise(bounds):
        q, k, v = (x[:, :, start:end] for x in (query, key, value))
        window = sliding_window if sliding_window is not None and sliding_window < end - start else None
        if softcap is None:
            mask = None if window is None else _window_mask(end - start, window, query.device)
            outputs.append(
                F.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling,
                    enable_gqa=q.shape[1] != k.shape[1],
                )
            )  # fmt: skip
        else:
            outputs.append(_softcapped_attention(q, k, v, softcap, scaling, window, dropout))
    return torch.cat([out.transpose(1, 2) for out in outputs], 1)


# Lengths are numbers in it: compiled, each batch would be a graph of its own.
_uncompiled: Any = torch.compiler.disable(per_sample_attention)


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None, :]
    return (distance >= 0) & (distance < (length if window is None else window))


def _softcapped_attention(
    q: Tensor, k: Tensor, v: Tensor, softcap: float, scaling: float | None, window: int | None, dropout: float
) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(2, 3)) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~_window_mask(q.shape[2], window, q.device), -torch.inf)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, dropout) @ v


# Sample by sample as one operator of a compiled graph. What it does follows the lengths, which no graph holds: torch.compile
# splits a layer around it, but a layer that is recomputed becomes one graph or none.


def _is_recomputed(module: nn.Module) -> bool:
    (layer,) = getattr(module, COMPILED_LAYER, (None,))
    return layer is not None and layer.training and getattr(layer, "gradient_checkpointing", False)


@torch.library.custom_op("lead_fast::per_sample_attention", mutates_args=())
def _per_sample_operator(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_lens_q: Tensor | None, scaling: float | None, window: int | None,
    softcap: float | None,
) -> Tensor:  # fmt: skip
    with torch.autocast(query.device.type, enabled=False):
        return per_sample_attention(query, key, value, cu_seq_lens_q, 0.0, scaling, window, softcap)


@torch.library.custom_op("lead_fast::per_sample_attention_backward", mutates_args=())
def _per_sample_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, cu_seq_lens_q: Tensor | None, scaling: float | None,
    window: int | None, softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Runs the forward again: what a kernel keeps for its backward differs from one to the next."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return per_sample_attention(q, k, v, cu_seq_lens_q, 0.0, scaling, window, softcap)

    with torch.autocast(query.device.type, enabled=False):
        _, pull_back = torch.func.vjp(attend, query, key, value)  # pyright: ignore[reportAssignmentType]  no has_aux
        d_query, d_key, d_value = pull_back(gradient)
    return d_query.contiguous(), d_key.contiguous(), d_value.contiguous()


@_per_sample_operator.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])


@_per_sample_backward.register_fake
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, bounds, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, bounds)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return (*_per_sample_backward(gradient, *ctx.saved_tensors, *ctx.options), None, None, None, None)


_per_sample_operator.register_autograd(_backward, setup_context=_keep)
