"""The experimental estimator `first_order`: how well sketches predict loss changes, beside what they cost a step.

    PYTHONPATH=. python benchmarks/first_order.py

Small Llamas, pretrained on generated text, then LoRA rounds on the demo's pool. The truth is a forward pass over the round's
samples after it. Writes first_order.json and .md into benchmarks/results. About fifteen minutes on one core.
"""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from interleaved import interleave, machine
from scipy.stats import spearmanr
from torch import Tensor
from tqdm import tqdm

from lead_fast.config import PrepareConfig
from lead_fast.demo_pool import demo_rows
from lead_fast.first_order import FirstOrderRound, LoraSketch
from lead_fast.loading import load_model, load_tokenizer
from lead_fast.lora import add_lora
from lead_fast.models import PackedModel, trained_parameters
from lead_fast.offline.pretrain import pretrained_model
from lead_fast.optimization import evaluate
from lead_fast.packing import ChatEncoder, PackedBatch, Sample, fill, pack

RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")
EXACT, KS = 10**6, (1, 2, 4, 8, 16)
RANK, LEARNING_RATE, STEP_TOKENS, MAX_LENGTH = 16, 1e-3, 2048, 256
ROUNDS, STEPS = 8, 4
WARM_ROUNDS = 2  # left out: B starts at 0, and so does the gradient of A


def start(size: str, seed: int) -> tuple[PackedModel, list[Sample]]:
    """A pretrained model with fresh LoRA adapters, and the samples of its rounds."""
    config = PrepareConfig(model_config=size, max_length=MAX_LENGTH, pretrain_epochs=2.0)
    text = demo_rows(3000, seed=1, noisy=0.0, duplicates=0.0, hard=0.15)
    folder = pretrained_model([row["messages"] for row in text], config, seed=0)
    model = load_model(folder, dtype=torch.float32, device=CPU)
    encoder = ChatEncoder(load_tokenizer(folder), MAX_LENGTH)
    samples = list(encoder.encode([row["messages"] for row in demo_rows(4000, seed=2 + seed)]))
    return PackedModel(add_lora(model, rank=RANK, alpha=float(RANK), seed=seed)), samples


def rounds_of(samples: list[Sample]) -> list[list[PackedBatch]]:
    """Rounds of `STEPS` optimizer steps of at most `STEP_TOKENS`; rows number the samples."""
    steps = [pack([samples[i] for i in run], run) for run in fill([len(s) for s in samples], STEP_TOKENS)]
    return [steps[at : at + STEPS] for at in range(0, ROUNDS * STEPS, STEPS)]


def accuracy(size: str, seeds: range) -> list[dict[str, Any]]:
    """Each estimator's error, averaged over rounds and seeds."""
    found: dict[str, list[dict[str, float]]] = {}
    for seed in tqdm(seeds, desc=f"accuracy, {size}"):
        model, samples = start(size, seed)
        optimizer = torch.optim.AdamW([p for _, p in trained_parameters(model)], lr=LEARNING_RATE, weight_decay=0.0)
        sketches = {k: LoraSketch(model, k=k, seed=seed) for k in (*KS, EXACT)}
        for number, batches in enumerate(rounds_of(samples)):
            orders = {k: FirstOrderRound(sketch) for k, sketch in sketches.items()}
            loss, proxy = [], []
            for batch in batches:
                with ExitStack() as stack:
                    taken = {k: stack.enter_context(sketch.collect(batch.cu_seqlens)) for k, sketch in sketches.items()}
                    out = model(batch)
                    out.loss.backward()
                assert out.samples is not None
                for k, order in orders.items():
                    order.add(batch.rows, taken[k], out.samples.num_tokens, 1.0 / batch.num_items)
                    order.step()
                loss.append(out.samples.loss)
                proxy.append(out.samples.grad_norm_sq / out.samples.num_tokens / batch.num_items)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if number < WARM_ROUNDS:
                continue
            rows = torch.cat([batch.rows for batch in batches]).tolist()
            after = evaluate(model, [samples[row] for row in rows], pack_tokens=4096, device=CPU, desc="truth")
            truth = after - torch.cat(loss)
            predicted = {k: order.loss_changes()[1] for k, order in orders.items()}
            for k, change in predicted.items():
                found.setdefault(str(k), []).append(errors(change, truth, predicted[EXACT]))
            grad_norm = torch.cat(proxy)
            # The best constant in hindsight: better than any online calibration could do.
            grad_norm = grad_norm * (grad_norm @ truth) / (grad_norm @ grad_norm)
            found.setdefault("grad_norm", []).append(errors(grad_norm, truth, predicted[EXACT]))
            found.setdefault("none", []).append(errors(torch.zeros_like(truth), truth, predicted[EXACT]))
        numbers = {str(k): sketch.num_numbers for k, sketch in sketches.items()}
    return [
        {"model": size, "estimator": name, "numbers": numbers.get(name), "rounds": len(each)}
        | {key: float(np.mean([e[key] for e in each])) for key in each[0]}
        for name, each in found.items()
    ]


def errors(change: Tensor, truth: Tensor, exact: Tensor) -> dict[str, float]:
    constant = bool((change == change[0]).all())
    return {
        "mae": float((change - truth).abs().mean()),
        "bias": float((change - truth).mean()),
        "spearman": 0.0 if constant else float(spearmanr(change, truth).statistic),
        "spearman_exact": 0.0 if constant else float(spearmanr(change, exact).statistic),
        "true_change": float(truth.abs().mean()),
    }


def cost(size: str, repeats: int) -> list[dict[str, Any]]:
    """Milliseconds of an optimizer step in a whole round, with its snapshots and final products; interleaved."""
    model, samples = start(size, 0)
    batches = rounds_of(samples)[0]
    optimizer = torch.optim.AdamW([p for _, p in trained_parameters(model)], lr=1e-6)

    def plain() -> None:
        for batch in batches:
            model(batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def sketched(k: int) -> Any:
        sketch = LoraSketch(model, k=k)

        def round_() -> None:
            order = FirstOrderRound(sketch, torch.bfloat16)
            for batch in batches:
                with sketch.collect(batch.cu_seqlens) as taken:
                    out = model(batch)
                    out.loss.backward()
                order.add(batch.rows, taken, out.samples.num_tokens, 1.0 / batch.num_items)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                order.step()
            order.loss_changes()

        return lambda: round_

    contenders: dict[str, Any] = {"without": lambda: plain} | {str(k): sketched(k) for k in KS}
    measured = interleave(contenders, repeats)
    tokens = float(np.mean([batch.num_tokens for batch in batches]))
    return [
        {
            "model": size,
            "k": name,
            "step_ms": each.median_ms / STEPS,
            "ratio": each.ratio_to(measured["without"]),
            "tokens": tokens,
            "samples": float(np.mean([len(batch) for batch in batches])),
        }
        for name, each in measured.items()
    ]


PAGE = """# The estimator `first_order` (experimental): accuracy beside cost

Written by `PYTHONPATH=. python benchmarks/first_order.py`. Machine: {machine}. No GPU was there: its cost on one is unknown.

Llamas of `--model-config` tiny and small, pretrained on generated text; LoRA of rank {rank} on all seven projections, AdamW
at {lr}, rounds of {steps} steps of at most {tokens} tokens on the demo's pool; rounds {first} to {rounds}, {seeds} seeds.
Truth: a forward pass over the round's samples after it, L(end) - L(seen). *exact* is first order without projections; otherwise
k rows of random signs. `grad_norm` here is G_i / (n_i n_step) with the best constant in hindsight.

## Accuracy

MAE and bias in nats of dL (mean |dL| in the last column); Spearman of dL with the truth, and with first order unsketched.

{accuracy}

## Cost

An optimizer step (forward, fused loss with all statistics, backward, AdamW) with everything that `first_order` adds: hooks,
sketches, one snapshot a step, the round's final products. Interleaved; the ratio is the median of ratios within a round.

{cost}
"""


def page(result: dict[str, Any]) -> str:
    """The results page, in Markdown."""
    names = {"none": "none", "grad_norm": "grad_norm", str(EXACT): "first_order, exact"}
    order = ["none", "grad_norm", *(str(k) for k in KS), str(EXACT)]
    rows = [
        [
            row["model"], names.get(row["estimator"], f"first_order, k = {row['estimator']}"),
            "" if row["numbers"] is None else f"{row['numbers']:,}", f"{row['mae']:.4f}", f"{row['bias']:+.4f}",
            f"{row['spearman']:.2f}", f"{row['spearman_exact']:.2f}", f"{row['true_change']:.4f}",
        ]
        for row in sorted(result["accuracy"], key=lambda row: (row["model"] != "tiny", order.index(row["estimator"])))
    ]  # fmt: skip
    costs = [
        [row["model"], row["k"], f"{row['tokens']:.0f}, {row['samples']:.0f}", f"{row['step_ms']:.0f}", f"{row['ratio']:.3f}"]
        for row in result["cost"]
    ]
    return PAGE.format(
        machine=", ".join(f"{key} {value}" for key, value in result["machine"].items()),
        rank=RANK, lr=LEARNING_RATE, steps=STEPS, tokens=STEP_TOKENS, first=WARM_ROUNDS + 1, rounds=ROUNDS,
        seeds=result["seeds"],
        accuracy=table(
            ["model", "estimator", "numbers a sample", "MAE", "bias", "Spearman, truth", "Spearman, exact", "mean abs. dL"],
            rows,
        ),
        cost=table(["model", "k", "tokens, samples a step", "ms a step", "x without"], costs),
    )  # fmt: skip


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--sizes", nargs="+", default=["tiny", "small"])
    args = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "seeds": args.seeds}
    result["accuracy"] = [row for size in args.sizes for row in accuracy(size, range(args.seeds))]
    result["cost"] = [row for size in args.sizes for row in cost(size, args.repeats)]
    (args.out / "first_order.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (args.out / "first_order.md").write_text(page(result), encoding="utf-8")


if __name__ == "__main__":
    main()
