"""Recomputed activations, compiled layers, quantized bases and half precision train the same model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from model_cases import demo_samples, demo_tokenizer
from peft import PeftModel
from torch import nn

import lead_fast as lf
from lead_fast.cli import main
from lead_fast.config import TrainConfig
from lead_fast.demo_pool import demo_rows
from lead_fast.files import write_jsonl
from lead_fast.layers import compile_layers, liger_layers
from lead_fast.loading import build_model, load_model, save_model
from lead_fast.lora import add_lora
from lead_fast.lora_linear import LoraLinear, fuse_lora
from lead_fast.models import PackedModel
from lead_fast.optimization import Optimization, TrainingError, make_accelerator
from lead_fast.packing import pack
from lead_fast.pool import Pool
from lead_fast.trainer import attach

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return demo_tokenizer()


@pytest.fixture(scope="module")
def samples(tokenizer):
    return demo_samples(tokenizer, 12)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A model on disk whose head is not tied, as quantized bases are."""
    path = tmp_path_factory.mktemp("base") / "model"
    save_model(build_model("tiny", tokenizer, seed=0, device=CPU), tokenizer, path)
    return path


def gradients(model, samples, **options):
    """Loss and gradients of one step, by parameter, before they are used."""
    config, found = TrainConfig(max_grad_norm=0.0, **options), {}
    optimization = Optimization(model, make_accelerator(config), config)
    step = optimization.optimizer.step

    def look():
        found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        return step()

    optimization.optimizer.step = look
    return optimization.step([pack(samples[:5]), pack(samples[5:])], 1e-3).loss, found, optimization


def close(one, two, **tolerance):
    assert one.keys() == two.keys() and one
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_recomputed_activations_give_the_same_gradient_and_keep_less(tuning, tokenizer, samples):
    def model():
        built = build_model("tiny", tokenizer, seed=0, device=CPU)
        return add_lora(built, rank=4, alpha=16.0, seed=0) if tuning == "lora" else built

    def kept(**options):
        """Bytes that forward keeps for backward, and what came of the step."""
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (sizes.__setitem__((t.data_ptr(), t.numel()), t.numel() * t.element_size()), t)[1], lambda t: t
        ):
            result = gradients(model(), samples, **options)
        return sum(sizes.values()), result

    plain_bytes, (loss, plain, _) = kept()
    fewer_bytes, (same_loss, recomputed, _) = kept(gradient_checkpointing=True)
    assert torch.equal(loss, same_loss)
    close(plain, recomputed, rtol=0, atol=0)
    assert fewer_bytes < 0.5 * plain_bytes


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_compiled_layers_give_the_same_gradient_for_any_length(recomputed, tokenizer, samples):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    loss, eager, _ = gradients(build_model("tiny", tokenizer, seed=0, device=CPU), samples)
    same_loss, compiled, optimization = gradients(
        build_model("tiny", tokenizer, seed=0, device=CPU), samples, compile=True, gradient_checkpointing=recomputed
    )
    torch.testing.assert_close(loss, same_loss)
    close(eager, compiled, rtol=1e-3, atol=1e-5)
    stats = torch._dynamo.utils.counters["stats"]
    graphs = stats["unique_graphs"]
    assert graphs == 1 if recomputed else graphs > 1  # all layers are the same, and one that is recomputed cannot be split
    for count in (2, 3, 7):  # lengths not seen before
        optimization.step([pack(samples[:count])], 1e-3)
    assert stats["unique_graphs"] == graphs
    torch._dynamo.reset()


def test_a_compiled_layer_takes_no_number_from_the_host(tokenizer, samples):
    """On a GPU each would be waited for, and compiled as C++: a graph of any length takes floats as tensors by default."""
    inputs = []

    def backend(graph, examples):
        inputs.extend(examples)
        return graph.forward

    torch._dynamo.reset()
    model = add_lora(build_model("tiny", tokenizer, seed=0, device=CPU), rank=4, alpha=1.3, seed=0)
    fuse_lora(model)
    compile_layers(model, backend=backend)
    PackedModel(model, check=False)(pack(samples[:3])).loss.backward()
    torch._dynamo.reset()
    assert inputs and all(isinstance(i, torch.SymInt) or i.ndim > 0 for i in inputs)


def test_lora_layers_run_as_one_operator(tokenizer):
    model = add_lora(build_model("tiny", tokenizer, seed=0, device=CPU), rank=4, alpha=16.0, seed=0)
    config = TrainConfig()
    Optimization(model, make_accelerator(config), config)
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    assert len(layers) == 4 * 7 and all(type(layer) is LoraLinear for layer in layers)


@pytest.mark.cuda
def test_a_step_that_the_gradient_scaler_leaves_out_is_told(tokenizer, samples):
    AcceleratorState._reset_state(reset_partial_state=True)
    model = build_model("tiny", tokenizer, seed=0, device=torch.device("cuda"))
    config = TrainConfig(precision="fp16", tuning="full")
    optimization = Optimization(model, make_accelerator(config), config)
    optimization.accelerator.scaler._init_scale = 2.0**40  # the first gradients overflow
    before = [p.clone() for p in model.parameters()]
    assert not optimization.step([pack(samples)], 1e-2).taken
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    AcceleratorState._reset_state(reset_partial_state=True)


def test_bf16_autocast_is_near_fp32(tokenizer, samples):
    def model():
        return add_lora(build_model("tiny", tokenizer, seed=0, device=CPU), rank=4, alpha=16.0, seed=0)

    loss, exact, _ = gradients(model(), samples)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        half_loss, half, _ = gradients(model(), samples, precision="bf16")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    torch.testing.assert_close(half_loss, loss, rtol=2e-2, atol=0)
    one, two = (torch.cat([g.flatten() for g in found.values()]) for found in (exact, half))
    assert float((one - two).norm() / one.norm()) < 0.1
    assert all(g.dtype == torch.float32 for g in half.values())


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_lora_on_a_quantized_base(bits, folder, tokenizer, samples, tmp_path):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: no quantized bases")
    base = load_model(folder, dtype=torch.float32, device=CPU, quantize=bits)
    kinds = {"4bit": bnb.nn.Linear4bit, "8bit": bnb.nn.Linear8bitLt}
    linear = {name: module for name, module in base.named_modules() if name.endswith("_proj")}
    assert linear and all(type(module) is kinds[bits] for module in linear.values())
    assert type(base.get_output_embeddings()) is nn.Linear
    model = add_lora(base, rank=4, alpha=16.0, seed=0)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    config = TrainConfig(learning_rate=1e-2, gradient_checkpointing=True, quantize=bits)
    optimization = Optimization(model, make_accelerator(config), config)
    batch = pack(samples)
    losses = [float(optimization.step([batch], 2e-3).loss) for _ in range(8)]
    assert losses[-1] < losses[0] - 0.1, losses
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if not p.requires_grad)
    # The adapter alone is written, and gives the same loss on the base loaded again.
    save_model(model, tokenizer, tmp_path / "adapter")
    assert sum(f.stat().st_size for f in (tmp_path / "adapter").glob("*.safetensors")) < 1_000_000
    again = PeftModel.from_pretrained(load_model(folder, dtype=torch.float32, device=CPU, quantize=bits), tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(PackedModel(again).eval()(batch).loss, optimization.packed.eval()(batch).loss)


def test_a_quantized_base_gives_the_gradient_of_its_own_weights(folder, tokenizer, samples):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: no quantized bases")
    quantized = load_model(folder, dtype=torch.float32, device=CPU, quantize="4bit")
    whole = load_model(folder, dtype=torch.float32, device=CPU)
    for name, module in quantized.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            whole.get_submodule(name).weight.data.copy_(weight)
    loss, expected, _ = gradients(add_lora(whole, rank=4, alpha=16.0, seed=0), samples)
    same_loss, got, _ = gradients(add_lora(quantized, rank=4, alpha=16.0, seed=0), samples)
    torch.testing.assert_close(loss, same_loss)
    close(expected, got, rtol=1e-3, atol=1e-6)


def test_the_options_from_the_command_line(folder, tmp_path, capsys):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: no quantized bases")
    write_jsonl(tmp_path / "pool.jsonl", demo_rows(60, seed=1))
    options = ["train", "--model", str(folder), "--pool", str(tmp_path / "pool.jsonl"), "--budget", "6", "--min-rounds", "3",
               "--num-arms", "2", "--tasks-per-arm", "1", "--max-length", "128", "--warmup-share", "0.1", "--lora-rank", "4",
               "--learning-rate", "1e-3", "--quantize", "4bit", "--gradient-checkpointing", "--threads", "1"]  # fmt: skip
    assert main([*options, "--out", str(tmp_path / "run")]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == 6
    assert main([*options, "--out", str(tmp_path / "full"), "--tuning", "full"]) == 1
    assert "`quantize` must be None unless tuning is 'lora', got '4bit'" in capsys.readouterr().err


def test_what_liger_is_needed_for_is_said(tokenizer, monkeypatch):
    model, config = build_model("tiny", tokenizer, seed=0, device=CPU), TrainConfig(liger=True)
    accelerator = make_accelerator(config)
    if accelerator.device.type == "cpu":
        with pytest.raises(TrainingError, match="its kernels need a GPU, got cpu"):
            Optimization(model, accelerator, config)
    with pytest.raises(ValueError, match="`liger` must be False with `compile`"):
        TrainConfig(liger=True, compile=True)
    monkeypatch.setattr("lead_fast.layers.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="liger-kernel is not installed"):
        liger_layers(model)


def test_liger_refuses_what_it_does_not_know(tokenizer, monkeypatch):
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    model = build_model("tiny", tokenizer, seed=0, device=CPU)
    model.config.model_type = "gpt_neo"
    with pytest.raises(ValueError, match=r"expected a model that liger-kernel knows .*llama.*, got gpt_neo"):
        liger_layers(model)


@pytest.mark.cuda
def test_liger_s_layers_give_the_gradient_of_the_model_s_own(tokenizer, samples):
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    from transformers.models.llama import modeling_llama

    rotary, norm, mlp = modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaRMSNorm, modeling_llama.LlamaMLP
    try:
        (loss, expected, _), (again, got, _) = (
            gradients(
                add_lora(build_model("tiny", tokenizer, seed=0, device=torch.device("cuda")), rank=4, alpha=16.0, seed=0),
                samples, precision="bf16", liger=liger,
            )
            for liger in (False, True)
        )  # fmt: skip
        assert modeling_llama.apply_rotary_pos_emb is not rotary
        assert modeling_llama.LlamaRMSNorm is norm and modeling_llama.LlamaMLP is mlp
    finally:
        modeling_llama.apply_rotary_pos_emb = rotary
    torch.testing.assert_close(again, loss, rtol=1e-3, atol=0)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert (got[name] - value).norm() <= 3e-2 * value.norm() + 1e-9, name


@pytest.mark.parametrize("option", ["gradient_checkpointing", "compile"])
def test_first_order_needs_the_layers_as_they_are(option, tokenizer):
    config = TrainConfig(**{option: True})
    model = add_lora(build_model("tiny", tokenizer, seed=0, device=CPU), rank=4, alpha=16.0, seed=0)
    pool = Pool.from_arrays(arm=np.zeros(8, np.int16), utility=np.ones(8, np.float32))
    engine = lf.LeadEngine(pool, lf.LeadConfig(estimator="first_order"))
    with pytest.raises(TrainingError, match="leave --gradient-checkpointing and --compile out"):
        attach(engine, Optimization(model, make_accelerator(config), config))


@pytest.mark.parametrize(
    ("launcher", "option", "expected"), [("bf16", "auto", "bf16"), ("no", "auto", "no"), ("bf16", "fp32", "no")]
)
def test_the_launcher_s_precision_holds_where_no_other_is_asked_for(launcher, option, expected, monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    try:
        assert make_accelerator(TrainConfig(precision=option)).mixed_precision == expected
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
