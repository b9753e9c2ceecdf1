"""LM heads: what the fused loss serves, and what is refused rather than trained on another loss."""

import pytest
import torch
from model_cases import made_samples, made_tokenizer, tiny
from torch import nn

from lead_fast.models import PackedModel, check_head, lm_head
from lead_fast.packing import pack


@pytest.fixture(scope="module")
def tokenizer():
    return made_tokenizer()


@pytest.fixture(scope="module")
def samples(tokenizer):
    return made_samples(tokenizer)


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
