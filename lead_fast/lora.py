"""LoRA adapters, through peft."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lead_fast.models import body_of, text_decoder

logger = logging.getLogger(__name__)

# Which expert gets a token is not adapted, and the LM head must stay as it is.
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate", "modality_router"})
_MAMBAS = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})


def linear_names(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers of a model's text decoder, routers apart: what the default adapts.

    Experts that are kept as one parameter are no layers; and what a Mamba's kernel takes for itself, peft adapts not.
    """
    apart = _ROUTERS | {"out_proj"} if getattr(model.config, "model_type", None) in _MAMBAS else _ROUTERS
    return sorted({_short_name(path) for path in _linear_paths(model) if not apart.intersection(path)})


def _short_name(path: list[str]) -> str:
    """What adapters know a layer by: the last part of its name, of a layer in a list the list's too."""
    return ".".join(path[-2:]) if path[-1].isdigit() else path[-1]


def _linear_paths(model: PreTrainedModel) -> list[list[str]]:
    modules = text_decoder(model).named_modules()
    return [name.split(".") for name, module in modules if isinstance(module, nn.Linear | Conv1D)]


def add_lora(model: PreTrainedModel, *, rank: int, alpha: float, seed: int, targets: Sequence[str] | None = None) -> nn.Module:
    """Puts adapters on linear layers of the text decoder.

    Args:
        model: a causal LM.
        rank, alpha: the adapters add (alpha / rank) B A.
        seed: of their initial weights.
        targets: last parts of the names of the layers; None adapts all but routers and the LM head.

    Raises:
        ValueError: the decoder has no layer of such a name.
    """
    from peft import LoraConfig, get_peft_model

    there = linear_names(model)
    names = there if targets is None else list(targets)
    if unknown := sorted(set(names) - set(there)):
        raise ValueError(f"lora_targets: expected some of {', '.join(there)}, got {', '.join(unknown)}")
    has_routers = any(_ROUTERS.intersection(path) for path in _linear_paths(model))
    logger.info("LoRA of rank %d on %s", rank, ", ".join(names))
    chosen: list[str] | str = names
    if (decoder := text_decoder(model)) is not body_of(model):  # other parts have layers of the same names
        prefix = next(name for name, module in model.named_modules() if module is decoder)
        chosen = rf"{re.escape(prefix)}\..*\b({'|'.join(map(re.escape, names))})"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # peft scales by alpha / r; its annotation asks for an int, its code does not.
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,  # pyright: ignore[reportArgumentType]
            target_modules=chosen,
            exclude_modules=rf"(.*\.)?({'|'.join(sorted(_ROUTERS))})(\..*)?" if has_routers else None,
            task_type="CAUSAL_LM",
        )
        return get_peft_model(model, config)


def load_lora(model: PreTrainedModel, path: str | Path) -> nn.Module:
    """A model with the adapters of `path`, to be trained further."""
    from peft import PeftConfig, PeftModel

    # Where the base was when they were saved is of no interest: what is saved next names where it is.
    config = PeftConfig.from_pretrained(str(path))
    config.base_model_name_or_path = model.name_or_path
    return PeftModel.from_pretrained(model, str(path), config=config, is_trainable=True)
