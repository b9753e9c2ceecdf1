"""What an optimizer step of the estimation's price is made of: seconds with all statistics and without, memory, kernels.

    python benchmarks/profile_step.py [--device cuda] [--model 8b] [--liger | --compile] [--tokens 2048 4096 8192]

Steps with statistics and without alternate; the seconds are means of the last seven of nine. The kernels are those of one
step by torch's profiler: on a GPU its own time, beside which the seconds of a step that waits for the host are longer.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import Any

import test_estimation_price as price
import torch
from torch.profiler import ProfilerActivity, profile

from lead_fast.packing import PackedBatch

ROWS, STEPS, WARM = 96, 9, 2


def steps_of(sample: Any, train: Any, tokens: int) -> list[list[PackedBatch]]:
    rows = list(range(ROWS))
    return price.step_batches([sample(row) for row in rows], rows, dataclasses.replace(train, step_tokens=tokens))


def kernels(optimization: Any, batches: list[PackedBatch], device: str) -> list[str]:
    """Lines of the longest kernels (operators on a CPU) of one step with all statistics: milliseconds, calls, name."""
    kind = "CUDA" if device == "cuda" else "CPU"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as found:
        optimization.step(batches, 1e-5, lambda *_: None)
        if device == "cuda":
            torch.cuda.synchronize()
    events = [
        (e.self_device_time_total if device == "cuda" else e.self_cpu_time_total, e.count, e.key)
        for e in found.key_averages()
        if e.device_type.name == kind
    ]
    events = sorted((e for e in events if e[0] > 0), reverse=True)
    lines = [f"{kind} {sum(e[0] for e in events) / 1e3:.1f} ms, {sum(e[1] for e in events)} launches"]
    return lines + [f"{us / 1e3:9.3f} ms {count:6d} {name[:150]}" for us, count, name in events[:32]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=tuple(price.SHAPES), help="default: small on the CPU, 8b on a GPU")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192], help="of a step, at most")
    parser.add_argument("--liger", action="store_true")
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    model = arguments.model or ("8b" if arguments.device == "cuda" else "small")
    options = {"liger": arguments.liger, "compile": arguments.compile}
    _, optimization, train, sample = price.make(price.Setting(model, device=arguments.device), **options)
    timed = price.Timed(arguments.device)
    for tokens in arguments.tokens:
        batches = steps_of(sample, train, tokens)
        seconds: dict[str, list[float]] = {"all statistics": [], "none": []}
        begun = time.perf_counter()
        for number in range(STEPS):
            chosen, names = batches[number % 2 % len(batches)], list(seconds)
            for name in names if number % 2 else names[::-1]:
                observe = None if name == "none" else lambda *_: None
                seconds[name].append(timed(lambda c=chosen, o=observe: optimization.step(c, 1e-5, o))[0])
        count = sum(b.num_tokens for number in range(WARM, STEPS) for b in batches[number % 2 % len(batches)]) / (STEPS - WARM)
        means = {name: sum(values[WARM:]) / (STEPS - WARM) for name, values in seconds.items()}
        text = "; ".join(f"{name} {mean:.4f} s, {count / mean:,.0f} tokens/s" for name, mean in means.items())
        peak = f"; peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if arguments.device == "cuda" else ""
        print(f"{model}, at most {tokens} tokens, {count:.0f} of them: {text}{peak} ({time.perf_counter() - begun:.0f} s)")
        print(*kernels(optimization, batches[0], arguments.device), "", sep="\n", flush=True)


if __name__ == "__main__":
    main()
