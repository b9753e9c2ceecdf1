"""Ahead-of-time compilation of every Triton kernel with the launch configurations of its table; needs no GPU.

python tests/kernels/aot.py     writes kernels/lead_fast_kernels/RESOURCES.md
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from lead_fast.kernels import (
    bias_grad,
    hidden_rows,
    logit_rows,
    sample_gram,
    sample_outer,
    sample_stats,
    sample_tiles,
    scaled_gradient,
    single_pass_rows,
    token_scan,
    weighted_rows,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

TABLE = Path(__file__).parents[2] / "kernels" / "lead_fast_kernels" / "RESOURCES.md"
CARDS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
# Bytes of shared memory a block may have. sm_80 also serves sm_86, sm_89 and sm_120, which have the least: 99 KiB.
SHARED_LIMIT = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}
REGISTERS = 65536
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# Integers that the launchers pass as multiples of 16 for the sizes that matter: a padded row, and H of every model.
ALIGNED = {"row_stride", "hidden_size", "columns"}
INTEGERS = {
    "row_stride": "i32",
    "columns": "i32",
    "upstream_stride": "i32",
    "hidden_size": "i32",
    "vocab": "i32",
    "rows": "i32",
    "num_tokens": "i32",
    "num_samples": "i32",
    "tokens_per_tile": "i32",
    "tiles_per_outer": "i32",
    "ignore_index": "i32",
}


class Case(NamedTuple):
    """One compilation."""

    kernel: Any
    types: dict[str, str]
    """Types of the pointers and floating scalars; those of the integers are in INTEGERS."""
    constants: dict[str, Any]
    options: dict[str, int]
    variant: str
    """What distinguishes it from other compilations of the same kernel for the same card."""


class Usage(NamedTuple):
    """What a compiled kernel takes."""

    registers: int
    spilled: int
    """Bytes of stack and local memory a thread: 0 when nothing is spilled."""
    shared: int
    """Bytes of shared memory a block."""
    num_warps: int


def cases(card: str) -> Iterator[Case]:
    """Every kernel in every dtype and variant that the launchers can ask for on `card`."""
    for dtype, size in BYTES.items():
        launch = logit_rows.LAUNCH[card]
        options = {"num_warps": launch.num_warps}
        types = {"logits_ptr": f"*{dtype}", "labels_ptr": "*i64", "nll_ptr": "*fp32", "delta_sq_ptr": "*fp32"}
        types |= {"logit_scale": "fp32", "softcap": "fp32"}
        for capped in (False, True):
            for write in (False, True):
                constants: dict[str, Any] = {"BLOCK": launch.block_bytes // size, "VECTOR": 16 // size}
                constants |= {"HAS_SOFTCAP": capped, "WRITE_DELTA": write}
                variant = f"{dtype}{' softcap' if capped else ''}{'' if write else ' loss only'}"
                yield Case(logit_rows._logit_rows_kernel, types, constants, options, variant)

        launch = single_pass_rows.LAUNCH[card]
        factors = {"inverse_ptr": "*fp32", "target_ptr": "*fp32"}
        if dtype != "fp16":
            types |= {**factors, "stop_ptr": "*i16", "flag_ptr": "*i32"}
            for capped in (False, True):
                constants = {"BLOCK": launch.block_bytes // size, "VECTOR": 16 // size, "HAS_SOFTCAP": capped}
                variant = f"{dtype}{' softcap' * capped}"
                options = {"num_warps": launch.num_warps}
                yield Case(single_pass_rows._single_pass_rows_kernel, types, constants, options, variant)
                options["maxnreg"] = single_pass_rows.REPAIR_REGISTERS
                yield Case(single_pass_rows._repair_rows_kernel, types, constants, options, variant)
            types = {"logits_ptr": f"*{dtype}", "labels_ptr": "*i64", "target_ptr": "*fp32"}
            yield Case(single_pass_rows._put_targets_kernel, types, {"BLOCK": 256}, {"num_warps": 4}, dtype)

        block, num_warps = hidden_rows.LAUNCH[card]
        options = {"num_warps": num_warps}
        types = {"product_ptr": "*fp32", "labels_ptr": "*i64", "d_hidden_ptr": f"*{dtype}", "d_sq_ptr": "*fp32"}
        constants = {"BLOCK": block, "inverse_ptr": None, "target_ptr": None, "weight_ptr": None}
        yield Case(hidden_rows._hidden_rows_kernel, types, constants, options, dtype)
        if dtype != "fp16":
            types |= {**factors, "weight_ptr": f"*{dtype}"}
            yield Case(hidden_rows._hidden_rows_kernel, types, {"BLOCK": block}, options, f"{dtype} single pass")

        block, num_warps = weighted_rows.LAUNCH[card]
        types = {"hidden_ptr": f"*{dtype}", "labels_ptr": "*i64", "scale_ptr": "*fp32", "unit_ptr": "*fp32"}
        types |= {"weighted_ptr": f"*{dtype}", "logits_ptr": f"*{dtype}", "nll_ptr": "*fp32"}
        constants = {"BLOCK": block}
        if dtype != "fp16":
            del types["unit_ptr"]
            constants["unit_ptr"] = None
        yield Case(weighted_rows._weighted_rows_kernel, types, constants, {"num_warps": num_warps}, dtype)

        block_r, block_v, num_warps = bias_grad.LAUNCH[card]
        types = {"gradient_ptr": f"*{dtype}", "labels_ptr": "*i64", "scale_ptr": "*fp32", "d_bias_ptr": "*fp32"}
        constants = {"BLOCK_R": block_r, "BLOCK_V": block_v}
        yield Case(bias_grad._bias_grad_kernel, types, constants, {"num_warps": num_warps}, dtype)

        types = {"hidden_ptr": f"*{dtype}", "d_hidden_ptr": f"*{dtype}", "supervised_ptr": "*i32"}
        types |= {"first_row_ptr": "*i32", "first_tile_ptr": "*i32", "partial_ptr": "*fp32"}
        gram = sample_gram.LAUNCH[card, size]
        constants = {"BLOCK_T": gram.block_t, "BLOCK_H": gram.block_h, "BLOCK_S": gram.block_s}
        constants |= {"PRECISION": "tf32x3", "UPCAST": False}
        options = {"num_warps": gram.num_warps, "num_stages": gram.num_stages}
        yield Case(sample_gram._sample_gram_kernel, types, constants, options, dtype)
        outer = sample_outer.LAUNCH[card, size]
        constants = {"BLOCK_C": outer.block_c, "BLOCK_T": outer.block_t, "BLOCK_S": outer.block_s}
        constants |= {"PRECISION": "tf32x3", "UPCAST": False}
        options = {"num_warps": outer.num_warps, "num_stages": outer.num_stages}
        yield Case(sample_outer._sample_outer_kernel, types, constants, options, dtype)

    block, num_warps = scaled_gradient.LAUNCH[card]
    for saved, out in (("fp32", "fp32"), ("fp32", "bf16"), ("fp32", "fp16"), ("bf16", "bf16"), ("fp16", "fp16")):
        types = {"gradient_ptr": f"*{saved}", "upstream_ptr": "*fp32", "out_ptr": f"*{out}"}
        options = {"num_warps": num_warps}
        yield Case(scaled_gradient._scaled_gradient_kernel, types, {"BLOCK": block}, options, f"{saved} to {out}")

    block, num_warps = token_scan.LAUNCH[card]
    types = {"labels_ptr": "*i64", "nll_ptr": "*fp32", "scale_ptr": "*fp32", "before_ptr": "*i32"}
    types |= {"supervised_ptr": "*i32", "loss_ptr": "*fp32", "bad_labels_ptr": "*i64"}
    yield Case(token_scan._token_scan_kernel, types, {"BLOCK": block}, {"num_warps": num_warps}, "")

    for index in ("i32", "i64"):
        first = {"first_row_ptr": "*i32", "first_gram_ptr": "*i32", "first_outer_ptr": "*i32"}
        block, num_warps = sample_tiles.LAUNCH[card]
        types = {"cu_seqlens_ptr": f"*{index}", "before_ptr": "*i32", **first}
        yield Case(sample_tiles._sample_tiles_kernel, types, {"BLOCK": block}, {"num_warps": num_warps}, index)

        block, num_warps = sample_stats.LAUNCH[card]
        per_token = {"delta_sq_ptr": "*fp32", "d_sq_ptr": "*fp32", "gram_ptr": "*fp32", "outer_ptr": "*fp32"}
        types = {"cu_seqlens_ptr": f"*{index}", "nll_ptr": "*fp32", "stats_ptr": "*fp32", **first}
        options = {"num_warps": num_warps}
        yield Case(sample_stats._sample_stats_kernel, types | per_token, {"BLOCK": block}, options, index)
        constants = {"BLOCK": block, **dict.fromkeys(per_token)}
        yield Case(sample_stats._sample_stats_kernel, types, constants, options, f"{index} loss only")


def compile_for(case: Case, card: str) -> CompiledKernel:
    """Compiles `case` for `card`; triton keeps the result in its cache on disk."""
    names = case.kernel.arg_names
    types = {name: case.types.get(name, INTEGERS.get(name, "constexpr")) for name in names}
    # As the launchers' arguments are specialised, so that the cache on disk serves both.
    specialised = {parameter.name for parameter in case.kernel.params if not parameter.do_not_specialize}
    attributes = {}
    for position, name in enumerate(names):
        if types[name] == "constexpr":
            attributes[position,] = []
        elif types[name].startswith("*") or name in ALIGNED & specialised:
            attributes[position,] = [["tt.divisibility", 16]]
    source = ASTSource(case.kernel, types, constexprs=case.constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", CARDS[card], 32), options=case.options)


def identity(compiled: CompiledKernel) -> tuple[Any, ...]:
    """What tells one compilation from another: types, constants, what is known to be aligned, options."""
    source, metadata = compiled.src, compiled.metadata
    aligned = frozenset(position for position, attributes in source.attrs.items() if attributes)
    options = (metadata.num_warps, metadata.num_stages, metadata.maxnreg)
    return source.name, tuple(source.signature.items()), tuple(sorted(source.constants.items())), aligned, options


def usage_of(compiled: CompiledKernel) -> Usage:
    """What a compiled kernel takes, read from its cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name]
        dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", dump).groups())
    # Triton's shared memory is dynamic: the launch asks for it, the cubin does not show it.
    return Usage(registers, stack + local, compiled.metadata.shared, compiled.metadata.num_warps)


def measure() -> dict[tuple[str, str, str], Usage]:
    """What every case takes, by kernel, variant and card."""
    usages = {}
    for card in CARDS:
        for case in cases(card):
            usages[case.kernel.__name__, case.variant, card] = usage_of(compile_for(case, card))
    return usages


def render(usages: dict[tuple[str, str, str], Usage]) -> str:
    """The committed table."""
    lines = [
        "# Resources of the Triton kernels",
        "",
        "Compiled ahead of time with the launch configurations of each kernel's table. Written by",
        "`python tests/kernels/aot.py`, checked by `tests/kernels/test_aot.py`. Nothing here was run on a card.",
        "",
        f"triton {triton.__version__}. A cell is: registers a thread, bytes spilled a thread, bytes of dynamic shared "
        "memory a block, warps a block.",
        "",
        f"| kernel | variant | {' | '.join(CARDS)} |",
        f"|---|---|{'---|' * len(CARDS)}",
    ]
    for kernel, variant in sorted({(kernel, variant) for kernel, variant, _ in usages}):
        cells = (", ".join(map(str, usages[kernel, variant, card])) for card in CARDS)
        lines.append(f"| {kernel} | {variant} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def committed() -> tuple[str, dict[tuple[str, str, str], Usage]]:
    """The triton version of the committed table, and its rows."""
    text = TABLE.read_text()
    version = re.search(r"^triton (\S+)\. ", text, re.MULTILINE).group(1)
    usages = {}
    for line in re.findall(r"^\| (_.*) \|$", text, re.MULTILINE):
        kernel, variant, *cells = (cell.strip() for cell in line.split("|"))
        for card, cell in zip(CARDS, cells, strict=True):
            usages[kernel, variant, card] = Usage(*map(int, cell.split(",")))
    return version, usages


if __name__ == "__main__":
    TABLE.write_text(render(measure()))
