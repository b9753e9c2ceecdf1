"""Tokens per second and peak memory of training loops on one and the same schedule of samples.

    pytest benchmarks/train                                     one contender a test, on a tiny model
    python benchmarks/train/test_train.py [--device cuda]       interleaved, with memory: writes Markdown and JSON

LEAD chooses the schedule once (schedule.py); this package's loop with LEAD on and off, transformers' Trainer with and
without Liger, TRL's SFTTrainer and a loop in the published style replay it (contenders.py says what each is and what its
time covers). Losses must agree between all of them, round by round, or the setting is not written. A peer that cannot
run is named with its reason. Tokens are those of the samples: padding does not count.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

sys.path.append(str(Path(__file__).resolve().parents[1]))  # run as a script, the benchmarks' shared modules are elsewhere

from contenders import CONTENDERS, LEAD_OFF, LEAD_ON, PUBLISHED
from interleaved import CannotRunError, machine
from measure import PUBLISHED_STEPS, Measurement, Result, check_losses, measure, measure_memory, memory_of
from schedule import MODELS, TASKS_PER_ARM, Schedule, Setting, build, make_schedule, twin

TINY = Setting("tiny", step_tokens=512, num_rows=120, round_rows=6, num_rounds=2)
CPU = (
    Setting("small", step_tokens=2048, round_rows=16, num_rounds=10),
    Setting("vocabulary", step_tokens=1024, round_rows=8, num_rounds=5),
)
# What backward keeps of 32 layers for 8,192 tokens at once would not fit a card of 80 GB; padded, 2,048 nearly fill it.
CUDA = Setting("8b", 8192, accumulation=4, round_rows=128, num_rounds=6, learning_rate=1e-4, half=True, device="cuda")


def tolerance(setting: Setting) -> float:
    """Of the relative difference between two contenders' losses of a round."""
    return 0.02 if setting.half else 1e-4


@pytest.fixture(autouse=True)
def _accelerate_forgets() -> Iterator[None]:
    """accelerate keeps one precision a process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module", params=["fp32", "as on a GPU"])
def tiny(request: Any) -> tuple[Schedule, Any]:
    setting = TINY if request.param == "fp32" else replace(TINY, half=True, accumulation=2, step_tokens=1024)
    model = build(setting)
    return make_schedule(setting, model), model


@pytest.mark.parametrize("name", CONTENDERS)
def test_every_contender_trains_on_the_schedule(benchmark: Any, tiny: tuple[Schedule, Any], name: str) -> None:
    schedule, model = tiny
    try:
        contender = CONTENDERS[name](schedule, twin(model))
    except CannotRunError as reason:
        pytest.skip(str(reason))
    trained, rounds = [], iter(schedule.rounds)
    benchmark.pedantic(
        lambda rnd: trained.append(contender.train(rnd)), setup=lambda: ((next(rounds),), {}), rounds=len(schedule.rounds)
    )
    assert [t.loss for t in trained] == pytest.approx(schedule.losses[: len(trained)], rel=tolerance(schedule.setting))
    assert schedule.losses[-1] < schedule.losses[0]
    benchmark.extra_info["tokens per second"] = schedule.rounds[-1].num_tokens / trained[-1].seconds


def test_the_files_and_what_they_say(tmp_path: Path) -> None:
    (found,) = write(tmp_path, [TINY], memory=False)
    assert found.agreed == len(found.schedule.rounds)  # the replaying engine is as honest as the one that chose
    text = (tmp_path / "train_cpu.md").read_text()
    assert all(f"| {name} |" in text for name in (*CONTENDERS, PUBLISHED_STEPS))
    record = json.loads((tmp_path / "train_cpu.json").read_text())["settings"][0]
    assert {len(r["times_ms"]) for r in record["results"] if r["refused"] is None} == {TINY.num_rounds}


def test_a_contender_off_the_schedule_is_caught(tiny: tuple[Schedule, Any]) -> None:
    schedule, model = tiny
    found = measure(schedule, model, (LEAD_ON, LEAD_OFF), watch=True)
    found.results[LEAD_OFF].losses[1] *= 1.05
    with pytest.raises(RuntimeError, match="LEAD off"):
        check_losses(found, tolerance(schedule.setting))


def test_memory_is_measured(tiny: tuple[Schedule, Any]) -> None:
    assert memory_of(LEAD_ON, tiny[0], torch.get_num_threads()) > 0.0


def row_of(result: Result, ours: Result) -> str:
    if result.refused is not None:
        return f"| {result.name} | does not run: {result.refused} | | | | |"
    low, median, high = np.quantile(result.tokens_per_second, [0.25, 0.5, 0.75])
    memory = f"{result.peak_mib:,.0f}" if result.peak_mib else ""
    return (
        f"| {result.name} | {median:,.0f} | {low:,.0f} to {high:,.0f} | {result.ratio_to(ours):.2f} | {memory} | "
        f"{result.losses[-1]:.5f} |"
    )


def section(found: Measurement) -> list[str]:
    setting, schedule, results = found.schedule.setting, found.schedule, found.results
    shape, timed = MODELS[setting.model], schedule.rounds[1:]
    rows = [row for rnd in schedule.rounds for row in rnd.rows]
    share = np.concatenate([schedule.samples[row].supervised for row in rows]).mean()
    length = np.mean([len(schedule.samples[row]) for row in rows])
    steps, tokens = sum(len(rnd.steps) for rnd in timed), sum(rnd.num_tokens for rnd in timed)
    padded = sum(len(m) * max(len(schedule.samples[row]) for row in m) for rnd in timed for step in rnd.steps for m in step)
    ours, (price, low, high), peer = results[LEAD_ON], found.price(), found.best_peer()
    micro = "" if setting.accumulation == 1 else f" in {setting.accumulation} micro-batches"
    lines = [
        f"### {setting.model}: {shape['num_hidden_layers']} layers of {shape['hidden_size']}, vocabulary "
        f"{shape['vocab_size']:,}",
        "",
        f"LoRA of rank {setting.lora_rank}, {str(setting.dtype).removeprefix('torch.')}; {len(timed)} timed rounds of "
        f"{setting.round_rows} rows at most, {steps} optimizer steps of at most {setting.step_tokens:,} tokens{micro}; "
        f"{tokens:,} tokens, {padded / tokens:.2f} times as many once padded. Samples of {length:.0f} tokens on average, "
        f"{share:.0%} supervised, from {'a generated pool' if setting.pool is None else Path(setting.pool).name} of "
        f"{len(schedule.samples):,} rows. Peers' attention: {setting.attention}.",
        "",
        "| | tokens/s | quartiles | LEAD on is faster by | peak MiB | loss, last round |",
        "|---|---|---|---|---|---|",
        *(row_of(result, ours) for result in results.values()),
        "",
        f"- Losses agree in every round within {check_losses(found, tolerance(setting)):.1g} (relative); the replaying "
        f"engine chose the scheduled rows by itself in {found.agreed} of {len(schedule.rounds)} rounds.",
        f"- LEAD on against off: {price:+.2%} a round, 95% bootstrap bounds {low:+.2%} (2.5%) and {high:+.2%} (95%) over "
        f"{len(timed)} rounds; test_estimation_price.py measures it on hundreds of pairs.",
        f"- The fastest peer is {peer.name}: LEAD on has {peer.ratio_to(ours):.2f} times its tokens per second.",
    ]
    if PUBLISHED in found.ran:
        whole, alone = results[PUBLISHED], results[PUBLISHED_STEPS]
        lines.append(
            f"- LEAD on has {whole.ratio_to(ours):.2f} times the tokens per second of the published style, "
            f"{alone.ratio_to(ours):.2f} times those of its steps alone, without its copy of the model and its "
            f"{TASKS_PER_ARM} filters a round. A round is {len(rows) / len(schedule.rounds) / len(schedule.samples):.1%} of "
            "the pool here, 0.2% in the published settings: there its filters cost more."
        )
    return [*lines, ""]


def publish(folder: Path, device: str, measured: list[Measurement], command: str) -> None:
    place = machine()
    lines = [
        f"# Training loops on {'a GPU' if device == 'cuda' else 'the CPU'}",
        "",
        "One schedule of samples, chosen by LEAD and replayed by every loop: the same samples in the same optimizer steps, "
        "the same LoRA, AdamW and precision. Interleaved by round; a ratio is the median over rounds of the ratio within the "
        "round. Tokens are those of the samples, without padding. Peak memory is what a round needs beyond model and "
        "optimizer. What each loop is and what its time covers: [contenders.py](../train/contenders.py).",
        f"Written by `{command}`.",
        "",
        "Machine: " + ", ".join(f"{key} {value}" for key, value in place.items()) + ".",
        "",
        *(line for found in measured for line in section(found)),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"train_{device}.md").write_text("\n".join(lines))
    record = [
        {
            **asdict(found.schedule.setting),
            "round_tokens": [rnd.num_tokens for rnd in found.schedule.rounds],
            "schedule_losses": found.schedule.losses,
            "price": found.price(),
            "rounds_chosen_alike": found.agreed,
            "results": [asdict(result) for result in found.results.values()],
        }
        for found in measured
    ]
    (folder / f"train_{device}.json").write_text(json.dumps({"machine": place, "settings": record}, indent=1) + "\n")


def write(
    folder: Path,
    settings: list[Setting],
    command: str = "pytest benchmarks/train",
    *,
    memory: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> list[Measurement]:
    """Measures setting by setting; the files are whole after each, so that a run cut short leaves what it has.

    Raises:
        RuntimeError: contenders' losses differ.
    """
    measured: list[Measurement] = []
    for setting in settings:
        say(f"{setting.model}: making the schedule")
        model = build(setting)
        found = measure(make_schedule(setting, model), model, watch=setting.device == "cuda", say=say)
        check_losses(found, tolerance(setting))
        if memory and setting.device == "cpu":
            measure_memory(found, say)
        measured.append(found)
        publish(folder, setting.device, measured, command)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--model", choices=tuple(MODELS), nargs="+", help="default: small and vocabulary on the CPU, 8b on a GPU"
    )
    parser.add_argument("--pool", help="any pool that lead-fast reads; default: a generated one")
    for name in ("rounds", "round-rows", "num-rows", "step-tokens", "accumulation"):
        parser.add_argument(f"--{name}", type=int, help="in place of each setting's own")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "results")
    arguments = parser.parse_args()
    if (arguments.device == "cuda") != torch.cuda.is_available():
        parser.error(f"--device {arguments.device}: torch sees {'a' if torch.cuda.is_available() else 'no'} CUDA device")
    known = {setting.model: setting for setting in ((CUDA,) if arguments.device == "cuda" else CPU)}
    changes = {
        "num_rounds": arguments.rounds, "round_rows": arguments.round_rows, "num_rows": arguments.num_rows,
        "step_tokens": arguments.step_tokens, "accumulation": arguments.accumulation, "pool": arguments.pool,
        "device": arguments.device,
    }  # fmt: skip
    changes = {name: value for name, value in changes.items() if value is not None}
    other = Setting(half=arguments.device == "cuda")
    settings = [replace(known.get(model, other), model=model, **changes) for model in arguments.model or known]
    given = [
        f"--{name.replace('_', '-')} {value}"
        for name, value in vars(arguments).items()
        if value is not None and name not in ("model", "out")
    ]
    given += [f"--model {' '.join(arguments.model)}"] if arguments.model else []
    warnings.simplefilter("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    start = time.monotonic()
    command = "python benchmarks/train/test_train.py " + " ".join(given)
    write(arguments.out, settings, command, say=lambda what: print(f"{time.monotonic() - start:6.0f} s  {what}", flush=True))
    print((arguments.out / f"train_{arguments.device}.md").read_text())


if __name__ == "__main__":
    main()
