"""A saved gradient times its upstream gradient, in the dtype of the parameter.

    out_r = upstream_r * gradient_r      exactly 0 where upstream_r is 0: gradient_r is not read there

    symbol    shape         dtype               meaning
    gradient  [R, C]        fp32, bf16, fp16    d_hidden [T, H], d_weight [V, H], d_bias [1, V]
    upstream  [R] or []     fp32                a factor a row, or one for all
    out       [R, C]        fp32, bf16, fp16    written

Accumulation: fp32.
Determinism: bitwise; no atomics.
Bytes moved: R * C * (itemsize of gradient + itemsize of out), 6 bytes an element of dW; a product and a fill take 10.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .card import RowLaunch, card


@triton.jit(do_not_specialize=["upstream_stride"])
def _scaled_gradient_kernel(
    gradient_ptr,  # [R, C]
    upstream_ptr,  # [R] fp32, or one number with upstream_stride 0
    out_ptr,  # [R, C]
    columns,
    upstream_stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    upstream = tl.load(upstream_ptr + row * upstream_stride)
    used = tl.where(upstream == 0.0, 0, columns)
    start = row.to(tl.int64) * columns
    gradient = tl.load(gradient_ptr + start + cols, mask=cols < used, other=0.0).to(tl.float32)
    tl.store(out_ptr + start + cols, (upstream * gradient).to(out_ptr.dtype.element_ty), mask=cols < columns)


# Starting guesses, not yet measured on any card.
LAUNCH = {
    "sm_80": RowLaunch(4096, 8),  # A100
    "sm_90": RowLaunch(4096, 8),  # H100, H200
    "sm_100": RowLaunch(4096, 8),  # B200
    "interpreter": RowLaunch(16, 1),
}


def scaled_gradient(gradient: Tensor, upstream: Tensor, out_dtype: torch.dtype) -> Tensor:
    """gradient * upstream, exactly 0 where upstream is 0.

    Args:
        gradient: [R, C] or [C], fp32, bf16 or fp16, on CUDA, or on the CPU under Triton's interpreter.
        upstream: [] fp32, or [R] fp32, one factor a row, for a gradient [R, C].
        out_dtype: fp32, bf16 or fp16.

    Returns:
        The shape of `gradient` in `out_dtype`.

    Determinism: bitwise.
    """
    with torch.cuda.device_of(gradient):
        gradient, upstream = gradient.contiguous(), upstream.contiguous()
        out = torch.empty_like(gradient, dtype=out_dtype)
        if out.numel() > 0:
            columns = gradient.shape[-1]
            block, num_warps = LAUNCH[card(gradient.device)]
            _scaled_gradient_kernel[gradient.numel() // columns, triton.cdiv(columns, block)](
                gradient, upstream, out, columns, upstream.dim(), BLOCK=block, num_warps=num_warps
            )
    return out
