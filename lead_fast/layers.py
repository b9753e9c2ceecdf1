"""What training asks of a model's layers: recomputed activations, torch.compile, Liger's kernels."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lead_fast.attention import COMPILED_LAYER, unsaid
from lead_fast.models import body_of, causal_lm_of, some_ids


def checkpoint_activations(model: nn.Module) -> None:
    """Keeps the inputs of the model's layers alone, and recomputes the rest in backward; only in training mode."""
    causal = causal_lm_of(model)
    # transformers 5.24 renames it.
    enable = getattr(causal, "activation_checkpointing_enable", None) or causal.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def compile_layers(model: nn.Module, **options: Any) -> None:
    """Compiles each layer by torch.compile, for packed batches of any length.

    Numbers that are no sizes (an epsilon, the scale of attention) become constants, in all that this process compiles: by
    default a graph of any length takes each as a tensor on the host, and on a GPU compiles C++ beside its kernels.

    Args:
        model: a causal LM or a peft model.
        **options: of torch.compile, such as `backend` and `mode`.

    Raises:
        ValueError: the model has no list of layers.
    """
    causal = causal_lm_of(model)
    lists = [module for module in body_of(causal).modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ValueError(f"compile: expected a model with a list of layers, got {type(causal).__name__}")
    torch._dynamo.config.specialize_float = True
    for layer in max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters())):
        for module in layer.modules():
            setattr(module, COMPILED_LAYER, (layer,))
        layer.compile(dynamic=True, **options)


def liger_layers(model: nn.Module) -> None:
    """Has liger-kernel compute what it knows of a model's layers; the LM head and the loss stay as they are.

    Its rotary embeddings take the place of those of all models of this architecture in the process. A model on a GPU is
    compared with what it was.

    Raises:
        ImportError: it is not installed.
        ValueError: it does not know the architecture, or computes something else in it (another activation, say).
    """
    if find_spec("liger_kernel") is None:
        raise ImportError("liger: liger-kernel is not installed; pip install liger-kernel, or leave --liger out")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as known
    from transformers.integrations.liger import apply_liger_kernel

    causal = causal_lm_of(model)
    if (kind := causal.config.model_type) not in known:
        raise ValueError(f"liger: expected a model that liger-kernel knows ({', '.join(sorted(known))}), got {kind}")
    module = sys.modules[type(causal).__module__]
    own = {name: value for name, value in vars(module).items() if isinstance(value, type)}
    before = _some_hidden(causal)
    apply_liger_kernel(causal, {"cross_entropy": False, "fused_linear_cross_entropy": False})
    vars(module).update(own)  # it has patched this model's own layers; models built later are to be what they were
    if before is not None and (after := _some_hidden(causal)) is not None:
        difference = float((after - before).norm() / before.norm())
        if not difference < 5e-2:
            raise ValueError(
                f"liger: the layers of {type(causal).__name__} must compute what liger-kernel's do, got a relative difference "
                f"of {difference:.2g}; leave --liger out"
            )


@torch.no_grad()
def _some_hidden(model: PreTrainedModel) -> Tensor | None:
    """Last hidden states of a few tokens in fp32, where the model is on a GPU."""
    ids = some_ids(model, 16)
    if ids.device.type != "cuda":
        return None
    was_training = model.training
    model.eval()
    with unsaid():
        hidden = body_of(model)(input_ids=ids[None], use_cache=False).last_hidden_state.float()
    model.train(was_training)
    return hidden
