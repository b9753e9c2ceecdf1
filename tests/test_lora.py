"""LoRA adapters: which layers get one."""

import pytest
import torch
from model_cases import adapted, made_samples, made_tokenizer, mixing, tiny
from torch import nn

from lead_fast.loading import build_model
from lead_fast.lora import add_lora
from lead_fast.models import PackedModel, lm_head
from lead_fast.packing import pack

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return made_tokenizer()


@pytest.fixture(scope="module")
def samples(tokenizer):
    return made_samples(tokenizer)


def test_lora_names_a_layer_in_a_list_by_its_list(tokenizer):
    model = tiny("llama", len(tokenizer))
    for layer in model.model.layers:
        layer.mlp.extra = nn.ModuleList([nn.Linear(32, 4)])
        layer.mlp.modality_router = nn.Linear(32, 4)
    paths = adapted(add_lora(model, rank=2, alpha=4.0, seed=0))
    assert sum(path.endswith("mlp.extra.0") for path in paths) == 2 and len(paths) == 16


def test_lora_trains_adapters_only_and_starts_at_the_base_model(tokenizer, samples):
    model = build_model("tiny", tokenizer, seed=1, device=CPU)
    before = PackedModel(model)(pack(samples)).loss
    adapted = add_lora(model, rank=4, alpha=8.0, seed=0)
    trained = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in n for n in trained)
    out = PackedModel(adapted)(pack(samples))
    torch.testing.assert_close(out.loss, before)
    out.loss.backward()
    assert lm_head(PackedModel(adapted).causal_lm).weight.grad is None


LORA_NAMES = {
    "llama": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj", "phi3": "qkv_proj o_proj gate_up_proj down_proj",
    "gpt2": "c_attn c_fc c_proj", "starcoder2": "q_proj k_proj v_proj o_proj c_fc c_proj",
    "qwen3_moe": "q_proj k_proj v_proj o_proj",
}  # fmt: skip


@pytest.mark.parametrize("kind", LORA_NAMES)
def test_lora_adapts_every_linear_layer_of_a_family_but_routers(kind, tokenizer):
    options = {"pad_token_id": 0} if kind == "phi3" else {"num_experts": 4} if kind == "qwen3_moe" else {}
    model = add_lora(tiny(kind, len(tokenizer), **options), rank=2, alpha=4.0, seed=0)
    assert {name.rsplit(".", 1)[-1] for name in adapted(model)} == set(LORA_NAMES[kind].split())


def test_a_router_of_linear_layers_is_not_adapted(tokenizer):
    model = tiny("llama", len(tokenizer))
    for layer in model.model.layers:
        layer.mlp.router = nn.Sequential(nn.Linear(32, 4))
        layer.mlp.router.q_proj = nn.Linear(4, 4)  # by a name that others have, too
    paths = adapted(add_lora(model, rank=2, alpha=4.0, seed=0))
    assert len(paths) == 14 and not any("router" in path for path in paths)


def test_lora_on_chosen_layers(tokenizer):
    model = add_lora(tiny("llama", len(tokenizer)), rank=2, alpha=4.0, seed=0, targets=["q_proj", "v_proj"])
    assert {name.rsplit(".", 1)[-1] for name in adapted(model)} == {"q_proj", "v_proj"}
    with pytest.raises(ValueError, match=r"lora_targets: expected some of down_proj, .*, got qkv_proj"):
        add_lora(tiny("llama", len(tokenizer)), rank=2, alpha=4.0, seed=0, targets=["q_proj", "qkv_proj"])


def test_adapters_leave_out_what_peft_refuses_in_a_mamba(tokenizer):
    adapted = add_lora(mixing("mamba", len(tokenizer)), rank=4, alpha=8.0, seed=0)
    names = {name.split(".")[-4] for name, p in adapted.named_parameters() if p.requires_grad}
    assert names == {"in_proj", "x_proj", "dt_proj"}
