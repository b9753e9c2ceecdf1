"""The only place that touches a transformers model: hidden states out, the LM head, loading, LoRA."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from lead_fast.attention import PACKED_ATTENTION, say_once, unsaid
from lead_fast.ops import LinearCrossEntropyOutput, Reduction, SampleStats, Stats, linear_cross_entropy
from lead_fast.packing import PackedBatch
from lead_fast.shards import are_sharded, is_partitioned

logger = logging.getLogger(__name__)


_SHORT_WINDOW = 8  # tokens

# The LM head


@dataclass(frozen=True)
class Head:
    """The LM head of a model: logits = softcap(logit_scale * (weight @ h + bias))."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    softcap: float | None
    logit_scale: float


def lm_head(model: PreTrainedModel) -> Head:
    """The head that the fused loss computes in the model's place.

    Raises:
        ValueError: a head that it cannot serve: none, adapters on it, sharded or quantized weights.
    """
    head, name = head_of(model), type(model).__name__
    weight = head.weight
    whole = weight.shape == (head.out_features, head.in_features) and not weight.is_meta
    if type(weight.data).__name__ == "DTensor" or not whole or not weight.is_floating_point():
        raise ValueError(
            f"lm_head: the head weight of {name} must be one whole floating point "
            f"[{head.out_features}, {head.in_features}] tensor, "
            f"got {type(weight.data).__name__} {weight.dtype} {list(weight.shape)} on {weight.device}"
        )
    softcap, scale = _after_head(model)
    return Head(weight, getattr(head, "bias", None), softcap, scale)


def _after_head(model: PreTrainedModel) -> tuple[float | None, float]:
    """softcap and logit_scale of a model, by the names that families have for them; `check_head` sees whether they hold."""
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) * float(getattr(config, "lm_head_multiplier", None) or 1.0)
    if getattr(config, "logits_scaling", None):
        scale /= float(config.logits_scaling)
    caps = (getattr(config, name, None) for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"))
    return next((float(cap) for cap in caps if cap), None), scale


def head_of(model: PreTrainedModel) -> nn.Linear:
    head: Any = model.get_output_embeddings()
    name = type(model).__name__
    if head is None:
        raise ValueError(f"lm_head: `model` must have an LM head, got {name} without output embeddings")
    if type(head) is not nn.Linear and type(head).__bases__ != (FSDPModule, nn.Linear):
        raise ValueError(
            f"lm_head: the head of {name} must be a plain nn.Linear without adapter, got "
            f"{type(head).__module__}.{type(head).__name__}; take it out of the LoRA target modules or modules_to_save"
        )
    return head


def causal_lm_of(model: Any) -> Any:
    """The transformers model itself, inside an adapter's wrapper where there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def body_of(model: PreTrainedModel) -> nn.Module:
    """What computes the last hidden states: the model without its LM head."""
    body: Any = model.base_model
    if body is model:  # its class names a prefix that it does not have
        body = getattr(model, "model", None)
    if not isinstance(body, nn.Module):
        raise ValueError(f"model: expected a causal LM with a base model of its own, got {type(model).__name__}")
    return body


def text_decoder(model: PreTrainedModel) -> nn.Module:
    """The part of the body that reads text: of a model of images and text its language model, else all of it."""
    body: Any = body_of(model)
    decoder = body.get_decoder() if hasattr(body, "get_decoder") else body
    return decoder if isinstance(decoder, nn.Module) else body


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Compares the head that the fused loss will compute with the model's own logits on four tokens.

    Small logits and half precision hide a cap or a scale; so what the model makes of logits that span 100 nats is compared too,
    in fp32, and that its head is given the last hidden states as they are.

    Raises:
        ValueError: they differ: the model does something to its logits that `lm_head` does not know.
    """
    was_training = model.training
    model.eval()
    module = head_of(model)
    ids, dtype = some_ids(model, 4), module.weight.dtype
    hidden = body_of(model)(input_ids=ids[None], use_cache=False).last_hidden_state

    known: list[Tensor] = []  # what comes of the weight alone, before hooks make something else of it

    def from_weight(hidden: Tensor) -> Tensor:
        head = lm_head(model)
        logits = F.linear(hidden.to(dtype), head.weight, head.bias) * head.logit_scale
        known.append(head.softcap * torch.tanh(logits / head.softcap) if head.softcap else logits)
        return known[0]

    with forward_replaced(module, from_weight):
        module(hidden)
    (logits,) = known
    # A head in another precision than the body: its input is cast as `PackedModel.loss` does, or autocast will.
    cast = module.register_forward_pre_hook(lambda _, args: tuple(arg.to(dtype) for arg in args))
    try:
        own = model(input_ids=ids[None], use_cache=False).logits
    finally:
        cast.remove()
    model.train(was_training)
    if own.shape != logits.shape:
        raise ValueError(
            f"check_head: the head of {type(model).__name__} must give all logits, {list(own.shape)} of its own forward, "
            f"got {list(logits.shape)} of its weight alone (a head split over ranks?); it cannot be served"
        )
    if not torch.isfinite(own).all():
        raise ValueError(
            f"check_head: the logits of {type(model).__name__} must be finite, got NaN or inf: look at its weights"
        )
    tolerance = 1e-3 if _is_exact(own) and dtype == torch.float32 else 5e-2
    if not torch.allclose(logits.float(), own.float(), rtol=tolerance, atol=tolerance * float(own.float().abs().max())):
        raise ValueError(
            f"check_head: {type(model).__name__} computes its logits in a way that the fused loss does not know "
            f"(largest difference {float((logits.float() - own.float()).abs().max()):.3g}); it cannot be served"
        )
    _check_around_head(model, ids, hidden, own.shape)


def _check_around_head(model: PreTrainedModel, ids: Tensor, hidden: Tensor, shape: torch.Size) -> None:
    seen: list[Tensor] = []
    probe = torch.linspace(-50.0, 50.0, shape.numel(), device=ids.device).view(shape)

    def in_place_of_head(given: Tensor) -> Tensor:
        seen.append(given)
        return probe

    training, _ = model.training, model.eval()
    with forward_replaced(head_of(model), in_place_of_head):
        own = model(input_ids=ids[None], use_cache=False).logits
    model.train(training)
    softcap, scale = _after_head(model)
    expected = probe * scale
    expected = softcap * torch.tanh(expected / softcap) if softcap else expected
    tolerance = 1e-3 if own.dtype == torch.float32 else 2e-2
    apart = float((own.float() - expected).abs().max() / expected.abs().max())
    moved = float((seen[0].float() - hidden.float()).norm() / hidden.float().norm())
    if not apart < tolerance or not moved < (1e-3 if _is_exact(hidden) else 2e-2):
        raise ValueError(
            f"check_head: {type(model).__name__} does to its logits, or to the hidden states before them, what the fused loss "
            f"does not know (relative differences {apart:.2g} and {moved:.2g}); it cannot be served"
        )


def some_ids(model: PreTrainedModel, count: int, first: int = 0) -> Tensor:
    """[count] token ids where the model lives."""
    weight: Any = model.get_input_embeddings().weight  # of an adapted embedding nothing else is there
    num_tokens = weight.ds_shape[0] if is_partitioned(weight) else weight.shape[0]
    return torch.arange(first, first + count, device=weight.device) % num_tokens


def transformers_attention(model: PreTrainedModel) -> str:
    """transformers' own attention for a model: not all (Gemma 2) are made for torch's fused one."""
    return "sdpa" if model._supports_sdpa else "eager"


def _is_exact(result: Tensor) -> bool:
    """In fp32, and no autocast around, whose last operation may have been one that it leaves in fp32."""
    return result.dtype == torch.float32 and not torch.is_autocast_enabled(result.device.type)


@torch.no_grad()
def check_packing(model: PackedModel) -> None:
    """Compares two packed samples with each of them alone under transformers' own eager attention.

    Where they differ, the model mixes tokens by something else than attention (convolutions, recurrences, position biases or
    windows of its own) and packed samples would not be what they are alone: they are run one by one from then on. So are those
    of a model that refuses packed batches itself, or whose attention is its own and would look at all pairs of tokens in them.

    Raises:
        ValueError: they still differ; the model is no causal decoder; its results are not finite; or weights are sharded,
            whose ranks would not gather them equally often.
    """
    causal = model.causal_lm
    name, was_training, implementation = type(causal).__name__, model.training, str(causal.config._attn_implementation)
    if causal.config.is_encoder_decoder:
        raise ValueError(f"check_packing: `model` must be a decoder alone, got {name}, which has an encoder")
    model.eval()
    samples = [some_ids(causal, 12, first=1), some_ids(causal, 20, first=3)]
    device = samples[0].device
    lengths = [len(ids) for ids in samples]
    batch = PackedBatch(
        input_ids=torch.cat(samples),
        position_ids=torch.cat([torch.arange(n, device=device) for n in lengths]),
        labels=torch.cat(samples),
        cu_seqlens=torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32, device=device),
        rows=torch.full((2,), -1),
        token_index=torch.arange(sum(lengths), device=device),
        max_length=max(lengths),
        num_items=sum(lengths),
    )

    def distance(hidden: Tensor, expected: Tensor) -> float:
        return float((hidden.float() - expected.float()).norm() / expected.float().norm())

    def alone(attention: str) -> Tensor:
        causal.set_attn_implementation(attention)
        return _one_by_one(causal, batch).last_hidden_state[0]

    try:
        with _short_windows(causal, model.max_length):
            packed, reason = None, "its attention is its own"
            if implementation == PACKED_ATTENTION:
                try:
                    packed, reason = model.hidden(batch), "packed, they would not be what they are alone"
                except (ValueError, TypeError, AttributeError, NotImplementedError, LookupError) as error:
                    reason = f"packed, {type(error).__name__}: {error}"  # of the model, which knows nothing of packed batches
            expected = alone("eager")
            if not torch.isfinite(expected).all():
                raise ValueError(f"check_packing: what {name} computes must be finite, got NaN or inf: look at its weights")
            tolerance = 1e-4 if _is_exact(expected) else 5e-2
            difference = math.inf if packed is None else distance(packed, expected)
            first = body_of(causal)(input_ids=samples[1][None, : lengths[0]], use_cache=False).last_hidden_state[0]
            foresight = distance(first, expected[lengths[0] : 2 * lengths[0]])
            if max(difference, foresight) >= tolerance and not _is_exact(expected) and causal._supports_sdpa:
                # Deep models with large activations: how far apart does rounding drive two that are right?
                tolerance = max(tolerance, 3.0 * distance(alone("sdpa"), expected))
            if not foresight < tolerance:
                raise ValueError(f"check_packing: `model` must be causal, got {name}, whose tokens see those after them")
            causal.set_attn_implementation(implementation)
            if not difference < tolerance:
                model.one_by_one = True
                causal.set_attn_implementation(transformers_attention(causal))
                if not distance(model.hidden(batch), expected) < tolerance:
                    raise ValueError(
                        f"check_packing: {name} gives packed samples other hidden states than it gives each alone "
                        f"(relative difference {difference:.2g}); it cannot be trained on packed batches"
                    )
                say_once(f"samples run through {name} one by one: {reason}")
    except BaseException:
        model.one_by_one = False
        causal.set_attn_implementation(implementation)
        raise
    finally:
        model.train(was_training)


@contextmanager
def _short_windows(model: PreTrainedModel, max_length: int | None) -> Iterator[None]:
    """Within, windows and chunks of attention that samples of `max_length` tokens (None: any) would exceed are shorter than
    those that a check compares: some models know them by a mask alone, which packed attention is not given."""
    owners, kept = list(model.modules()), list[tuple[Any, str, int]]()
    configs = {id(config): config for config in (model.config, model.config.get_text_config())}
    configs |= {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    try:
        for owner in (*configs.values(), *owners):
            for name in ("sliding_window", "attention_chunk_size"):
                window = getattr(owner, name, None)
                if type(window) is int and window > _SHORT_WINDOW and (max_length is None or max_length > window):
                    setattr(owner, name, _SHORT_WINDOW)
                    kept.append((owner, name, window))
        yield
    finally:
        for owner, name, window in kept:
            setattr(owner, name, window)


def _one_by_one(model: PreTrainedModel, batch: PackedBatch, **options: Any) -> Any:
    """What the body gives for each sample alone, put together as of a packed batch. Waits for the device."""
    body = body_of(model)
    outputs = [
        body(input_ids=batch.input_ids[None, start:end], use_cache=False, **options)
        for start, end in pairwise(batch.cu_seqlens.tolist())
    ]
    hidden = torch.cat([output.last_hidden_state for output in outputs], 1)
    routers = [output.router_logits for output in outputs if getattr(output, "router_logits", None) is not None]
    # Of each layer [tokens, experts].
    router_logits = tuple(torch.cat(layer) for layer in zip(*routers, strict=True)) or None
    return SimpleNamespace(last_hidden_state=hidden, router_logits=router_logits)


class PackedModel(nn.Module):
    """A causal LM behind one call: packed batch in, loss and per-sample statistics out, logits never formed.

    Args:
        model: a transformers causal LM, or a peft model around one.
        max_length: tokens of the longest sample, None for any: what its attention does beyond is not looked at.
        check: False leaves `check` to be called where the model can compute, once its weights are sharded. Those that
            DeepSpeed's ZeRO 3 has partitioned already cannot before DeepSpeed wraps the model, whatever is said here.

    Attributes:
        checked: the model computes what is computed here in its place.
        one_by_one: samples would leak into each other, so each runs through the model alone.

    Raises:
        ValueError: a model that cannot be served, see `check_head` and `check_packing`.
    """

    def __init__(self, model: nn.Module, *, max_length: int | None = None, check: bool = True) -> None:
        super().__init__()
        self.model, self.max_length, self.checked, self.one_by_one = model, max_length, False, False
        if check and not any(map(is_partitioned, model.parameters())):
            self.check()

    def check(self) -> None:
        """Compares it with the model's own forward. Of weights that FSDP has sharded it must be a call of the root module."""
        try:
            with unsaid():
                check_packing(self)
                check_head(self.causal_lm)
        except (TypeError, AttributeError, LookupError) as error:
            name = type(self.causal_lm).__name__
            raise ValueError(f"model: {name} does not run on token ids alone ({type(error).__name__}: {error})") from error
        self.checked = True

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model itself, inside an adapter's wrapper where there is one."""
        return causal_lm_of(self.model)

    @property
    def config(self) -> Any:
        """For accelerate, which sets DeepSpeed's buffers by its sizes."""
        return self.causal_lm.config

    @property
    def _no_split_modules(self) -> list[str]:
        """For accelerate: the names of the layers, which FSDP shards one by one."""
        there = {type(module).__name__ for module in self.causal_lm.modules()}
        return sorted(there.intersection(self.causal_lm._no_split_modules or ()))

    def tie_weights(self) -> None:
        """For accelerate, which moves the weights of a model that FSDP shards."""
        self.causal_lm.tie_weights()

    def hidden(self, batch: PackedBatch) -> Tensor:
        """Last hidden states of a packed batch, [T, H]."""
        return self._run(batch).last_hidden_state[0]

    def _run(self, batch: PackedBatch, **options: Any) -> Any:
        if self.one_by_one:
            if are_sharded(self.parameters()):
                raise ValueError(
                    f"PackedModel: the weights of {type(self.causal_lm).__name__} must be whole, since its samples run one by "
                    f"one and ranks with more of them would wait for the others' shards, got sharded ones; use DDP"
                )
            return _one_by_one(self.causal_lm, batch, **options)
        return body_of(self.causal_lm)(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            use_cache=False,
            cu_seq_lens_q=batch.cu_seqlens,
            cu_seq_lens_k=batch.cu_seqlens,
            max_length_q=batch.max_length,
            max_length_k=batch.max_length,
            **options,
        )

    def forward(
        self,
        batch: PackedBatch,
        *,
        reduction: Reduction = "mean",
        num_items: int | Tensor | None = None,
        stats: Stats | None = "all",
    ) -> LinearCrossEntropyOutput:
        """Loss and statistics of a packed batch; arguments as in `lead_fast.linear_cross_entropy`.

        A mixture of experts whose configuration sets `output_router_logits` has its load-balancing loss added to a "mean",
        as its own forward does; under accumulation each micro-batch's counts by its share of `num_items`.
        """
        balanced = reduction == "mean" and bool(getattr(self.causal_lm.config, "output_router_logits", False))
        if not balanced:
            return self.loss(self.hidden(batch), batch, reduction=reduction, num_items=num_items, stats=stats)
        output = self._run(batch, output_router_logits=True)
        out = self.loss(output.last_hidden_state[0], batch, reduction=reduction, num_items=num_items, stats=stats)
        share = 1.0 if num_items is None else batch.num_items / num_items
        return out._replace(loss=out.loss + share * _load_balancing_loss(self.causal_lm, output.router_logits))

    def scored(self, batch: PackedBatch) -> tuple[Tensor, SampleStats]:
        """Last hidden states [T, H], and each sample's loss."""
        hidden = self.hidden(batch)
        samples = self.loss(hidden, batch, stats="loss").samples
        assert samples is not None
        return hidden, samples

    def loss(
        self,
        hidden: Tensor,
        batch: PackedBatch,
        *,
        reduction: Reduction = "mean",
        num_items: int | Tensor | None = None,
        stats: Stats | None = "all",
    ) -> LinearCrossEntropyOutput:
        """The fused loss of hidden states [T, H] already computed, in the precision of the head where that is the wider one.

        It runs as a call of the head itself: what shards weights gathers the head's for that.

        Raises:
            ValueError: a head that cannot be served, see `lm_head`; outside autocast also one narrower than `hidden`.
        """

        def fused(hidden: Tensor) -> LinearCrossEntropyOutput:
            return self._fused(hidden, batch, reduction=reduction, num_items=num_items, stats=stats)

        head = head_of(self.causal_lm)
        with forward_replaced(head, fused):
            return head(hidden)

    def _fused(self, hidden: Tensor, batch: PackedBatch, **options: Any) -> LinearCrossEntropyOutput:
        head = lm_head(self.causal_lm)
        if hidden.dtype != head.weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
            # As models do whose head was cast to fp32; the gradient comes back in the precision of the body.
            if torch.promote_types(hidden.dtype, head.weight.dtype) != head.weight.dtype:
                raise ValueError(
                    f"PackedModel.loss: the head of {type(self.causal_lm).__name__} must hold what its hidden states do: "
                    f"{hidden.dtype}, or fp32; got {head.weight.dtype}. Cast the head, or train under autocast"
                )
            hidden = hidden.to(head.weight.dtype)
        return linear_cross_entropy(
            hidden, head.weight, batch.labels, batch.cu_seqlens, bias=head.bias, softcap=head.softcap,
            logit_scale=head.logit_scale, token_index=batch.token_index, **options,
        )  # fmt: skip


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within, a call of the module runs `forward` in its place, between the module's own hooks."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _load_balancing_loss(model: Any, router_logits: tuple[Tensor, ...]) -> Tensor:
    """The model's own auxiliary loss of its experts, from its modeling module, times its coefficient."""
    function = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    if function is None:
        raise ValueError(f"PackedModel: {type(model).__name__} outputs router logits, but has no load_balancing_loss_func")
    if missing := [n for n in ("router_aux_loss_coef", "num_experts", "num_experts_per_tok") if not hasattr(model, n)]:
        raise ValueError(
            f"PackedModel: {type(model).__name__} must have {', '.join(missing)} to balance its experts, got none; set "
            "`output_router_logits` to False in its configuration"
        )
    return model.router_aux_loss_coef * function(router_logits, model.num_experts, model.num_experts_per_tok)


def trained_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that training changes, in the model's own order."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
