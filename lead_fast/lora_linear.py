"""A linear layer with a LoRA adapter as one operator: its products and nothing else.

    y = x W^T + b + s (x A^T) B^T        x [T, in], W [out, in] frozen, A [r, in], B [out, r]

    forward     u = s x A^T        y = x W^T + b        y += u B^T
    backward    v = s g B          dx = g W             dx += v A       dA = v^T x      dB = g^T u

peft's own forward passes over [T, in] and [T, out] again and again around these products: it casts x to the precision of the
adapter, which autocast undoes, scales, adds, and keeps a copy of x for each layer that reads it. On an H200 that was a fifth
of an 8B-shape Llama's time a token; here the products add in place. What is kept for backward is x, which layers that read
the same share, and u.

Accumulation: fp32 in each product; y and dx are rounded twice (after each of their two), dA and dB once, to the precision of
A and B. Determinism: that of the products.
Source: Hu et al. 2021 (arXiv 2106.09685) for the adapter.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lead_fast.shards import is_partitioned


class _LoraLinear(torch.autograd.Function):
    """x [T, in] in `dtype`, in which all products are taken; W and b are constants."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype
    ) -> Tensor:
        a_, b_ = a.to(dtype), b.to(dtype)
        y = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
        u = x @ a_.T
        if scaling != 1.0:
            u *= scaling
        y.addmm_(u, b_.T)
        ctx.save_for_backward(x, weight, a_, b_, u)
        ctx.scaling, ctx.precisions = scaling, (a.dtype, b.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, u = ctx.saved_tensors
        needs_x, _, _, needs_a, needs_b, *_ = ctx.needs_input_grad
        dx = da = db = None
        if needs_x or needs_a:
            v = g @ b
            if ctx.scaling != 1.0:
                v *= ctx.scaling
            if needs_x:
                dx = g @ weight.to(g.dtype)
                dx.addmm_(v, a)
            if needs_a:
                da = _product(v.T, x, ctx.precisions[0])
        if needs_b:
            db = _product(g.T, u, ctx.precisions[1])
        return dx, None, None, da, db, None, None


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right in `dtype`, without a rounding to the factors' own where the library can."""
    if left.is_cuda and dtype == torch.float32 and left.dtype != dtype:
        return torch.mm(left, right, out_dtype=dtype)
    return torch.mm(left, right).to(dtype)


def _products(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype
) -> Tensor:
    """`_LoraLinear` without a backward of its own."""
    y = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
    return torch.addmm(y, scaling * (x @ a.to(dtype).T), b.to(dtype).T)


def _is_watched(module: nn.Module) -> bool:
    """Something wants the module itself to be called."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in module.__dict__


class LoraLinear(PeftLinear):
    """peft's layer with the operator in place of its forward, wherever the operator computes the same."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        name = self._operator_serves() if not (args or kwargs) and x.ndim > 1 else None
        if name is None:
            return super().forward(x, *args, **kwargs)
        base: Any = self.base_layer
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        if not autocast and not dtype == base.weight.dtype == a.dtype == b.dtype:
            return super().forward(x)  # which takes each product in a precision of its own
        # torch 2.11 compiles the operator to gradients of 0; a compiler finds the products in plain code as well.
        operator: Any = _products if torch.compiler.is_compiling() else _LoraLinear.apply
        y = operator(x.to(dtype).flatten(0, -2), base.weight, base.bias, a, b, self.scaling[name], dtype)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _operator_serves(self) -> str | None:
        """The one adapter that is active and plain, or None.

        Hooks on its parts, and what replaces their forward, want them called: some gather or load weights by that.
        """
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        (name,) = self.active_adapters
        if name not in self.lora_A or name in self.lora_variant or not isinstance(self.lora_dropout[name], nn.Identity):
            return None
        base, b = self.base_layer, self.lora_B[name]
        if b.bias is not None or type(base) is not nn.Linear or any(map(_is_watched, (base, self.lora_A[name], b))):
            return None
        trained = base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad)
        return None if trained else name


def fuse_lora(model: nn.Module) -> int:
    """Has the plain LoRA layers of a peft model run as one operator each; anything else stays with peft.

    Args:
        model: changed in place; its parameters, their names and what peft saves are as before.

    Returns:
        The number of layers.
    """
    layers = [m for m in model.modules() if type(m) is PeftLinear and type(m.base_layer) is nn.Linear]
    layers = [m for m in layers if not any(map(is_partitioned, m.parameters()))]
    for layer in layers:
        layer.__class__ = LoraLinear
    return len(layers)
