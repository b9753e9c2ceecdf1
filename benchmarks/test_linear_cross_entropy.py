"""`linear_cross_entropy` against its peers and against the bare matrix products, forward + backward.

    pytest benchmarks                                             one contender a test, by pytest-benchmark
    python benchmarks/test_linear_cross_entropy.py [--device cuda] interleaved, with memory: writes Markdown and JSON

Peers are imported, never rewritten; PYTHONPATH may name a folder that holds them. A peer that cannot run is named with
its reason. The floor is two (frozen head) or three products by torch.mm into memory that is there already: 2 T H V
flops and at least 4 (T H + V H + T V) bytes each in fp32. Nothing else is in it: no softmax, no page faults.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from interleaved import Call, CannotRunError, Measured, interleave, machine

from lead_fast.ops import linear_cross_entropy

OURS = "lead-fast"
PLAIN = "plain PyTorch"
FLOOR = "bare products (torch.mm)"


@dataclass(frozen=True)
class Case:
    """One problem: T tokens in samples of `sample` tokens, H hidden, V vocabulary."""

    tokens: int
    hidden: int
    vocab: int
    dtype: torch.dtype = torch.float32
    trained: bool = False
    ignored: float = 0.0
    peaked: bool = False  # hidden states near the label's row of the head: p_y as of a trained model
    sample: int = 512
    device: str = "cpu"
    model: bool = False  # hidden states, head and labels of a small model that was trained on text

    def __str__(self) -> str:
        parts = [
            f"({self.tokens}, {self.hidden}, {self.vocab})",
            str(self.dtype).removeprefix("torch."),
            "trained head" if self.trained else "frozen head",
        ]
        parts += [f"{self.ignored:.0%} ignored"] * (self.ignored > 0) + ["peaked"] * self.peaked
        parts += ["a model's hidden states"] * self.model
        return ", ".join(parts)


MAIN = Case(2048, 576, 49152)
FULL_CASES = [
    MAIN,
    Case(1024, 576, 49152, trained=True),
    Case(1024, 576, 49152, ignored=0.5),
    Case(1024, 576, 49152, trained=True, ignored=0.5),
]
SHORT_CASES = [
    Case(1024, 576, 49152, peaked=True),
    Case(1024, 576, 49152, dtype=torch.bfloat16),
    Case(1024, 576, 49152, dtype=torch.bfloat16, trained=True),
    Case(256, 896, 151936),
    Case(512, 2048, 32000),
    Case(4096, 288, 4096),
]
SAMPLE_TOKENS = (128, 512, 2048, 8192)
_BF16 = {"dtype": torch.bfloat16, "device": "cuda"}
CUDA_MAIN = Case(8192, 4096, 128256, **_BF16)
CUDA_SHAPES = ((8192, 4096, 128256), (8192, 2304, 256000), (8192, 2048, 151936), (16384, 5120, 32000))
CUDA_CASES = [
    Case(*shape, trained=trained, ignored=ignored, **_BF16)
    for shape in CUDA_SHAPES
    for trained in (False, True)
    for ignored in (0.0, 0.5)
]
CUDA_SAMPLE_TOKENS = (128, 512, 2048, 8192)


@cache
def model_states() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Last hidden states [T, H], head [V, H] and labels [T] (prompts ignored) of `--model-config small` after pretraining."""
    from lead_fast.config import PrepareConfig
    from lead_fast.demo_pool import demo_rows
    from lead_fast.loading import load_model, load_tokenizer
    from lead_fast.models import PackedModel, lm_head
    from lead_fast.offline.pretrain import pretrained_model
    from lead_fast.packing import ChatEncoder, pack

    config = PrepareConfig(model_config="small", max_length=256, pretrain_epochs=1.0)
    folder = pretrained_model([row["messages"] for row in demo_rows(2000, seed=1)], config, seed=0)
    encoder = ChatEncoder(load_tokenizer(folder), 256)
    batch = pack(list(encoder.encode([row["messages"] for row in demo_rows(200, seed=2)])))
    model = PackedModel(load_model(folder, dtype=torch.float32, device=torch.device("cpu")))
    with torch.no_grad():
        return model.hidden(batch), lm_head(model.causal_lm).weight.detach(), batch.labels


def model_case(device: str, dtype: torch.dtype) -> Case:
    hidden, weight, _ = model_states()
    return Case(len(hidden), hidden.shape[1], len(weight), dtype=dtype, device=device, model=True)


@lru_cache(maxsize=1)
def tensors(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden [T, H], weight [V, H] and labels [T] of a case on its device, shared by its contenders."""
    generator = torch.Generator(case.device).manual_seed(0)
    place: dict[str, Any] = {"generator": generator, "device": case.device}
    if case.model:
        hidden, weight, labels = (t.to(case.device) for t in model_states())
    else:
        weight = torch.randn(case.vocab, case.hidden, **place) / case.hidden**0.5
        labels = torch.randint(case.vocab, (case.tokens,), **place)
        hidden = torch.randn(case.tokens, case.hidden, **place)
    if case.peaked:
        hidden = hidden + 10 * weight[labels]
    labels = torch.where(torch.rand(case.tokens, **place) < case.ignored, -100, labels)
    return hidden.to(case.dtype), weight.to(case.dtype), labels


class Inputs:
    """A contender's own leaves over a case's tensors; gradients are cleared before each backward, as a training step does."""

    def __init__(self, case: Case) -> None:
        hidden, weight, self.labels = tensors(case)
        self.hidden, self.weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_(case.trained)
        # As the collator knows it: a mask on the device would make the host wait for its count.
        self.token_index = (self.labels != -100).nonzero().flatten() if case.ignored or case.model else None
        self.cu_seqlens = torch.tensor([*range(0, case.tokens, case.sample), case.tokens], device=case.device)

    def backward(self, loss: torch.Tensor) -> None:
        self.hidden.grad = self.weight.grad = None
        loss.backward()


def floor(case: Case) -> Call:
    given = Inputs(case)
    hidden, weight = given.hidden.detach(), given.weight.detach()
    if given.token_index is not None:
        hidden = hidden[given.token_index]  # the products that are needed, as this package runs them
    logits = hidden.new_empty(len(hidden), case.vocab)
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def call() -> None:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=d_hidden)
        if case.trained:
            torch.mm(logits.T, hidden, out=d_weight)

    return call


def onednn_products(case: Case) -> Call:
    """The two products by the other library of torch's CPU builds, 128 rows at a time."""
    if case.trained or case.dtype != torch.float32 or case.device != "cpu" or not torch.backends.mkldnn.is_available():
        raise CannotRunError("fp32 on the CPU with a frozen head only")
    given = Inputs(case)
    hidden, weight, transposed = given.hidden.detach(), given.weight.detach(), given.weight.detach().T
    product = torch.ops.mkldnn._linear_pointwise

    def call() -> None:
        for rows in hidden.split(128):
            product(product(rows, weight, None, "none", [], ""), transposed, None, "none", [], "")

    return call


def ours(case: Case, stats: Any = "all") -> Call:
    given = Inputs(case)
    token_index = given.token_index if case.device == "cuda" else None  # the CPU operator drops ignored tokens itself
    return lambda: given.backward(
        linear_cross_entropy(
            given.hidden, given.weight, given.labels, given.cu_seqlens, token_index=token_index, stats=stats
        ).loss
    )


def _plain_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def plain(case: Case) -> Call:
    given = Inputs(case)
    return lambda: given.backward(_plain_loss(given.hidden, given.weight, given.labels))


def compiled(case: Case) -> Call:
    if case.device == "cuda" and (case.ignored or (case.tokens, case.hidden, case.vocab) != CUDA_SHAPES[0]):
        raise CannotRunError("compiled for the first shape only: it takes longer than all the others run")
    torch._dynamo.reset()  # for this shape alone: after two others dynamo would take a graph for all
    given, loss = Inputs(case), torch.compile(_plain_loss, dynamic=False)
    return lambda: given.backward(loss(given.hidden, given.weight, given.labels))


def torch_chunked(case: Case) -> Call:
    if not hasattr(F, "linear_cross_entropy"):
        raise CannotRunError(f"torch {torch.__version__} does not have it")
    given, options = Inputs(case), torch.nn.LinearCrossEntropyOptions()
    return lambda: given.backward(
        F.linear_cross_entropy(given.hidden, given.weight, given.labels, ignore_index=-100, options=options)
    )


def trl(case: Case) -> Call:
    """TRL's fused head as its trainer calls it: supervised tokens only, mean of the per-token log-probabilities."""
    try:
        from trl.kernels import ChunkedLogProbFunction
    except ImportError as error:
        raise CannotRunError(f"not installed ({error})") from error
    given = Inputs(case)

    def call() -> None:
        kept = given.labels != -100
        hidden, labels = given.hidden[kept], given.labels[kept]
        logprobs = ChunkedLogProbFunction.apply(hidden, given.weight, None, labels, 1.0, 8192, None, 1.0, ())[0]
        given.backward(-logprobs.mean())

    return call


def cce(case: Case) -> Call:
    """Its own kernels on a GPU; `torch_compile` is what it offers elsewhere."""
    try:
        from cut_cross_entropy import linear_cross_entropy as cut_cross_entropy
    except ImportError as error:
        raise CannotRunError(f"not installed ({error})") from error
    given, impl = Inputs(case), "cce" if case.device == "cuda" else "torch_compile"
    return lambda: given.backward(cut_cross_entropy(given.hidden, given.weight, given.labels, impl=impl))


def quack(case: Case) -> Call:
    try:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy
    except ImportError as error:
        raise CannotRunError(f"not installed ({error})") from error
    if case.device != "cuda":
        raise CannotRunError("CuTe kernels only")
    given = Inputs(case)
    return lambda: given.backward(chunked_linear_cross_entropy(given.hidden, given.weight, given.labels))


def liger(case: Case) -> Call:
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as liger_loss
    except ImportError as error:
        raise CannotRunError(f"not installed ({error})") from error
    if case.device != "cuda":
        raise CannotRunError("Triton kernels only")
    given = Inputs(case)
    return lambda: given.backward(liger_loss.apply(given.hidden, given.weight, given.labels)[0])


CONTENDERS: dict[str, Callable[[Case], Call]] = {
    FLOOR: floor,
    "bare products (oneDNN, 128 rows)": onednn_products,
    OURS: ours,
    PLAIN: plain,
    "torch.compile of plain": compiled,
    "F.linear_cross_entropy(options=...)": torch_chunked,
    "TRL fused head": trl,
    "cut-cross-entropy": cce,
    "liger-kernel": liger,
    "quack-kernels": quack,
}
SHORT = (FLOOR, OURS, PLAIN)


@pytest.mark.parametrize("case", [Case(256, 288, 8192), Case(256, 288, 8192, trained=True)], ids=str)
@pytest.mark.parametrize("name", CONTENDERS)
def test_forward_and_backward(benchmark: Any, name: str, case: Case) -> None:
    benchmark.group = str(case)
    try:
        call = CONTENDERS[name](case)
        call()
    except CannotRunError as reason:
        pytest.skip(str(reason))
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)


def bind(function: Callable[..., Call], *arguments: Any) -> Callable[[], Call]:
    return lambda: function(*arguments)


def measure(case: Case, names: tuple[str, ...], rounds: int) -> dict[str, Measured]:
    measured = interleave({name: bind(CONTENDERS[name], case) for name in names}, rounds, required=SHORT)
    measured[OURS].peak_mib += kept_mib(case)
    return measured


def kept_mib(case: Case) -> float:
    """One chunk of logits, which the CPU operator keeps between calls in fp32: the growth over a warm call does not show it."""
    if case.device != "cpu" or case.dtype != torch.float32:
        return 0.0
    return min(256, case.tokens * (1 - case.ignored)) * case.vocab * 4 / 2**20


def measure_stats(case: Case, rounds: int) -> dict[str, Measured]:
    levels = {"no statistics": None, '"loss"': "loss", '"all"': "all"}
    return interleave({name: bind(ours, case, level) for name, level in levels.items()}, rounds)


def case_table(case: Case, measured: dict[str, Measured]) -> list[str]:
    rows = [
        f"### {case}",
        "",
        "| | median ms | min to max | x floor | lead-fast is faster by | peak MiB | % of plain's |",
        "|---|---|---|---|---|---|---|",
    ]
    base = measured[PLAIN].peak_mib or 1.0
    for name, m in measured.items():
        if m.refused is not None:
            rows.append(f"| {name} | does not run: {m.refused} | | | | | |")
            continue
        faster = m.ratio_to(measured[OURS])
        spread = f"{min(m.times_ms):.0f} to {max(m.times_ms):.0f}"
        rows.append(
            f"| {name} | {m.median_ms:.0f} | {spread} | {m.ratio_to(measured[FLOOR]):.2f} | {faster:.2f} | "
            f"{m.peak_mib:.0f} | {100 * m.peak_mib / base:.1f} |"
        )
    return [*rows, ""]


def stats_table(case: Case, results: dict[int, dict[str, Measured]]) -> list[str]:
    rows = [
        "### Price of the statistics",
        "",
        f"{case}, for longer samples as many tokens as one has; time relative to `stats=None`.",
        "",
        '| tokens a sample | None, ms | "loss" | "all" |',
        "|---|---|---|---|",
    ]
    for tokens, measured in results.items():
        none, loss, full = measured.values()
        rows.append(f"| {tokens} | {none.median_ms:.0f} | {loss.ratio_to(none):.3f} | {full.ratio_to(none):.3f} |")
    return [*rows, ""]


def write(folder: Path, rounds: int, device: str) -> None:
    """Measures case by case; the files are whole after each, so that a run cut short leaves what it has."""
    logging.getLogger("torch").setLevel(logging.ERROR)
    main, lengths = (CUDA_MAIN, CUDA_SAMPLE_TOKENS) if device == "cuda" else (MAIN, SAMPLE_TOKENS)
    results: list[tuple[Case, dict[str, Measured]]] = []
    stats: dict[int, dict[str, Measured]] = {}
    everything = tuple(CONTENDERS)
    cases = [(case, everything) for case in (CUDA_CASES if device == "cuda" else FULL_CASES)]
    cases += [(case, SHORT) for case in (() if device == "cuda" else SHORT_CASES)]
    for case, names in cases:
        results.append((case, measure(case, names, rounds)))
        publish(folder, device, rounds, main, results, stats)
    for tokens in lengths:
        stats[tokens] = measure_stats(replace(main, sample=tokens, tokens=max(main.tokens, tokens)), rounds)
    publish(folder, device, rounds, main, results, stats)
    case = model_case(device, main.dtype)
    results.append((case, measure(case, everything, rounds)))
    print(publish(folder, device, rounds, main, results, stats))


def publish(
    folder: Path,
    device: str,
    rounds: int,
    main: Case,
    results: list[tuple[Case, dict[str, Measured]]],
    stats: dict[int, dict[str, Measured]],
) -> str:
    """Writes Markdown and JSON of what was measured so far, and returns the Markdown."""
    place = machine()
    lines = [
        f"# linear_cross_entropy on {'a GPU' if device == 'cuda' else 'the CPU'}",
        "",
        f"Forward + backward. (T, H, V): tokens, hidden size, vocabulary. Interleaved, {rounds} rounds; a ratio is the "
        "median over rounds of the ratio within the round. lead-fast returns all statistics.",
        f"Written by `python benchmarks/test_linear_cross_entropy.py --device {device} --rounds {rounds}`.",
        "",
        "Machine: " + ", ".join(f"{key} {value}" for key, value in place.items()) + ".",
        "",
    ]
    for case, measured in results:
        lines += case_table(case, measured)
    if stats:
        lines += stats_table(main, stats)
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines)
    (folder / f"linear_cross_entropy_{device}.md").write_text(text)
    record = {
        "machine": place,
        "cases": [{**asdict(c), "dtype": str(c.dtype), "results": [asdict(m) for m in r.values()]} for c, r in results],
        "statistics": {n: [asdict(m) for m in r.values()] for n, r in stats.items()},
    }
    (folder / f"linear_cross_entropy_{device}.json").write_text(json.dumps(record, indent=1) + "\n")
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--rounds", type=int, help="measured calls of each contender (3 on the CPU, 7 on a GPU)")
    arguments = parser.parse_args()
    write(arguments.out, arguments.rounds or (7 if arguments.device == "cuda" else 3), arguments.device)
