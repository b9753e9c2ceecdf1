"""The operators in plain PyTorch: what every kernel is tested against, and the fallback where there are no kernels.

Everything here is written to be read. It materialises the full logits, so memory is 4 to 6 times ``T * V * 4`` bytes.

Linear cross-entropy, per token t of sample i (T tokens, H hidden, V vocabulary, S samples):

    a_t = W h_t + bias                              [V]   h_t [H], W [V, H]
    z_t = cap * tanh(logit_scale * a_t / cap)       [V]   without a cap: z_t = logit_scale * a_t
    nll_t = logsumexp(z_t) - z_t[y]
    delta_t = softmax(z_t) - onehot(y)              [V]   gradient of nll_t at z_t
    d_t = W^T (delta_t * dz_t/da_t)                 [H]   gradient of nll_t at h_t
    loss = sum_t scale_t * nll_t
    dW = sum_t scale_t (delta_t * dz_t/da_t) h_t^T  [V, H]
    G_i = || sum_{t in i} d_t h_t^T ||_F^2          squared gradient norm of a linear map at the last hidden state
"""

from __future__ import annotations

import torch
from torch import Tensor

STATS_NONE, STATS_LOSS, STATS_ALL = 0, 1, 2


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, gradients and per-sample statistics of a linear head with cross-entropy.

    The contract of every backend. `acc` is fp64 for fp64 inputs and fp32 otherwise.

    Args:
        hidden: [T, H] fp64, fp32, bf16 or fp16. Rows of ignored tokens are never used and may hold anything.
        weight: [V, H], dtype and device of `hidden`.
        bias: [V], dtype and device of `hidden`, or None.
        labels: [T] int64. A supervised label outside [0, V) makes everything computed from its token NaN.
        cu_seqlens: [S + 1] int32 or int64, from 0 to T, not decreasing: sample i holds tokens cu[i] to cu[i + 1] - 1.
        token_scale: [T] acc, the derivative of `loss` by each token's nll. Statistics do not depend on it.
        ignore_index: label of unsupervised tokens.
        softcap: cap of the logits, 0 for none.
        logit_scale: factor on the logits, applied before the cap.
        hidden_grad: whether to return `d_hidden`.
        weight_grad: whether to return `d_weight`.
        bias_grad: whether to return `d_bias`.
        stats: STATS_NONE, STATS_LOSS (columns 0 and 1; the others NaN) or STATS_ALL.

    Returns:
        loss: [] acc, sum of token_scale * nll; a token of scale 0 contributes exactly 0, whatever its nll.
        nll: [T] acc, 0 where ignored.
        d_hidden: [T, H] in the dtype of `hidden`, row t the gradient of nll[t] alone; [0] unless asked for.
        d_weight: [V, H] acc, gradient of `loss`; [0] unless asked for. A token of scale 0 contributes exactly 0.
        d_bias: [V] acc, gradient of `loss`; [0] unless asked for.
        sample_stats: [S, 5] acc: mean nll, supervised tokens, mean ||delta_t||^2, mean ||d_t||^2, G_i; a sample without
            supervised tokens has 0 in every column. [0, 5] for STATS_NONE.
        bad_labels: [] int64, the number of supervised labels outside [0, V).

    Determinism: bitwise on CPU. On CUDA sums per sample use atomics and may differ in the last bits.
    """
    acc = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    vocab = weight.shape[0]
    supervised = labels != ignore_index
    out_of_range = supervised & ((labels < 0) | (labels >= vocab))
    target = torch.where(supervised & ~out_of_range, labels, 0)[:, None]

    h = hidden.to(acc).masked_fill(~supervised[:, None], 0)
    w = weight.to(acc)
    logits = h @ w.T
    if bias is not None:
        logits = logits + bias.to(acc)
    logits = logit_scale * logits
    slope: Tensor | float = logit_scale  # dz/da
    if softcap > 0:
        capped = logits / softcap
        logits = softcap * torch.tanh(capped)
        e = torch.exp(-2 * capped.abs())
        slope = logit_scale * 4 * e / (1 + e) ** 2  # 1 - tanh^2, which itself has no digits left near the cap
    logits = logits.masked_fill(out_of_range[:, None], torch.nan)

    # The target is left out of `others`, so that nll and 1 - p_y keep their digits when p_y is near 1.
    shifted = logits - logits.amax(dim=1, keepdim=True)
    exps = shifted.exp()
    others = exps.scatter(1, target, 0).sum(dim=1)
    shifted_y = shifted.gather(1, target).squeeze(1)
    total = others + shifted_y.exp()
    nll = torch.where(shifted_y == 0, others.log1p(), total.log() - shifted_y).masked_fill(~supervised, 0)
    loss = torch.where(token_scale == 0, 0, token_scale * nll).sum()

    delta = (exps / total[:, None]).scatter(1, target, -(others / total)[:, None])
    delta = delta.masked_fill(~supervised[:, None], 0)
    delta_a = (delta * slope).masked_fill(~supervised[:, None], 0)  # under a cap a bias of NaN reaches ignored rows
    empty = hidden.new_empty(0, dtype=acc)

    d_hidden = delta_a @ w if hidden_grad or stats == STATS_ALL else empty
    d_weight = d_bias = empty
    if weight_grad or bias_grad:
        unused = (token_scale == 0)[:, None]
        scaled = (delta_a * token_scale[:, None]).masked_fill(unused, 0)
        if weight_grad:
            d_weight = scaled.T @ h.masked_fill(unused, 0)
        if bias_grad:
            d_bias = scaled.sum(dim=0)

    sample_stats = empty.new_empty(0, 5)
    if stats != STATS_NONE:
        sample_stats = _sample_stats(nll, supervised, cu_seqlens, delta, d_hidden, h, stats)
    return (
        loss,
        nll,
        d_hidden.to(hidden.dtype) if hidden_grad else hidden.new_empty(0),
        d_weight,
        d_bias if bias_grad else empty.clone(),  # operator outputs must not share storage
        sample_stats,
        out_of_range.sum(),
    )


def _sample_stats(
    nll: Tensor, supervised: Tensor, cu_seqlens: Tensor, delta: Tensor, d_hidden: Tensor, h: Tensor, stats: int
) -> Tensor:
    """[S, 5] statistics of `linear_cross_entropy`; a NaN stays in the sample that it came from."""
    out = nll.new_zeros(cu_seqlens.shape[0] - 1, 5)
    bounds = cu_seqlens.tolist()
    for row, start, end in zip(out, bounds[:-1], bounds[1:], strict=True):
        tokens = slice(start, end)
        n = supervised[tokens].sum()
        per_token = 1 / n.clamp(min=1)
        row[0] = nll[tokens].sum() * per_token
        row[1] = n
        if stats == STATS_ALL:
            row[2] = delta[tokens].square().sum() * per_token
            row[3] = d_hidden[tokens].square().sum() * per_token
            row[4] = (d_hidden[tokens].T @ h[tokens]).square().sum()
        else:
            row[2:] = torch.where(n > 0, torch.nan, 0.0)
    return out


def scaled_gradient(gradient: Tensor, upstream: Tensor, out_dtype: torch.dtype) -> Tensor:
    """A gradient under unit upstream gradient, times the true one.

    Args:
        gradient: [R, C] or [C], any floating dtype.
        upstream: [], or [R] for a gradient [R, C]: one factor a row; fp32, fp64 for an fp64 gradient.
        out_dtype: dtype of the result; the product is rounded once.

    Returns:
        gradient * upstream, exactly 0 where `upstream` is 0, also for inf and NaN.
    """
    factor = upstream[:, None] if upstream.dim() else upstream
    return torch.where(factor == 0, 0, gradient * factor).to(out_dtype)
