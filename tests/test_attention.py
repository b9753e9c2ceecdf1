"""Packed attention: each sample alone, and the adapters to the variable-length kernels by their signatures.

No kernel runs here: doubles with the exact parameters of each release stand for it, computing what it documents in plain
PyTorch. The tests marked cuda call the real one.
"""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from lead_fast import attention
from lead_fast.attention import packed_attention, per_sample_attention
from lead_fast.loading import build_model
from lead_fast.models import PackedModel
from lead_fast.offline.pretrain import train_tokenizer
from lead_fast.packing import Sample, pack

BOUNDS = torch.tensor([0, 5, 6, 18], dtype=torch.int32)


def heads(num_heads, seed, dtype=torch.float32):
    return torch.randn(1, num_heads, 18, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


def documented(q, k, v, bounds, *, causal, scale, window, gqa, softcap=0.0):
    """Attention over [T, heads, D] as the libraries document it, one query at a time."""
    assert gqa or q.shape[1] == k.shape[1], "the same number of heads, or grouped queries"
    groups, out = q.shape[1] // k.shape[1], torch.empty_like(q)
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        for head in range(q.shape[1]):
            scores = (q[start:end, head] @ k[start:end, head // groups].T) * (q.shape[-1] ** -0.5 if scale is None else scale)
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            i, j = torch.meshgrid(torch.arange(end - start), torch.arange(end - start), indexing="ij")
            left, right = window
            seen = ((i - j <= left) | (left < 0)) & ((j - i <= right) | (right < 0))
            seen &= (j <= i) | (not causal)
            out[start:end, head] = torch.softmax(scores.masked_fill(~seen, -torch.inf), 1) @ v[start:end, head // groups]
    return out


def torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    return documented(query, key, value, cu_seq_q, causal=is_causal, scale=None, window=(-1, -1), gqa=False)


def torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
    return documented(query, key, value, cu_seq_q, causal=False, scale=scale, window=window_size, gqa=False)


def torch_2_13(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
               enable_gqa=False, seqused_k=None, block_table=None, num_splits=None):  # fmt: skip
    return documented(query, key, value, cu_seq_q, causal=False, scale=scale, window=window_size, gqa=enable_gqa)


def flash_attn(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
               causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
               return_attn_probs=False, block_table=None):  # fmt: skip
    return documented(q, k, v, cu_seqlens_q, causal=causal, scale=softmax_scale, window=window_size, gqa=True, softcap=softcap)


@pytest.fixture(autouse=True)
def _a_card_that_is_new_enough(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setattr(attention, "_is_new_enough", lambda device: True)


RELEASES = {"torch 2.10": torch_2_10, "torch 2.11": torch_2_11, "torch 2.13": torch_2_13, "flash-attn": flash_attn}


@pytest.fixture
def kernel(request, monkeypatch):
    """The double of a release, in place of the library; the device check sees a GPU."""
    library = "flash-attn" if request.param == "flash-attn" else "torch.nn.attention.varlen"
    takes = frozenset(attention.inspect.signature(RELEASES[request.param]).parameters)
    monkeypatch.setattr(attention, "_library", lambda: library)
    monkeypatch.setattr(attention, "_function", lambda name: RELEASES[request.param])
    monkeypatch.setattr(attention, "_takes", lambda name, parameter: parameter in takes)
    monkeypatch.setattr(attention, "_HALF", (torch.float32,))
    choose = attention._kernel_for
    as_gpu = SimpleNamespace(device=SimpleNamespace(type="cuda", index=0), dtype=torch.float32, shape=(1, 4, 18, 8))
    monkeypatch.setattr(attention, "_kernel_for", lambda query, *rest: choose(as_gpu, *rest))
    return request.param


RECOMPUTED = torch.nn.Identity()
RECOMPUTED.gradient_checkpointing = True
setattr(RECOMPUTED, attention.COMPILED_LAYER, (RECOMPUTED,))
OPTIONS = [{}, {"scaling": 0.7}, {"sliding_window": 3}, {"scaling": 0.2, "sliding_window": 2}, {"softcap": 2.0}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("kernel", RELEASES, indirect=True)
def test_every_release_gives_what_each_sample_gets_alone(kernel, num_kv_heads, options, caplog, monkeypatch):
    monkeypatch.setattr(attention, "say_once", attention.say_once.__wrapped__)
    q, k, v = heads(4, 0), heads(num_kv_heads, 1), heads(num_kv_heads, 2)
    got, _ = packed_attention(None, q, k, v, None, cu_seq_lens_q=BOUNDS, max_length_q=12, **options)
    expected = per_sample_attention(q, k, v, BOUNDS, **options)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    unserved = ("sliding_window" in options and kernel == "torch 2.10") or ("softcap" in options and kernel != "flash-attn")
    assert ("attention runs sample by sample" in caplog.text) == unserved


def test_half_precision_alone_reaches_a_kernel(monkeypatch):
    monkeypatch.setattr(attention, "_library", lambda: "torch.nn.attention.varlen")
    on_gpu = SimpleNamespace(device=SimpleNamespace(type="cuda", index=0), dtype=torch.float32, shape=(1, 4, 18, 64))
    kernel, reason = attention._kernel_for(on_gpu, on_gpu.shape[-1], 0.0, None, None, None)
    assert kernel is None and "serves bf16 and fp16, got float32" in reason
    on_gpu.dtype = torch.bfloat16
    assert attention._kernel_for(on_gpu, on_gpu.shape[-1], 0.0, None, None, None) == (attention._varlen, None)
    on_gpu.shape = (1, 4, 18, 320)
    assert "heads of at most 256" in attention._kernel_for(on_gpu, on_gpu.shape[-1], 0.0, None, None, None)[1]


def test_what_a_model_s_check_runs_sample_by_sample_is_not_said(monkeypatch, caplog):
    """The check of fp32 weights runs without autocast, and says nothing of how they are trained."""
    monkeypatch.setattr(attention, "say_once", attention.say_once.__wrapped__)
    monkeypatch.setattr(attention, "_kernel_for", lambda *_: (None, "the reason"))
    tokenizer = train_tokenizer(["some words " * 9], 300)
    model = PackedModel(build_model("tiny", tokenizer, seed=0, device=torch.device("cpu")))
    assert "sample by sample" not in caplog.text
    model(pack([Sample(np.arange(3, 9), np.ones(6, bool), np.ones(6, bool))]))
    assert "attention runs sample by sample: the reason" in caplog.text


def test_cards_before_ampere_reach_no_kernel(monkeypatch):
    monkeypatch.setattr(attention, "_library", lambda: "torch.nn.attention.varlen")
    monkeypatch.setattr(attention, "_is_new_enough", lambda device: device != 1)
    turing = SimpleNamespace(device=SimpleNamespace(type="cuda", index=1), dtype=torch.float16, shape=(1, 4, 18, 64))
    kernel, reason = attention._kernel_for(turing, 64, 0.0, None, None, None)
    assert kernel is None and "compute capability 8.0 and newer" in reason
    assert "sample by sample" in attention.describe_attention(torch.device("cuda", 1), torch.float16)


def test_a_flash_attn_that_cannot_be_imported_is_named_and_torch_s_own_taken(tmp_path, monkeypatch, caplog):
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: made for another torch')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    assert attention._library.__wrapped__() == "torch.nn.attention.varlen"
    assert "flash-attn is installed, but not to be used: undefined symbol" in caplog.text


@pytest.mark.parametrize("library", ["flash-attn", "torch.nn.attention.varlen"])
def test_head_shapes_that_a_kernel_refuses_reach_none(library, monkeypatch):
    monkeypatch.setattr(attention, "_library", lambda: library)
    monkeypatch.setattr(attention, "_takes", lambda *_: True)
    on_gpu = SimpleNamespace(device=SimpleNamespace(type="cuda", index=0), dtype=torch.bfloat16, shape=(1, 4, 18, 192))
    kernel, reason = attention._kernel_for(on_gpu, 128, 0.0, None, None, None)  # multi-head latent attention
    assert kernel is None and "values as wide as keys, got 128 and 192" in reason
    on_gpu.shape = (1, 4, 18, 50)
    kernel, reason = attention._kernel_for(on_gpu, 50, 0.0, None, None, None)
    assert (kernel is None) == (library != "flash-attn") and (kernel is not None or "a multiple of 8, got 50" in reason)


def test_autocast_brings_fp32_weights_to_a_kernel(monkeypatch):
    """Rotary embeddings leave q and k in fp32 there, and v in half precision."""
    seen, choose = [], attention._kernel_for
    monkeypatch.setattr(attention, "_kernel_for", lambda query, *rest: (seen.append(query.dtype), choose(query, *rest))[1])
    model = build_model("tiny", train_tokenizer(["some words " * 9], 300), seed=0, device=torch.device("cpu"))
    ids = torch.arange(18)[None]
    with torch.autocast("cpu", torch.bfloat16):
        model.base_model(
            input_ids=ids, use_cache=False, cu_seq_lens_q=BOUNDS, max_length_q=12
        ).last_hidden_state.sum().backward()
    assert seen == [torch.bfloat16] * 4
    assert all(p.grad.isfinite().all() for p in model.base_model.parameters())


def test_the_installed_torch_has_the_kernel_the_adapter_knows():
    library = "torch.nn.attention.varlen"
    assert list(attention.inspect.signature(attention._function(library)).parameters)[:7] == [
        "query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k",
    ]  # fmt: skip
    assert attention._takes(library, "window_size") or attention._takes(library, "is_causal")


def test_what_comes_back_is_contiguous():
    """Some models take a view of it."""
    q, k = heads(4, 0), heads(2, 1)
    assert packed_attention(None, q, k, k, None, cu_seq_lens_q=BOUNDS, max_length_q=12)[0].is_contiguous()


def test_a_sample_sees_no_other_and_nothing_ahead():
    q, k, v = heads(4, 0), heads(2, 1), heads(2, 2)
    base = per_sample_attention(q, k, v, BOUNDS)
    changed = v.clone()
    changed[:, :, 9] += 1.0
    moved = (per_sample_attention(q, k, changed, BOUNDS) - base).abs().amax((0, 2, 3)) > 0
    assert moved.tolist() == [False] * 9 + [True] * 9


def test_attention_sinks_are_refused():
    with pytest.raises(ValueError, match="attention sinks"):
        packed_attention(None, heads(4, 0), heads(4, 1), heads(4, 2), None, s_aux=torch.ones(4))


@pytest.mark.parametrize("options", [*OPTIONS, {"softcap": 2.0, "sliding_window": 4, "scaling": 0.5}], ids=str)
@pytest.mark.parametrize(("num_kv_heads", "dtype"), [(4, torch.float32), (2, torch.float32), (2, torch.bfloat16)])
def test_sample_by_sample_is_one_operator_of_a_compiled_graph(num_kv_heads, dtype, options):
    """For any lengths, with the gradient that autograd has."""
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=graphs)
    def compiled(q, k, v, bounds):
        return packed_attention(RECOMPUTED, q, k, v, None, cu_seq_lens_q=bounds, max_length_q=12, **options)[0]

    for length in (18, 7, 13):
        shapes = enumerate((4, num_kv_heads, num_kv_heads))
        inputs = [heads(count, seed, dtype)[:, :, :length].clone().requires_grad_() for seed, count in shapes]
        bounds = BOUNDS.clamp(max=length)
        got = compiled(*inputs, bounds)
        expected = per_sample_attention(*(x.double() for x in inputs), bounds, **options)
        upstream = torch.randn(got.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
        near = dict(rtol=1e-5, atol=2e-6) if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(got, expected.to(dtype), **near)
        for ours, truth in zip(torch.autograd.grad(got, inputs, upstream),
                               torch.autograd.grad(expected, inputs, upstream.double()), strict=True):  # fmt: skip
            torch.testing.assert_close(ours, truth, **near)
    operators = [[str(n.target) for n in graph.graph.nodes if n.op == "call_function"] for graph in graphs.graphs]
    assert [names for names in operators if names] == [["lead_fast.per_sample_attention.default"]]
    options = (options.get("scaling"), options.get("sliding_window"), options.get("softcap"))
    if dtype == torch.float32:
        torch.library.opcheck(attention._per_sample_operator, (*inputs, bounds, *options))


def test_a_compiled_graph_has_the_kernel_of_a_gpu():
    """As its fake tensors see it; what the kernel does not serve is the other operator."""

    def graph_of(dtype):
        torch._dynamo.reset()
        graphs = CompileCounterWithBackend("eager")

        @torch.compile(fullgraph=True, dynamic=True, backend=graphs)
        def compiled(q, k, bounds, longest):
            return packed_attention(RECOMPUTED, q, k, k, None, cu_seq_lens_q=bounds, max_length_q=longest)[0]

        with FakeTensorMode(allow_non_fake_inputs=True):
            for length in (32, 48):
                q, k = (torch.empty(1, count, length, 64, device="cuda", dtype=dtype) for count in (4, 2))
                bounds = torch.empty(3, dtype=torch.int32, device="cuda")
                assert compiled(q, k, bounds, length - 3).shape == (1, length, 4, 64)
        (graph,) = graphs.graphs
        return {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}

    assert any("varlen" in target or "flash_attn" in target for target in graph_of(torch.bfloat16))
    assert any("lead_fast.per_sample_attention" in target for target in graph_of(torch.float32))


@pytest.mark.parametrize("options", [{"sliding_window": 3}, {"softcap": 2.0}], ids=str)
def test_a_layer_that_is_split_is_not_compiled_again_for_every_length(options):
    torch._dynamo.reset()
    graphs, after_length = CompileCounterWithBackend("eager"), []

    @torch.compile(dynamic=True, backend=graphs)
    def layer(q, k, v, bounds):
        return 2 * packed_attention(None, 2 * q, k, v, None, cu_seq_lens_q=bounds, **options)[0]

    for ends in ([4, 9], [1, 6], [2, 12], [5, 6, 18], [3, 8, 11, 17]):
        inputs = [heads(count, seed)[:, :, : ends[-1]].clone() for seed, count in enumerate((4, 2, 2))]
        layer(*inputs, torch.tensor([0, *ends], dtype=torch.int32))
        after_length.append(graphs.frame_count)
    assert 0 < after_length[-1] <= 4, after_length


def test_values_may_be_narrower_than_keys():
    """As in multi-head latent attention."""
    torch._dynamo.reset()
    q, k, v = (x.requires_grad_() for x in (heads(4, 0), heads(2, 1), heads(2, 2)[..., :5].clone()))

    def attend():
        return packed_attention(RECOMPUTED, q, k, v, None, cu_seq_lens_q=BOUNDS, max_length_q=12)[0]

    expected, got = attend(), torch.compile(attend, fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(got, expected)
    assert got.shape == (1, 18, 4, 5)
    for ours, truth in zip(torch.autograd.grad(got.sum(), (q, k, v)), torch.autograd.grad(expected.sum(), (q, k, v)),
                           strict=True):  # fmt: skip
        torch.testing.assert_close(ours, truth)


def test_dropout_that_keeps_a_recomputed_layer_from_its_graph_is_said(caplog, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(attention, "say_once", attention.say_once.__wrapped__)
    q = heads(4, 0)
    torch.compile(lambda: packed_attention(RECOMPUTED, q, q, q, None, dropout=0.1, cu_seq_lens_q=BOUNDS), backend="eager")()
    assert "attention has dropout: torch.compile makes no graph" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_reaches_into_the_operator(dtype):
    torch._dynamo.reset()
    q, k, v = heads(4, 0), heads(2, 1), heads(2, 2)

    def attend():
        return packed_attention(RECOMPUTED, q, k, v, None, cu_seq_lens_q=BOUNDS, max_length_q=12)[0]

    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        expected, got = attend(), torch.compile(attend, backend="aot_eager")()
    assert got.dtype == expected.dtype == dtype
    torch.testing.assert_close(got, expected)


@pytest.mark.cuda
@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_kernel_of_this_machine_gives_what_each_sample_gets_alone(num_kv_heads, options):
    def make(count, seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(1, count, 300, 64, generator=generator).to("cuda", torch.bfloat16).requires_grad_()

    bounds = torch.tensor([0, 100, 101, 300], dtype=torch.int32, device="cuda")
    inputs = make(4, 0), make(num_kv_heads, 1), make(num_kv_heads, 2)
    upstream = torch.randn(1, 300, 4, 64, device="cuda", dtype=torch.bfloat16)
    got, _ = packed_attention(None, *inputs, None, cu_seq_lens_q=bounds, max_length_q=199, **options)
    expected = per_sample_attention(*(x.double() for x in inputs), bounds, **options)
    torch.testing.assert_close(got.double(), expected, rtol=2e-2, atol=2e-2)
    for ours, truth in zip(torch.autograd.grad(got, inputs, upstream),
                           torch.autograd.grad(expected, inputs, upstream.double()), strict=True):  # fmt: skip
        assert (ours - truth).norm() < 2e-2 * truth.norm()
