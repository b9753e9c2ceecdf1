"""Tiny models of many families, and a tokenizer and samples for them."""

import torch
import transformers
from transformers import AutoModelForCausalLM

from lead_fast.demo_pool import demo_rows
from lead_fast.loading import prepare_model
from lead_fast.offline.pretrain import train_tokenizer
from lead_fast.packing import ChatEncoder


def made_tokenizer():
    return train_tokenizer(["some words to learn from, 1 2 3. " * 3], 300)


def made_samples(tokenizer):
    texts = [("one two", "three"), ("a much longer question " * 6, "and a longer answer"), ("x", "y z")]
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in texts]
    return list(ChatEncoder(tokenizer, 256).encode(chats))


def tiny(kind, vocab, **options):
    shape = dict(
        vocab_size=vocab, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, head_dim=8, **options,
    )  # fmt: skip
    if kind == "gpt2":
        shape = dict(vocab_size=vocab, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **shape)
    return prepare_model(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


KINDS = [
    ("llama", {}),
    ("qwen2", {}),
    ("qwen3", {}),
    (
        "gemma3_text",
        {"final_logit_softcapping": 5.0, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    ("phi3", {"pad_token_id": 0}),
    ("gemma2", {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 20.0, "sliding_window": 8}),
    ("mistral", {"sliding_window": 8}),
    ("cohere", {"logit_scale": 0.25}),
    ("granite", {"logits_scaling": 4.0}),
    ("gpt2", {}),
]


# Models that mix tokens by more than attention, or by attention of their own: no packed sample may reach another.
MIXING = {
    "bloom": dict(n_head=4, n_layer=2),
    "falcon": dict(alibi=True, num_attention_heads=4, num_hidden_layers=2, new_decoder_architecture=False),
    "mpt": dict(d_model=32, n_heads=4, n_layers=2, max_seq_len=512),
    "mamba": dict(num_hidden_layers=2, state_size=8),
    "gpt_oss": dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=48,
                    num_local_experts=4, num_experts_per_tok=2, layer_types=["sliding_attention", "full_attention"],
                    sliding_window=8, output_router_logits=True, router_aux_loss_coef=0.5),
    "qwen3_next": dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=48,
                       layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2, linear_num_value_heads=4,
                       linear_key_head_dim=8, linear_value_head_dim=8, num_experts=4, num_experts_per_tok=2,
                       moe_intermediate_size=16, shared_expert_intermediate_size=16, output_router_logits=True,
                       router_aux_loss_coef=0.5),
}  # fmt: skip


def mixing(kind, vocab):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{"vocab_size": vocab, "hidden_size": 32, **MIXING[kind]})
    return prepare_model(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def adapted(model):
    return {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}


def demo_tokenizer():
    """Of the words of the demo's pool."""
    return train_tokenizer([message["content"] for row in demo_rows(50, seed=1) for message in row["messages"]], 400)


def demo_samples(tokenizer, count):
    return list(ChatEncoder(tokenizer, 128).encode([row["messages"] for row in demo_rows(count, seed=3)]))
