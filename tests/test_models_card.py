"""Families of models on a real card: its attention kernels give what each sample has alone, and whole runs end."""

import json

import numpy as np
import pytest
import torch
from model_cases import KINDS, demo_samples, demo_tokenizer, tiny
from torch import nn

from lead_fast.cli import main
from lead_fast.demo_pool import demo_rows
from lead_fast.files import read_jsonl, write_jsonl
from lead_fast.loading import save_model
from lead_fast.models import PackedModel
from lead_fast.packing import pack

pytestmark = pytest.mark.cuda
OPTIONS = [
    "--max-length", "128", "--step-tokens", "256", "--budget", "24", "--min-rounds", "6", "--num-arms", "3",
    "--tasks-per-arm", "2", "--warmup-share", "0.1",
]  # fmt: skip
RUNS = {
    "softcap": ("gemma2", {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 20.0, "sliding_window": 8}, []),
    "experts": (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "output_router_logits": True},
        ["--tuning", "full"],
    ),
    "checkpointing": ("gpt2", {}, ["--gradient-checkpointing"]),
    "compiled": ("llama", {}, ["--compile"]),
    "compiled-checkpointing": ("qwen2", {}, ["--compile", "--gradient-checkpointing", "--tuning", "full"]),
    "one-by-one": ("bloom", {}, []),
}


@pytest.fixture(scope="module")
def tokenizer():
    return demo_tokenizer()


@pytest.fixture(scope="module")
def samples(tokenizer):
    return demo_samples(tokenizer, 8)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("kind", "options"), KINDS, ids=[k for k, _ in KINDS])
def test_a_packed_sample_has_the_loss_and_gradient_it_has_alone(kind, options, autocast, tokenizer, samples):
    """The truth: transformers' own eager attention in fp64 on the CPU, one sample at a time."""
    model = tiny(kind, len(tokenizer), **options).cuda()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        out = PackedModel(model)(pack(samples).to("cuda"), reduction="sum")
    out.loss.backward()
    got = {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}
    model = model.cpu().double()
    model.zero_grad()
    model.set_attn_implementation("eager")
    near = dict(rtol=3e-2, atol=3e-2) if autocast else dict(rtol=1e-3, atol=1e-3)
    for s, sample in enumerate(samples):
        ids = torch.from_numpy(sample.input_ids)[None]
        nll = nn.functional.cross_entropy(model(input_ids=ids, use_cache=False).logits[0, :-1], ids[0, 1:], reduction="none")
        mask = torch.from_numpy(sample.supervised[1:])
        nll[mask].sum().backward()
        torch.testing.assert_close(out.samples.loss[s].item(), nll[mask].mean().item(), **near)
    assert set(got) == {name for name, p in model.named_parameters() if p.grad is not None}
    ours, truth = (torch.cat([x.flatten() for x in found]) for found in (
        [got[name] for name in got], [p.grad for name, p in model.named_parameters() if name in got]
    ))  # fmt: skip
    assert (ours - truth).norm() < (5e-2 if autocast else 1e-2) * truth.norm()


@pytest.mark.parametrize("name", RUNS)
def test_a_whole_run_on_the_card(name, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("LEAD_FAST_CACHE", str(tmp_path / "cache"))
    kind, shape, options = RUNS[name]
    save_model(tiny(kind, len(tokenizer), **shape), tokenizer, tmp_path / "model")
    write_jsonl(tmp_path / "pool.jsonl", demo_rows(120, seed=1))
    out = tmp_path / "out"
    given = ["--model", str(tmp_path / "model"), "--pool", str(tmp_path / "pool.jsonl"), "--out", str(out)]
    assert main(["train", *given, *OPTIONS, *options]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["precision"] == "bf16" and summary["rows"] == summary["budget"] > 4
    assert np.isfinite([record["mean_loss"] for record in read_jsonl(out / "rounds.jsonl")]).all()
