"""Linear head with cross-entropy: loss, gradients and per-sample statistics, without stored logits.

Token rows go through in chunks. Of each chunk:

    x = h W^T + bias             GEMM
    x <- delta * dz/dx           `logit_rows`, in place; nll, ||delta||^2
    d = x W                      GEMM, fp32 out
    d_hidden <- d                `hidden_rows`: rounded; ||d||^2
    hw = w h                     `weighted_rows`     only with dW
    dW += x^T hw                 GEMM, fp32 out      only with dW

and then, over the batch: `token_scan`, `sample_tiles`, `sample_gram`, `sample_outer`, `sample_stats`. That is two GEMMs
of T H V, three with dW, for every reduction: d_hidden has no upstream gradient in it, backward scales its rows.

Chunks follow from shape and card alone (`card.CHUNKING`). dW is accumulated in fp32 by the GEMMs themselves; d is taken
in fp32 also without statistics, since for a 16-bit result the GEMM library may add up partial sums in 16 bits. Nothing
synchronises with the host and the shape of every launch is known there, so the whole can be captured in a CUDA graph.
Two runs give the same bits, given a GEMM library that does (cuBLAS on one stream).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from .bias_grad import bias_grad as add_bias_grad
from .card import card, chunk_rows, padded_row
from .hidden_rows import hidden_rows
from .logit_rows import logit_rows
from .sample_gram import gram_launch, sample_gram
from .sample_outer import outer_launch, sample_outer
from .sample_stats import sample_stats as fill_sample_stats
from .sample_tiles import most_gram_tiles, most_outer_tiles, sample_tiles
from .single_pass_rows import ENABLED as single_pass_is_enabled
from .single_pass_rows import put_targets, single_pass_rows
from .token_scan import token_scan
from .weighted_rows import weighted_rows

STATS_NONE, STATS_LOSS, STATS_ALL = 0, 1, 2


@torch.no_grad()
def linear_cross_entropy(
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
    *,
    single_pass: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, gradients and per-sample statistics of a linear head with cross-entropy.

    The contract is that of the plain PyTorch reference.

    Args:
        hidden: [T, H] fp32, bf16 or fp16 on CUDA, or on the CPU under Triton's interpreter. Rows of ignored tokens may
            hold anything.
        weight: [V, H], dtype and device of `hidden`.
        bias: [V], dtype and device of `hidden`, or None.
        labels: [T] int64. A supervised label outside [0, V) makes everything computed from its token NaN.
        cu_seqlens: [S + 1] int32 or int64, from 0 to T, not decreasing: sample i holds tokens cu[i] to cu[i + 1] - 1.
        token_scale: [T] fp32, the derivative of `loss` by each token's nll.
        ignore_index: label of unsupervised tokens.
        softcap: cap of the logits, 0 for none.
        logit_scale: factor on the logits, applied before the cap.
        hidden_grad: whether to return `d_hidden`.
        weight_grad: whether to return `d_weight`.
        bias_grad: whether to return `d_bias`.
        stats: STATS_NONE, STATS_LOSS (columns 0 and 1; the others NaN) or STATS_ALL.
        single_pass: whether rows go through `single_pass_rows` where it can serve (a gradient to take, not fp16) and
            not through `logit_rows`; None for what its table says of the card.

    Returns:
        loss: [] fp32, sum of token_scale * nll; a token of scale 0 contributes exactly 0, whatever its nll.
        nll: [T] fp32, 0 where ignored.
        d_hidden: [T, H] in the dtype of `hidden`, row t the gradient of nll[t] alone; [0] unless asked for.
        d_weight: [V, H] fp32, gradient of `loss`; [0] unless asked for. A token of scale 0 contributes exactly 0.
        d_bias: [V] fp32, gradient of `loss`; [0] unless asked for.
        sample_stats: [S, 5] fp32: mean nll, supervised tokens, mean ||delta_t||^2, mean ||d_t||^2, G_i; a sample
            without supervised tokens has 0 in every column. [0, 5] for STATS_NONE.
        bad_labels: [] int64, the number of supervised labels outside [0, V).

    Determinism: bitwise.
    """
    with torch.cuda.device_of(hidden):
        hidden, weight, labels, cu_seqlens, token_scale = (
            tensor.contiguous() for tensor in (hidden, weight, labels, cu_seqlens, token_scale)
        )
        num_tokens, num_samples = hidden.shape[0], cu_seqlens.shape[0] - 1
        all_stats = stats == STATS_ALL
        needs_gradient = hidden_grad or weight_grad or bias_grad or all_stats
        if single_pass is None:
            single_pass = single_pass_is_enabled[card(hidden.device)]
        single_pass = single_pass and needs_gradient and hidden.dtype != torch.float16
        empty = torch.empty if num_tokens > 0 else torch.zeros  # what the chunks fill, or 0 where there are none
        f32 = {"dtype": torch.float32, "device": hidden.device}
        nll, delta_sq, d_sq = (torch.empty(num_tokens, **f32) for _ in range(3))
        d_hidden = torch.empty_like(hidden) if hidden_grad or all_stats else None
        d_weight = empty(weight.shape if weight_grad else 0, **f32)
        d_bias = torch.zeros(weight.shape[0] if bias_grad else 0, **f32)
        # In fp16 the weights of tokens are taken in units of the largest, see `weighted_rows`.
        scaled = weight_grad and hidden.dtype == torch.float16 and num_tokens > 0
        unit = token_scale.abs().amax().reshape(1) if scaled else None

        options = {"ignore_index": ignore_index, "softcap": softcap, "logit_scale": logit_scale}
        for chunk, logits in _chunks_of_logits(hidden, weight, bias, weight_grad):
            h, y, scale = hidden[chunk], labels[chunk], token_scale[chunk]
            factors = None
            if single_pass:
                factors = single_pass_rows(logits, y, nll[chunk], delta_sq[chunk], **options)
            else:
                logit_rows(logits, y, nll[chunk], delta_sq[chunk], write_delta=needs_gradient, **options)
            gradient = logits
            if d_hidden is not None:
                product = _mm_f32(gradient, weight, torch.empty(h.shape, **f32))
                hidden_rows(product, y, d_hidden[chunk], d_sq[chunk], weight, factors, ignore_index=ignore_index)
            if factors is not None and (weight_grad or bias_grad):
                inverse, target = factors
                put_targets(gradient, y, target)
                scale = (scale * inverse).masked_fill_(scale == 0, 0)
            if weight_grad:
                weighted = torch.empty_like(h)
                weighted_rows(h, y, scale, unit, weighted, gradient, nll[chunk], ignore_index=ignore_index)
                _mm_f32(gradient.T, weighted, d_weight, accumulate=chunk.start > 0)
            if bias_grad:
                add_bias_grad(gradient, y, scale, d_bias, ignore_index=ignore_index)
        if unit is not None:
            d_weight.mul_(unit)

        before = torch.empty(num_tokens + 1, dtype=torch.int32, device=hidden.device)
        supervised = torch.empty(num_tokens, dtype=torch.int32, device=hidden.device)
        loss, bad_labels = torch.empty((), **f32), labels.new_empty(())
        token_scan(
            labels, nll, token_scale, before, supervised, loss, bad_labels,
            vocab=weight.shape[0], ignore_index=ignore_index,
        )  # fmt: skip
        sample_stats = torch.empty(num_samples if stats != STATS_NONE else 0, 5, **f32)
        if sample_stats.shape[0] > 0:
            norms = (delta_sq, d_sq, d_hidden) if all_stats else None
            _fill_sample_stats(hidden, cu_seqlens, nll, norms, before, supervised, sample_stats)
    return loss, nll, d_hidden if hidden_grad else hidden.new_empty(0), d_weight, d_bias, sample_stats, bad_labels


def _chunks_of_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    trained: bool,
) -> Iterator[tuple[slice, Tensor]]:
    """Raw logits [R, V] of each chunk of tokens, all in the same memory."""
    (num_tokens, hidden_size), vocab = hidden.shape, weight.shape[0]
    rows = chunk_rows(num_tokens, hidden_size, vocab, hidden.element_size(), card(hidden.device), trained)
    buffer = hidden.new_empty(rows, padded_row(vocab))[:, :vocab]
    for start in range(0, num_tokens, max(rows, 1)):
        chunk = slice(start, min(start + rows, num_tokens))
        logits = buffer[: chunk.stop - chunk.start]
        if bias is None:
            torch.mm(hidden[chunk], weight.T, out=logits)
        else:
            torch.addmm(bias, hidden[chunk], weight.T, out=logits)
        yield chunk, logits


def _mm_f32(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> Tensor:
    """out = a @ b, or out += a @ b, rounded to fp32 only; out is fp32."""
    if a.dtype == torch.float32:
        return torch.addmm(out, a, b, beta=1 if accumulate else 0, out=out)
    if not a.is_cuda:  # under the interpreter: on the CPU PyTorch has no products with an fp32 result
        return _mm_f32(a.float(), b.float(), out, accumulate)
    if accumulate:
        return torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def _fill_sample_stats(
    hidden: Tensor,
    cu_seqlens: Tensor,
    nll: Tensor,
    norms: tuple[Tensor, Tensor, Tensor] | None,
    before: Tensor,
    supervised: Tensor,
    stats: Tensor,
) -> None:
    """Fills `stats` [S, 5]; `norms` are ||delta_t||^2 [T], ||d_t||^2 [T] and d_t [T, H], None for the loss only."""
    num_tokens, hidden_size = hidden.shape
    num_samples = stats.shape[0]
    tokens_per_tile = gram_launch(hidden).block_t
    tiles_per_outer = triton.cdiv(hidden_size, outer_launch(hidden).block_c) ** 2
    first_row, first_gram, first_outer = (before.new_empty(num_samples + 1) for _ in range(3))
    sample_tiles(
        cu_seqlens, before, first_row, first_gram, first_outer,
        hidden_size=hidden_size, tokens_per_tile=tokens_per_tile, tiles_per_outer=tiles_per_outer,
    )  # fmt: skip
    delta_sq = d_sq = gram = outer = None
    if norms is not None:
        delta_sq, d_sq, d_hidden = norms
        gram = nll.new_empty(most_gram_tiles(num_tokens, num_samples, hidden_size, tokens_per_tile))
        outer = nll.new_empty(most_outer_tiles(num_tokens, hidden_size, tiles_per_outer))
        sample_gram(hidden, d_hidden, supervised, first_row, first_gram, gram)
        if outer.shape[0] > 0:
            sample_outer(hidden, d_hidden, supervised, first_row, first_outer, outer)
    fill_sample_stats(cu_seqlens, nll, delta_sq, d_sq, first_row, first_gram, first_outer, gram, outer, stats)
