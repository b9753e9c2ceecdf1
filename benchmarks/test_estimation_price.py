"""What LEAD costs a training step: the same replayed schedule of samples with the estimation on and off.

    pytest benchmarks/test_estimation_price.py                           a few pairs of a tiny model
    python benchmarks/test_estimation_price.py [--device cuda] [--add]   500 pairs and more: Markdown and JSON

On: the loss returns all statistics, `observe`, `step`, and each round's `begin_round` and `end_round` (its report read)
spread evenly over the round's steps. Off: the same micro-batches through the same optimizer step with `stats=None`. The two
alternate step by step, each pair's order by turns, so that a busy machine slows both alike. The price is the median over
pairs of on / off - 1; its upper bound is the 95% bound of a bootstrap over pairs. The parts are timed in the same run.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interleaved import machine
from transformers import AutoConfig, AutoModelForCausalLM

import lead_fast as lf
from lead_fast.config import TrainConfig
from lead_fast.loading import MODEL_SIZES, prepare_model
from lead_fast.lora import add_lora
from lead_fast.optimization import Optimization, make_accelerator, step_batches
from lead_fast.packing import PackedBatch, Sample

LLAMA_8B = dict(vocab_size=128256, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
                intermediate_size=14336)  # fmt: skip
# Of its step the estimation costs two and a half times the share that it costs of a whole one: for short measurements.
LLAMA_8B_12 = {**LLAMA_8B, "num_hidden_layers": 12}
SHAPES: dict[str, dict[str, int]] = {**MODEL_SIZES, "8b": LLAMA_8B, "8b-12": LLAMA_8B_12}
BOOTSTRAPS = 10_000


@dataclass(frozen=True)
class Setting:
    """A model, how it is tuned, and the schedule it is trained on: a pool of `num_rows`, lengths as of real answers."""

    model: str = "small"
    tuning: str = "lora"
    step_tokens: int = 2048
    num_rows: int = 25_000
    round_rows: int = 64
    accumulation: int = 1
    device: str = "cpu"


def make_samples(num_rows: int, vocab: int) -> Callable[[int], Sample]:
    """Sample of a row: log-normal lengths, mean about 200 tokens, the last 60% supervised."""

    def sample(row: int) -> Sample:
        g = np.random.default_rng([row, 7])
        length = int(np.clip(g.lognormal(5.1, 0.6), 16, 1024))
        supervised = np.arange(length) >= 0.4 * length
        return Sample(g.integers(3, vocab, length), supervised, supervised)

    return sample


@dataclass
class Pairs:
    """Seconds of each step with LEAD and without, and of LEAD's parts."""

    on: list[float] = field(default_factory=list)
    off: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(
        default_factory=lambda: {"observe": [], "step": [], "begin_round": [], "end_round": []}
    )

    @property
    def ratio(self) -> np.ndarray:
        return np.array(self.on) / np.array(self.off)

    def price(self) -> tuple[float, float, float]:
        """Median of on / off - 1 and its 95% bootstrap bounds."""
        ratio = self.ratio
        draws = np.random.default_rng(0).integers(0, len(ratio), (BOOTSTRAPS, len(ratio)))
        medians = np.median(ratio[draws], axis=1)
        low, high = np.quantile(medians, [0.025, 0.95])
        return float(np.median(ratio)) - 1.0, float(low) - 1.0, float(high) - 1.0


class Timed:
    """Wall-clock seconds of a call, the device's work included."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def __call__(self, function: Callable[[], Any]) -> tuple[float, Any]:
        if self.cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = function()
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start, result


def make(setting: Setting, **options: Any) -> tuple[lf.LeadEngine, Optimization, TrainConfig, Callable[[int], Sample]]:
    shape = SHAPES[setting.model]
    dtype = torch.bfloat16 if setting.device == "cuda" else torch.float32
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", **shape, max_position_embeddings=2048, tie_word_embeddings=setting.model in MODEL_SIZES
    )
    with torch.device(setting.device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = prepare_model(model)
    if setting.tuning == "lora":
        model = add_lora(model, rank=64, alpha=16.0, seed=0)
    train = TrainConfig(
        step_tokens=setting.step_tokens, accumulation=setting.accumulation, tuning=setting.tuning, precision="auto",
        learning_rate=1e-5, **options,
    )  # fmt: skip
    g = np.random.default_rng(0)
    pool = lf.Pool.from_arrays(
        arm=g.integers(0, 7, setting.num_rows), task=g.integers(0, 8, setting.num_rows),
        utility=g.gamma(4.0, 0.5, setting.num_rows),
    )  # fmt: skip
    accelerator = make_accelerator(train)
    rounds = max(1, setting.num_rows // setting.round_rows)
    lead = lf.LeadConfig(budget=1.0, min_rounds=rounds, rate=1.0, max_uses=255)
    engine = lf.LeadEngine(pool, lead, accelerator.device)
    engine.record_visits = True  # as `lead-fast train` does, for its warnings
    return engine, Optimization(model, accelerator, train), train, make_samples(setting.num_rows, shape["vocab_size"])


def run(setting: Setting, num_pairs: int, pairs: Pairs | None = None) -> Iterator[Pairs]:
    """Trains through rounds until `num_pairs` steps were timed both ways, after one round that warms up.

    Args:
        setting: what is trained.
        num_pairs: in all.
        pairs: of an earlier run, which this one adds to.

    Yields:
        The pairs so far, after each round.
    """
    pairs = Pairs() if pairs is None else pairs
    if len(pairs.on) >= num_pairs:
        yield pairs
        return
    engine, optimization, train, sample = make(setting)
    timed = Timed(setting.device)
    warm = False
    while len(pairs.on) < num_pairs:
        begin, rnd = timed(engine.begin_round)
        assert rnd is not None
        rows = rnd.rows.tolist()
        steps = step_batches([sample(row) for row in rows], rows, train)
        on, off, observed, stepped = [], [], [], []
        for number, batches in enumerate(steps):
            order = (True, False) if number % 2 else (False, True)
            for lead in order:
                if lead:
                    seconds, watched = with_lead(engine, optimization, batches, timed)
                    on.append(seconds)
                    observed.append(watched[0])
                    stepped.append(watched[1])
                else:
                    off.append(timed(lambda batches=batches: optimization.step(batches, 1e-5))[0])
        end, _ = timed(lambda: (report := engine.end_round()) and (report.reward, report.calibration, report.visits))
        if not warm:
            warm = True
            continue
        spread = (begin + end) / len(steps)
        pairs.on += [seconds + spread for seconds in on]
        pairs.off += off
        for name, values in (("observe", observed), ("step", stepped)):
            pairs.parts[name] += values
        pairs.parts["begin_round"] += [begin / len(steps)] * len(steps)
        pairs.parts["end_round"] += [end / len(steps)] * len(steps)
        yield pairs


def with_lead(
    engine: lf.LeadEngine, optimization: Optimization, batches: list[PackedBatch], timed: Timed
) -> tuple[float, tuple[float, float]]:
    """Seconds of a step with LEAD; of them those in observe and in step (host time: a GPU's is in the total)."""
    watched = [0.0, 0.0]

    def observe(rows: torch.Tensor, samples: lf.SampleStats) -> None:
        start = time.perf_counter()
        engine.observe(rows, samples)
        watched[0] += time.perf_counter() - start

    def whole() -> None:
        result = optimization.step(batches, 1e-5, observe)
        start = time.perf_counter()
        engine.step(lr=1e-5, num_items=result.num_items)
        watched[1] += time.perf_counter() - start

    return timed(whole)[0], (watched[0], watched[1])


def test_the_price_of_a_few_steps(benchmark: Any) -> None:
    setting = Setting(model="tiny", step_tokens=512, num_rows=500, round_rows=8)
    pairs = benchmark.pedantic(lambda: list(run(setting, 6))[-1], rounds=1)
    more = list(run(setting, len(pairs.on) + 1, copy.deepcopy(pairs)))[-1]
    assert len(more.on) > len(pairs.on) and more.on[: len(pairs.on)] == pairs.on
    assert len(pairs.on) == len(pairs.off) >= 6
    price, low, high = pairs.price()
    assert low <= price <= high
    benchmark.extra_info["price"] = price


def test_a_profile_of_a_step_names_its_parts(monkeypatch: Any, capsys: Any) -> None:
    import profile_step

    monkeypatch.setattr("sys.argv", ["profile_step.py", "--model", "tiny", "--tokens", "512"])
    profile_step.main()
    out = capsys.readouterr().out
    assert "tiny, at most 512 tokens" in out and "aten::mm" in out and "_LoraLinearBackward" in out


@pytest.mark.parametrize("true", [0.0, 0.05])
def test_the_bound_holds_a_planted_price(true: float) -> None:
    g = np.random.default_rng(1)
    off = g.lognormal(0.0, 0.2, 600)
    price, low, high = Pairs(list(off * (1 + true) * g.normal(1, 0.05, 600)), list(off)).price()
    assert low < true < high and high - low < 0.02 and abs(price - true) < 0.01


def table(setting: Setting, pairs: Pairs) -> list[str]:
    price, low, high = pairs.price()
    off = float(np.median(pairs.off))
    tuning = "LoRA, rank 64" if setting.tuning == "lora" else "all weights"
    layers = SHAPES[setting.model]["num_hidden_layers"]
    lines = [
        f"### {setting.model} Llama, {layers} layers, {tuning}, {setting.step_tokens} tokens a step in "
        f"{setting.accumulation} micro-batches, {setting.round_rows} rows a round",
        "",
        f"Price of the estimation: **{price:+.2%}** of a step, 95% bootstrap bounds {low:+.2%} (2.5%) and {high:+.2%} (95%), "
        f"{len(pairs.on)} pairs; median step without LEAD {1e3 * off:.1f} ms.",
        "",
        "| part | median a step | of the step |",
        "|---|---|---|",
    ]
    for name, values in pairs.parts.items():
        seconds = float(np.median(values))
        lines.append(f"| {name} | {1e6 * seconds:.0f} µs | {seconds / off:.3%} |")
    return [*lines, ""]


def measure(folder: Path, settings: list[Setting], num_pairs: int, device: str, *, add: bool) -> None:
    """Measures each setting, and writes the results so far after every round: a run that is cut loses one."""
    before = earlier(folder / f"estimation_price_{device}.json") if add else {}
    measured: dict[Setting, Pairs] = {}
    for setting in settings:
        for pairs in run(setting, num_pairs, before.get(setting)):
            measured[setting] = pairs
            write(folder, list(measured.items()), num_pairs, device)
    print((folder / f"estimation_price_{device}.md").read_text())


def earlier(path: Path) -> dict[Setting, Pairs]:
    """The pairs of a results file by setting."""
    names = [f.name for f in fields(Setting)]
    return {
        Setting(**{name: s[name] for name in names}): Pairs(s["on"], s["off"], s["parts"])
        for s in json.loads(path.read_text())["settings"]
    }


def write(folder: Path, measured: list[tuple[Setting, Pairs]], num_pairs: int, device: str) -> None:
    place = machine()
    lines = [
        f"# The estimation's price in a training step on {'a GPU' if device == 'cuda' else 'the CPU'}",
        "",
        (__doc__ or "").split("\n\n")[2].replace("\n", " "),
        f"Written by `python benchmarks/test_estimation_price.py --device {device} --pairs {num_pairs} "
        f"--step-tokens {measured[0][0].step_tokens}`.",
        "",
        "Machine: " + ", ".join(f"{key} {value}" for key, value in place.items()) + ".",
        "",
    ]
    for setting, pairs in measured:
        lines += table(setting, pairs)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"estimation_price_{device}.md").write_text("\n".join(lines))
    record = [{**vars(s), "price": p.price(), "on": p.on, "off": p.off, "parts": p.parts} for s, p in measured]
    (folder / f"estimation_price_{device}.json").write_text(json.dumps({"machine": place, "settings": record}) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=tuple(SHAPES), help="default: small on the CPU, 8b on a GPU")
    parser.add_argument("--tuning", choices=("lora", "full"), nargs="+", default=["lora"])
    parser.add_argument("--step-tokens", type=int, help="default: 2048 on the CPU, 8192 on a GPU")
    parser.add_argument("--accumulation", type=int, help="micro-batches a step: 1 on the CPU, 2 on a GPU, to fit 80 GB")
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--add", action="store_true", help="go on from the pairs in the results, up to --pairs in all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    name, tokens = arguments.model or ("8b" if on_gpu else "small"), arguments.step_tokens or (8192 if on_gpu else 2048)
    parts = arguments.accumulation or (2 if on_gpu else 1)
    chosen = [Setting(name, t, tokens, accumulation=parts, device=arguments.device) for t in arguments.tuning]
    measure(arguments.out, chosen, arguments.pairs, arguments.device, add=arguments.add)
