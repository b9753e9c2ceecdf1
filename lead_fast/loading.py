"""Models and tokenizers from disk or built, prepared for packed training, and back to disk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import reduce
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from lead_fast.attention import PACKED_ATTENTION
from lead_fast.models import body_of, causal_lm_of, head_of, text_decoder, transformers_attention
from lead_fast.ranks import Ranks
from lead_fast.shards import are_sharded, whole_on_first

logger = logging.getLogger(__name__)

_QUIET_BYTES = 500_000_000

# Models that need no download: a Llama with tied embeddings; (vocabulary, hidden, layers, heads, KV heads, MLP).
MODEL_SIZES = {
    "tiny": dict(vocab_size=2048, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                 intermediate_size=352),
    "small": dict(vocab_size=4096, hidden_size=256, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4,
                  intermediate_size=704),
}  # fmt: skip


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub name."""
    return AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)


def load_model(
    path: str | Path, *, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False, quantize: str | None = None,
    weights: bool = True,
) -> PreTrainedModel:  # fmt: skip
    """A causal LM from a model folder or hub name, with packed attention.

    Args:
        path: of the model.
        dtype: of its weights; of the computation, where they are quantized.
        device: where it is loaded to.
        trust_remote_code: run code that the folder brings along.
        quantize: "4bit" (nf4, double quantization) or "8bit": the linear layers but the LM head, through bitsandbytes.
        weights: False leaves what they hold open, and touches no memory for them: another process has them.

    Raises:
        ValueError: it is no causal LM whose head the fused loss can serve.
        ImportError: `quantize` without bitsandbytes.
    """
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if quantize is not None:
        options |= {"quantization_config": _quantization(quantize, dtype), "device_map": {"": device}}
    if not weights:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
        with no_init_weights():
            empty: Any = AutoModelForCausalLM.from_config(config, **options)
        empty.tie_weights()
        return prepare_model(empty.to(device))
    num_bytes = sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
    with _quiet_loading() if 0 < num_bytes < _QUIET_BYTES else nullcontext():
        model: Any = AutoModelForCausalLM.from_pretrained(str(path), **options)
    if quantize is None:
        return prepare_model(model.to(device))
    for module in model.modules() if device.type == "cpu" else ():
        # bitsandbytes repacks its weights on some CPUs at the first evaluation, for good and with rounded scales: what is
        # trained after would not be what was evaluated.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return prepare_model(model)


def embedded_tokens(path: str, *, trust_remote_code: bool = False) -> int | None:
    """How many tokens a model embeds, by its configuration, which is all that is read; None where that does not say.

    Raises:
        ValueError: it is no decoder with an LM head.
    """
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    known = type(config) in AutoModelForCausalLM._model_mapping or "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    if not known or config.is_encoder_decoder:
        raise ValueError(f"model: expected a decoder with an LM head, got a {type(config).__name__} in {path}")
    return getattr(config.get_text_config(), "vocab_size", None)


def loaded_to_shard(load: Callable[[bool], PreTrainedModel], ranks: Ranks) -> PreTrainedModel:
    """A model on the host that FSDP is to shard from the first process: no other one holds its weights.

    Args:
        load: loads it, with weights (True) or without.
        ranks: the processes, all of which must call this.
    """
    model = ranks.on_first(lambda: load(True))
    dtypes = ranks.gather(None if model is None else [(name, p.dtype) for name, p in model.named_parameters()])[0]
    if model is None:
        model = load(False)
        for (name, parameter), expected in zip(model.named_parameters(), dtypes, strict=True):
            if name != expected[0]:
                raise RuntimeError(f"load_model: {name} stands where the first process has {expected[0]}")
            parameter.data = parameter.data.to(expected[1])  # some models keep a part in fp32
    return model


def _quantization(bits: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise ImportError("quantize: bitsandbytes is not installed; pip install bitsandbytes, or leave --quantize out")
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def build_model(size: str, tokenizer: PreTrainedTokenizerBase, *, seed: int, device: torch.device) -> PreTrainedModel:
    """A Llama of `MODEL_SIZES` with random weights from `seed`, for the tokenizer's vocabulary, fp32."""
    shape = MODEL_SIZES[size] | {"vocab_size": len(tokenizer)}
    config = AutoConfig.for_model(
        "llama", **shape, max_position_embeddings=2048, tie_word_embeddings=True, rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return prepare_model(model.to(device))


def prepare_model(model: PreTrainedModel) -> PreTrainedModel:
    """Sets packed attention, and freezes what text does not reach (the vision tower of a model of images and text)."""
    model.set_attn_implementation(PACKED_ATTENTION)
    if (decoder := text_decoder(model)) is not body_of(model):
        reached = {id(p) for part in (decoder, head_of(model)) for p in part.parameters()}
        frozen = [p.requires_grad_(False) for p in model.parameters() if id(p) not in reached]
        logger.info("%s: %d of its weights are not for text, and stay as they are", type(model).__name__, len(frozen))
    return model


def load_converted(model: PreTrainedModel, folder: str) -> None:
    """Loads the weights that `save_pretrained` wrote of this very model, under whatever names.

    Raises:
        RuntimeError: the folder does not have all of them.
    """
    widest = reduce(torch.promote_types, {p.dtype for p in model.parameters()})  # some models keep a part in fp32
    saved, found = type(model).from_pretrained(folder, dtype=widest, output_loading_info=True)  # pyright: ignore
    if found["missing_keys"]:
        raise RuntimeError(
            f"{folder}: expected all weights of {type(model).__name__}, got none for {sorted(found['missing_keys'])}"
        )
    model.load_state_dict(saved.state_dict())


def _rope(config: Any) -> dict[str, Any]:
    return getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}


def rotary_limit(model: PreTrainedModel) -> int | None:
    """Tokens of a sample up to which rotary embeddings do not depend on what is packed beside it; None for any length."""
    config: Any = model.config.get_text_config()
    limit, limits, rope = getattr(config, "max_position_embeddings", None), list[int](), _rope(config)
    # Of a model whose layers differ, one of each kind of layer.
    for kind in rope.values() if rope and all(isinstance(value, dict) for value in rope.values()) else [rope]:
        form, original = kind.get("rope_type", kind.get("type")), limit
        if form == "longrope":
            trained = kind.get("original_max_position_embeddings")
            original = trained or getattr(config, "original_max_position_embeddings", None) or limit
        if form in ("longrope", "dynamic") and original:
            limits.append(int(original))
    return min(limits, default=None)


def length_limit(model: PreTrainedModel) -> tuple[int, str] | None:
    """Tokens that a sample may have at most, and why; None for any number.

    There are learned positions for no more; or rotary embeddings change with the longest sequence, and with them the results
    of shorter samples packed beside it.
    """
    config, name = model.config.get_text_config(), type(model).__name__
    if (original := rotary_limit(model)) is not None:
        return original, f"the rotary embeddings of {name} change for all samples of a batch where one is longer"
    tokens, limit = model.get_input_embeddings(), getattr(config, "max_position_embeddings", None)
    learned = not _rope(config) and any(isinstance(m, nn.Embedding) and m is not tokens for m in body_of(model).modules())
    return (limit, f"{name} has no more positions") if learned and limit is not None else None


def check_length(model: PreTrainedModel, max_length: int) -> None:
    """Compares the longest sample with what the positions of a model are made for.

    Raises:
        ValueError: it is longer than `length_limit`.
    """
    if (limit := length_limit(model)) is not None and max_length > limit[0]:
        raise ValueError(f"max_length: expected at most {limit[0]}: {limit[1]}, got {max_length}")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        logger.warning("max_length %d is beyond the %d positions that the model is made for", max_length, positions)


def save_model(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path | None) -> None:
    """Writes weights (or adapters) and tokenizer as transformers and peft load them, safetensors only.

    Args:
        model: all processes must call this where its weights are sharded: they are put together on the host.
        tokenizer: written beside it.
        folder: None in the processes that do not write.
    """
    adapter, whole = hasattr(model, "get_base_model"), dict[str, Any]()
    if are_sharded(model.parameters()):
        tied = set[int]()
        for name, tensor in model.state_dict(keep_vars=True).items():
            if id(tensor) not in tied and (tensor.requires_grad or not adapter):
                tied.add(id(tensor))
                whole[name] = whole_on_first(tensor, folder is not None)
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    causal = causal_lm_of(model)
    implementation = causal.config._attn_implementation
    causal.set_attn_implementation(
        transformers_attention(causal)
    )  # what is loaded elsewhere must not name this package's attention
    try:
        model.save_pretrained(str(folder), **({"state_dict": whole} if whole else {}))
        tokenizer.save_pretrained(str(folder))
    finally:
        causal.set_attn_implementation(implementation)


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Hides transformers' bar over the weights of models that load at once."""
    enabled = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers.utils.logging.enable_progress_bar()
