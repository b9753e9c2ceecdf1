"""Packed forward passes, saving, mixtures of experts."""

import sys

import pytest
import torch
import transformers
from model_cases import KINDS, MIXING, adapted, made_samples, made_tokenizer, mixing, tiny
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lead_fast.attention import PACKED_ATTENTION, packed_attention, say_once
from lead_fast.loading import build_model, check_length, load_model, loaded_to_shard, prepare_model, save_model
from lead_fast.lora import add_lora
from lead_fast.models import PackedModel
from lead_fast.packing import pack

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return made_tokenizer()


@pytest.fixture(scope="module")
def samples(tokenizer):
    return made_samples(tokenizer)


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
