"""A LoRA layer as one operator: peft's own forward is the reference; what the operator cannot do stays with peft."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn

from lead_fast.first_order import LoraSketch, SampleTiles
from lead_fast.lora_linear import LoraLinear, _LoraLinear, fuse_lora

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


class Two(nn.Module):
    """Two linear layers that read one input, and one that reads their product."""

    def __init__(self, bias):
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(24, 40, bias), nn.Linear(24, 40, bias), nn.Linear(40, 24, bias)

    def forward(self, x):
        return self.down(self.up(x) * torch.tanh(self.gate(x)))


def adapted(with_bias=False, names=("default",), device="cpu", **options):
    torch.manual_seed(3)
    config = LoraConfig(**({"r": 4, "lora_alpha": 12, "target_modules": ["up", "gate", "down"]} | options))
    model = get_peft_model(Two(with_bias), config)
    for name in names[1:]:
        model.add_adapter(name, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # B is 0 at first, and with it half of the gradients
            nn.init.normal_(parameter, std=0.3)
    return model.to(device)


def gradients(model, x, upstream):
    x = x.clone().requires_grad_()
    names, trained = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True)
    y = model(x)
    found = torch.autograd.grad(y, (x, *trained), upstream.to(y.dtype))
    return {"y": y.detach(), "x": found[0]} | dict(zip(names, found[1:], strict=True))


def inputs(device="cpu", shape=(1, 30, 24)):
    g = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=g).to(device), torch.randn(shape, generator=g).to(device)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 30, 24), (30, 24), (2, 3, 5, 24)])
def test_it_is_peft_s_forward(bias, shape, monkeypatch):
    plain = adapted(bias).double()
    fused = copy.deepcopy(plain)
    assert fuse_lora(fused) == 3
    x, upstream = (t.double() for t in inputs(shape=shape))
    calls, apply = [], _LoraLinear.apply
    monkeypatch.setattr(_LoraLinear, "apply", lambda *args: calls.append(1) or apply(*args))
    expected, got = gradients(plain, x, upstream), gradients(fused, x, upstream)
    assert len(calls) == 3
    assert len(expected) == 8  # y, x, and two of each layer
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("frozen", [torch.float32, torch.bfloat16])
def test_under_autocast_it_rounds_no_more_than_peft_s(device, dtype, frozen):
    model = adapted(True, device=device)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16().to(frozen)
    truth = gradients(copy.deepcopy(model).double(), *(t.double() for t in inputs(device)))
    fused = copy.deepcopy(model)
    fuse_lora(fused)
    with torch.autocast(device, dtype):
        plain, got = gradients(model, *inputs(device)), gradients(fused, *inputs(device))
    for name, value in truth.items():
        assert got[name].dtype == plain[name].dtype
        allowed, error = ((found[name].double() - value).norm() for found in (plain, got))
        assert error <= 1.25 * allowed + 1e-9, name


def kept(model):
    """Bytes that a forward pass keeps for backward, apart from parameters, each storage once."""
    storages = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = []

    def keep(tensor):
        held.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        x = inputs(shape=(1, 400, 24))[0].bfloat16().requires_grad_()
        model(x)
    return sum(storages.values())


def test_layers_that_read_one_input_keep_it_once():
    plain = adapted()
    for name, parameter in plain.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    fused = copy.deepcopy(plain)
    fuse_lora(fused)
    assert kept(fused) <= kept(plain) - 400 * 24 * 2


CASES = ["dropout", "dora", "two adapters", "disabled", "merged", "trained base", "trained bias", "other precision", "forward"]


@pytest.mark.parametrize("case", CASES)
def test_what_it_cannot_do_stays_with_peft(case, monkeypatch):
    options = {"dropout": {"lora_dropout": 0.5}, "dora": {"use_dora": True}, "trained bias": {"bias": "all"}}.get(case, {})
    plain = adapted(case == "trained bias", ("default", "second") if case == "two adapters" else ("default",), **options)
    fused = copy.deepcopy(plain)
    fuse_lora(fused)
    for model in (plain, fused):
        if case == "two adapters":
            model.base_model.set_adapter(["default", "second"])
        if case == "disabled":
            model.base_model.disable_adapter_layers()
        if case == "merged":
            model.merge_adapter()
        if case == "trained base":
            model.requires_grad_(True)
        if case == "other precision":  # outside autocast: the adapter computes in its own
            for layer in (model.base_model.model.up, model.base_model.model.gate, model.base_model.model.down):
                layer.base_layer.bfloat16()
        if case == "forward":  # what loads weights when a layer is called, say
            for layer in (model.base_model.model.up, model.base_model.model.gate, model.base_model.model.down):
                layer.base_layer.forward = layer.base_layer.forward
    monkeypatch.setattr("lead_fast.lora_linear._LoraLinear.apply", None)
    x, upstream = (t.bfloat16() if case == "other precision" else t for t in inputs())
    torch.manual_seed(7)
    expected = gradients(plain, x, upstream) if case not in ("disabled", "merged") else {"y": plain(x)}
    torch.manual_seed(7)
    got = gradients(fused, x, upstream) if case not in ("disabled", "merged") else {"y": fused(x)}
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_hooks_on_its_parts_are_called():
    """The sketches of `first_order` are such hooks."""
    model = adapted()
    fuse_lora(model)
    sketch = LoraSketch(model, k=4)
    x, upstream = inputs()
    tiles = torch.tensor([0, 10, 30])
    with sketch.collect(tiles) as sketches:
        gradients(model, x, upstream)
    assert SampleTiles(tiles, torch.device("cpu")).num_samples == len(sketches) == 2 and bool((sketches != 0).any(1).all())


def test_names_types_and_copies_are_peft_s(tmp_path):
    model = adapted()
    before = list(model.state_dict())
    fuse_lora(model)
    assert list(model.state_dict()) == before
    layer = model.base_model.model.up
    assert type(layer) is LoraLinear and isinstance(layer, PeftLinear) and fuse_lora(model) == 0
    model.save_pretrained(tmp_path)
    again = adapted(target_modules=["up", "gate", "down"])
    again.load_adapter(tmp_path, "saved")
    again.set_adapter("saved")
    twin = copy.deepcopy(model)
    nn.init.zeros_(layer.lora_B["default"].weight)  # the copy has weights of its own
    x, _ = inputs()
    torch.testing.assert_close(twin(x), again(x))
    assert not torch.allclose(model(x), again(x))


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_it_gives_the_same_in_one_graph(device):
    model = adapted(True, device=device)
    fuse_lora(model)
    compiled = torch.compile(model.base_model.model, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    x, upstream = inputs(device)
    expected = gradients(model, x, upstream)
    y = compiled(x.requires_grad_())
    torch.testing.assert_close(y, expected["y"])
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(y, trained, upstream)
    for got, value in zip(found, list(expected.values())[2:], strict=True):
        torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-4)
