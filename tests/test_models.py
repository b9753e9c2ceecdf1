"""Packed forward passes, LM heads, LoRA, saving."""

import sys

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lead_fast.attention import PACKED_ATTENTION, packed_attention, say_once
from lead_fast.loading import build_model, check_length, load_model, loaded_to_shard, prepare_model, save_model
from lead_fast.lora import add_lora
from lead_fast.models import PackedModel, check_head, lm_head
from lead_fast.offline.pretrain import train_tokenizer
from lead_fast.packing import ChatEncoder, pack

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["some words to learn from, 1 2 3. " * 3], 300)


@pytest.fixture(scope="module")
def samples(tokenizer):
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


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=[k for k, _ in KINDS])
def test_a_packed_sample_has_the_loss_and_gradient_it_has_alone(kind, options, tokenizer, samples):
    model = tiny(kind, len(tokenizer), **options)
    packed = PackedModel(model)
    batch = pack(samples)
    out = packed(batch, reduction="sum")
    out.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for s, sample in enumerate(samples):
        # The reference: transformers' own eager attention, logits and all, one sample at a time.
        model.set_attn_implementation("eager")
        ids = torch.from_numpy(sample.input_ids)[None]
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        nll = nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        mask = torch.from_numpy(sample.supervised[1:])
        nll[mask].sum().backward()
        torch.testing.assert_close(out.samples.loss[s], nll[mask].mean().detach(), rtol=2e-5, atol=2e-5)
        assert float(out.samples.num_tokens[s]) == mask.sum()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            scale = float(parameter.grad.abs().max())
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5 * max(scale, 1.0))


def test_a_head_with_an_adapter_is_refused(tokenizer):
    from peft import LoraConfig, get_peft_model

    model = tiny("llama", len(tokenizer))
    adapted = get_peft_model(model, LoraConfig(target_modules=["lm_head", "q_proj"]))
    with pytest.raises(ValueError, match=r"plain nn\.Linear without adapter"):
        PackedModel(adapted)


def test_a_head_that_does_more_than_the_fused_loss_knows_is_refused(tokenizer):
    model = tiny("llama", len(tokenizer))
    check_head(model)

    def forward(*args, **kwargs):
        out = type(model).forward(model, *args, **kwargs)
        out.logits = out.logits * 1.5
        return out

    model.forward = forward
    with pytest.raises(ValueError, match="does not know"):
        check_head(model)


def capped(logits):
    return 30.0 * torch.tanh(logits / 30.0)


def scaled(logits):
    return 0.97 * logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("change", "place"), [(capped, "after"), (scaled, "after"), (scaled, "before")])
def test_what_half_precision_would_hide_is_found(change, place, dtype, tokenizer):
    """Logits of an untrained model are small: a cap of 30 moves them by less than bf16 rounds."""
    model = tiny("llama", len(tokenizer)).to(dtype)
    forward = type(model).forward

    def changed(*args, **kwargs):
        out = forward(model, *args, **kwargs)
        out.logits = change(out.logits)
        return out

    if place == "after":
        model.forward = changed
    else:
        model.lm_head.register_forward_pre_hook(lambda _, args: (change(args[0]),))
    with pytest.raises(ValueError, match="does not know"):
        check_head(model)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("recurrent_gemma", {"logits_soft_cap": 2.0, "lru_width": 32, "block_types": ["attention"], "attention_window_size": 64}),
     ("falcon_h1", {"lm_head_multiplier": 0.04, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_state": 8})],
)  # fmt: skip
def test_caps_and_scales_by_other_names_are_served(kind, options, tokenizer, samples):
    model = tiny(kind, len(tokenizer), **options)
    loss = PackedModel(model)(pack(samples[:1])).loss
    ids = torch.from_numpy(samples[0].input_ids)[None]
    labels = torch.where(torch.from_numpy(samples[0].supervised), ids, -100)
    own = nn.functional.cross_entropy(model(input_ids=ids, use_cache=False).logits[0, :-1], labels[0, 1:])
    torch.testing.assert_close(loss, own, rtol=1e-4, atol=1e-5)


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


def adapted(model):
    return {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}


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


def images_and_text(vocab):
    text = dict(vocab_size=vocab + 8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                intermediate_size=48, head_dim=8, sliding_window=16, query_pre_attn_scalar=8)  # fmt: skip
    vision = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=28,
                  patch_size=14, vision_use_head=False)  # fmt: skip
    config = transformers.AutoConfig.for_model(
        "gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=vocab + 1,
        boi_token_index=vocab + 2, eoi_token_index=vocab + 3,
    )  # fmt: skip
    torch.manual_seed(0)
    return prepare_model(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_of_a_model_of_images_and_text_the_text_is_trained(tuning, tokenizer, samples):
    model = images_and_text(len(tokenizer))
    assert any("vision" in name for name, _ in model.named_parameters())
    if tuning == "lora":
        model = add_lora(model, rank=2, alpha=4.0, seed=0)
        assert len(adapted(model)) == 14 and not any("vision" in name for name in adapted(model))
    PackedModel(model)(pack(samples)).loss.backward()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for _, p in trained)  # DDP waits for every gradient
    assert not any("vision" in name or "projector" in name for name, _ in trained)


def test_a_class_whose_prefix_names_nothing_has_a_body(tokenizer, samples):
    model = tiny("llama", len(tokenizer))
    expected = PackedModel(model)(pack(samples)).loss
    type(model).base_model_prefix, kept = "language_model", type(model).base_model_prefix  # as Llama 4's text model
    try:
        torch.testing.assert_close(PackedModel(model)(pack(samples)).loss, expected)
    finally:
        type(model).base_model_prefix = kept


def test_longer_samples_than_positions_are_refused(tokenizer, caplog):
    check_length(tiny("gpt2", len(tokenizer)), 1024)
    with pytest.raises(ValueError, match="max_length: expected at most 1024: GPT2LMHeadModel has no more positions, got 1025"):
        check_length(tiny("gpt2", len(tokenizer)), 1025)
    assert not caplog.text
    check_length(tiny("llama", len(tokenizer), max_position_embeddings=64), 65)
    assert "max_length 65 is beyond the 64 positions" in caplog.text
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    dynamic = tiny("llama", len(tokenizer), max_position_embeddings=64, rope_parameters=rope)
    check_length(dynamic, 64)
    with pytest.raises(ValueError, match=r"max_length: expected at most 64: the rotary embeddings .* change"):
        check_length(dynamic, 100)
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 64}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    longrope = tiny("llama", len(tokenizer), max_position_embeddings=128, rope_parameters=rope)
    check_length(longrope, 64)
    with pytest.raises(ValueError, match=r"max_length: expected at most 64: the rotary embeddings .* change"):
        check_length(longrope, 65)


def test_a_model_is_looked_at_under_autocast_as_it_will_run(tokenizer, samples):
    """Its packed samples round differently there, and are what they are alone."""
    model = tiny("llama", len(tokenizer))
    with torch.autocast("cpu", torch.bfloat16):
        packed = PackedModel(model)
        packed(pack(samples)).loss.backward()
    assert packed.checked and not packed.one_by_one
    bloom = mixing("bloom", len(tokenizer))
    for block in bloom.transformer.h:
        block.self_attention.query_key_value.weight.data *= 30.0  # whose position biases then say much
    with torch.autocast("cpu", torch.bfloat16):
        assert PackedModel(bloom).one_by_one


def test_equal_seeds_build_equal_models(tokenizer):
    one, two, other = (build_model("tiny", tokenizer, seed=s, device=CPU) for s in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])  # Gemma 2 is not made for torch's fused attention
def test_saved_models_load_with_transformers_alone(kind, tokenizer, samples, tmp_path):
    model = tiny(kind, len(tokenizer)).eval()
    save_model(model, tokenizer, tmp_path / "m")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert loaded.config._attn_implementation != model.config._attn_implementation
    ids = torch.from_numpy(samples[0].input_ids)[None]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "m").chat_template == tokenizer.chat_template
    assert not list((tmp_path / "m").glob("*.bin"))


def test_a_sharded_head_is_refused(tokenizer):
    model = tiny("llama", len(tokenizer))
    # What ZeRO-3 leaves of a weight outside a forward pass.
    model.get_output_embeddings().weight = nn.Parameter(torch.empty(0))
    with pytest.raises(ValueError, match="one whole floating point"):
        lm_head(model)


def test_a_head_that_is_a_dtensor_is_refused(tokenizer):
    """FSDP2's sharded heads, and transformers' tensor-parallel ones."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = tiny("llama", len(tokenizer))
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(distribute_tensor(head.weight.detach(), init_device_mesh("cpu", (1,)), [Shard(0)]))
        with pytest.raises(ValueError, match=r"one whole floating point .* got DTensor"):
            lm_head(model)
    finally:
        torch.distributed.destroy_process_group()


def test_a_head_of_which_a_rank_holds_some_rows_is_refused(tokenizer):
    """Tensor parallelism on plain tensors: a smaller nn.Linear, whose hook gathers the logits of all ranks."""
    model = tiny("llama", len(tokenizer))
    whole = model.get_output_embeddings()
    part = nn.Linear(32, len(tokenizer) // 2, bias=False)
    part.weight = nn.Parameter(whole.weight.detach()[: len(tokenizer) // 2].clone())
    part.register_forward_hook(lambda module, args, output: nn.functional.linear(args[0], whole.weight))
    model.set_output_embeddings(part)
    with pytest.raises(ValueError, match="must give all logits"):
        PackedModel(model)


def test_a_quantized_head_is_refused(tokenizer):
    model = tiny("llama", len(tokenizer))
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="one whole floating point"):
        lm_head(model)


@pytest.mark.parametrize("casts_itself", [True, False], ids=["head-casts-its-input", "plain-head"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_head_in_fp32_over_a_body_in_16_bits(dtype, casts_itself, tokenizer, samples):
    """As TRL's cast_lm_head_to_fp32 leaves a model: logits of the head's precision, the body's gradient in its own."""
    model = tiny("llama", len(tokenizer)).to(dtype)
    head = model.get_output_embeddings().float()
    if casts_itself:
        head.forward = lambda hidden: nn.functional.linear(hidden.float(), head.weight, head.bias)
    packed, batch = PackedModel(model), pack(samples)
    hidden = packed.hidden(batch).detach().requires_grad_()
    out = packed.loss(hidden, batch)
    assert hidden.dtype == dtype and out.loss.dtype == torch.float32
    found = torch.autograd.grad(out.loss, (hidden, head.weight))

    plain = hidden.detach().clone().requires_grad_()
    loss = nn.functional.cross_entropy(nn.functional.linear(plain.float(), head.weight), batch.labels)
    torch.testing.assert_close(out.loss, loss, rtol=1e-6, atol=0)
    for gradient, expected in zip(found, torch.autograd.grad(loss, (plain, head.weight)), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=2 * torch.finfo(gradient.dtype).eps, atol=1e-7)

    packed(batch).loss.backward()
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("body", "head"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)], ids=["narrower", "other-16-bits"]
)
def test_a_head_that_cannot_hold_its_hidden_states_is_refused_outside_autocast(body, head, tokenizer, samples):
    model = tiny("llama", len(tokenizer)).to(body)
    model.get_output_embeddings().to(head)
    packed, batch = PackedModel(model), pack(samples)
    with pytest.raises(ValueError, match="the head of LlamaForCausalLM must hold what its hidden states do"):
        packed(batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert packed(batch).loss.isfinite()


def test_a_deep_model_whose_rounding_drives_kernels_apart_is_served(tokenizer):
    """In bf16, with large activations: eager and sdpa differ by 18% here, and neither is wrong."""
    config = transformers.AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=32, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=128, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = prepare_model(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))
    assert PackedModel(model).checked and model.config._attn_implementation == PACKED_ATTENTION

    def leaks(self, batch):  # also where samples run one by one
        hidden = self._run(batch).last_hidden_state[0]
        return hidden.roll(batch.cu_seqlens[1].item(), 0)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="gives packed samples other hidden states"):
        patch.setattr(PackedModel, "hidden", leaks)
        PackedModel(model)


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


@pytest.mark.parametrize("kind", MIXING)
def test_samples_that_would_leak_into_each_other_run_one_by_one(kind, tokenizer, samples, caplog, monkeypatch):
    monkeypatch.setattr("lead_fast.models.say_once", say_once.__wrapped__)  # another test may have had it said
    model = mixing(kind, len(tokenizer))
    packed, batch = PackedModel(model), pack(samples)
    assert packed.one_by_one and "one by one: " in caplog.text
    assert model.config._attn_implementation != PACKED_ATTENTION
    out = packed(batch, reduction="sum")
    out.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for s, sample in enumerate(samples):
        ids = torch.from_numpy(sample.input_ids)[None]
        nll = nn.functional.cross_entropy(model(input_ids=ids, use_cache=False).logits[0, :-1], ids[0, 1:], reduction="none")
        mask = torch.from_numpy(sample.supervised[1:])
        nll[mask].sum().backward()
        torch.testing.assert_close(out.samples.loss[s], nll[mask].mean().detach(), rtol=2e-5, atol=2e-5)
    assert gradients
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            scale = float(parameter.grad.abs().max())
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5 * max(scale, 1.0))


@pytest.mark.parametrize("kind", ["llama4_text", "phimoe"])
def test_windows_that_a_mask_alone_knows_are_found(kind, tokenizer, samples):
    window = {"attention_chunk_size": 24} if kind == "llama4_text" else {"sliding_window": 24}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0}
    model = tiny(kind, len(tokenizer), intermediate_size_mlp=48, **window, **experts)
    assert not PackedModel(model, max_length=24).one_by_one  # no sample exceeds it
    packed = PackedModel(model)
    assert packed.one_by_one and max(map(len, samples)) > 24
    out = packed(pack(samples))
    for s, sample in enumerate(samples):
        ids = torch.from_numpy(sample.input_ids)[None]
        nll = nn.functional.cross_entropy(model(input_ids=ids, use_cache=False).logits[0, :-1], ids[0, 1:], reduction="none")
        expected = nll[torch.from_numpy(sample.supervised[1:])].mean()
        torch.testing.assert_close(out.samples.loss[s], expected.detach(), rtol=1e-4, atol=1e-4)


def test_windows_stay_what_they_are(tokenizer, monkeypatch):
    """Those of the configuration and of each layer, also where the check raises; nor is the model left in another mode."""
    model = tiny("gemma3_text", len(tokenizer), sliding_window=16, layer_types=["sliding_attention", "sliding_attention"])

    def windows():
        return [model.config.sliding_window, *(layer.self_attn.sliding_window for layer in model.model.layers)]

    assert windows() == [16, 16, 16] and model.training and not PackedModel(model).one_by_one
    assert windows() == [16, 16, 16] and model.training
    monkeypatch.setattr(PackedModel, "hidden", lambda self, batch: self._run(batch).last_hidden_state[0].roll(1, 0))
    with pytest.raises(ValueError, match="other hidden states"):
        PackedModel(model)
    assert windows() == [16, 16, 16] and model.training and model.config._attn_implementation == PACKED_ATTENTION


def test_attention_to_chosen_blocks_is_not_taken_for_all(tokenizer):
    query = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match="block_indices"):
        packed_attention(nn.Module(), query, query, query, None, block_indices=torch.zeros(1))


def test_a_model_that_sees_what_comes_is_refused(tokenizer):
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    model = prepare_model(AutoModelForCausalLM.from_config(config))
    with pytest.raises(ValueError, match="`model` must be causal, got BertLMHeadModel"):
        PackedModel(model)


def test_adapters_leave_out_what_peft_refuses_in_a_mamba(tokenizer):
    adapted = add_lora(mixing("mamba", len(tokenizer)), rank=4, alpha=8.0, seed=0)
    names = {name.split(".")[-4] for name, p in adapted.named_parameters() if p.requires_grad}
    assert names == {"in_proj", "x_proj", "dt_proj"}


def test_experts_of_samples_that_run_one_by_one_are_balanced_over_all_of_them(tokenizer, samples):
    model = mixing("qwen3_next", len(tokenizer))
    packed, batch = PackedModel(model), pack(samples)
    routers = [
        model.model(input_ids=torch.from_numpy(s.input_ids)[None], output_router_logits=True).router_logits for s in samples
    ]
    function = sys.modules[type(model).__module__].load_balancing_loss_func
    expected = 0.5 * function(tuple(torch.cat(layer) for layer in zip(*routers, strict=True)), 4, 2)
    plain = packed(batch, reduction="sum").loss / batch.num_items
    torch.testing.assert_close(packed(batch).loss - plain, expected, rtol=1e-4, atol=1e-6)


def test_samples_that_run_one_by_one_need_whole_weights(tokenizer, samples):
    packed = PackedModel(mixing("mamba", len(tokenizer)))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match=r"must be whole, .* use DDP"):
        patch.setattr("lead_fast.models.are_sharded", lambda _: True)
        packed(pack(samples))


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "olmoe"])
def test_experts_are_balanced_as_the_model_s_own_forward_does(kind, tokenizer, samples):
    experts = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    model = tiny(kind, len(tokenizer), output_router_logits=True, router_aux_loss_coef=0.5, **experts)
    packed, batch = PackedModel(model), pack(samples[:1])
    labels = torch.from_numpy(samples[0].input_ids).masked_fill(~torch.from_numpy(samples[0].supervised), -100)
    theirs = model(input_ids=batch.input_ids[None], labels=labels[None])
    assert float(theirs.aux_loss.detach()) > 0
    ours = packed(batch)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-6)
    names = [name for name, p in model.named_parameters() if "gate.weight" in name or "router" in name]
    routers = [dict(model.named_parameters())[name] for name in names]
    for a, b in zip(torch.autograd.grad(ours.loss, routers), torch.autograd.grad(theirs.loss, routers), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    # Two micro-batches: each sample's share of the step's supervised tokens.
    whole = sum(pack([s]).num_items for s in samples[:2])
    parts = [packed(pack([s]), num_items=whole).loss for s in samples[:2]]
    plain = [packed(pack([s]), reduction="sum").loss / whole for s in samples[:2]]
    aux = [model(input_ids=pack([s]).input_ids[None]).aux_loss * 0.5 * pack([s]).num_items / whole for s in samples[:2]]
    torch.testing.assert_close(sum(parts), sum(plain) + sum(aux), rtol=1e-5, atol=1e-6)


class Second:
    """The second of two processes, as the first has `model`."""

    def __init__(self, model):
        self.model = model

    def on_first(self, call):
        return None

    def gather(self, value):
        return [[(name, p.dtype) for name, p in self.model.named_parameters()], value]


def test_a_process_without_weights_takes_the_first_one_s_precisions(tokenizer, tmp_path):
    save_model(tiny("llama", len(tokenizer)), tokenizer, tmp_path)
    first = load_model(tmp_path, dtype=torch.bfloat16, device=CPU)
    first.model.norm.float()  # as models do that keep a part in fp32

    def load(weights):
        assert not weights
        return load_model(tmp_path, dtype=torch.bfloat16, device=CPU, weights=False)

    second = loaded_to_shard(load, Second(first))
    assert [(n, p.dtype, p.shape) for n, p in second.named_parameters()] == [
        (n, p.dtype, p.shape) for n, p in first.named_parameters()
    ]
    assert second.model.norm.weight.dtype == torch.float32
    for (name, ours), (_, theirs) in zip(second.named_buffers(), first.named_buffers(), strict=True):
        assert torch.equal(ours, theirs), name  # no one sends these
    others = nn.ParameterDict({f"p{i}": p for i, (_, p) in enumerate(first.named_parameters())})
    with pytest.raises(RuntimeError, match="stands where the first process has p0"):
        loaded_to_shard(load, Second(others))
