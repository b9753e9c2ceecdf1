"""Where tests run CUDA operators: on a card, or their sources on the CPU, every thread a fiber (tests/cuda_on_cpu)."""

import ctypes
import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lead_fast.state import SCHEMAS

Arguments = tuple[Any, ...]
ROOT = Path(__file__).parent.parent
SHIM = ROOT / "tests" / "cuda_on_cpu"
#: orders in which the threads of a block run between two barriers
ORDERS = ("ascending", "descending", "shuffled")

_definitions = torch.library.Library("lead_fast_on_cpu", "DEF")
for _name, _schema in SCHEMAS.items():
    _definitions.define(_name + _schema)
_definitions.define("philox_uniform(int seed, int stream, int round, Tensor counters) -> Tensor")


def load_setup() -> ModuleType:
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("lead_fast_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@functools.cache
def cuda_on_cpu() -> ctypes.CDLL:
    """Compiles what has changed, and loads the operators as torch.ops.lead_fast_on_cpu."""
    setup = load_setup()
    torch_root, compiler = setup.find_torch().root, setup.find_compiler()
    flags = ["-x", "c++", "-O1", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-DUSE_CUDA",
             "-U_FORTIFY_SOURCE"]  # its longjmp allows one stack only  # fmt: skip
    includes = [f"-I{SHIM}", f"-I{setup.CSRC}", "-isystem", str(torch_root / "include")]
    library = setup.Library(
        name="_ops_cuda_on_cpu",
        sources=[*setup.sources("cuda/*.cu"), SHIM / "torch_cuda.cpp"],
        compile=[*compiler, *flags, *includes, f"-DTORCH_TARGET_VERSION={setup.TORCH_TARGET}"],
        # The few functions of a CUDA torch that the shim replaces must not be sought elsewhere.
        link=[*compiler, "-shared", "-Wl,-Bsymbolic"],
        link_flags=[f"-L{torch_root / 'lib'}", "-ltorch_cpu"],
        toolchain=setup.run([*compiler, "--version"]) + torch.__version__,
    )
    setup.build([library])
    torch.ops.load_library(library.output)
    return ctypes.CDLL(str(library.output))


class Machine:
    """The card, or the CPU with its threads in one of ORDERS."""

    def __init__(self, name: str) -> None:
        self.device = "cuda" if name == "card" else "cpu"
        self.operators = torch.ops.lead_fast if name == "card" else torch.ops.lead_fast_on_cpu
        if name != "card":
            cuda_on_cpu().simt_set_order(ORDERS.index(name))

    def run(self, operator: str, arguments: Arguments) -> tuple[list[Tensor], Arguments]:
        """Results and the arguments as they are afterwards, on the CPU; `arguments` themselves stay."""
        arguments = moved(arguments, self.device)
        result = outputs(getattr(self.operators, operator)(*arguments))
        return [r.cpu() for r in result], moved(arguments, "cpu")


def moved(arguments: Arguments, device: str) -> Arguments:
    """Copies on a device."""
    return tuple(a.to(device, copy=True) if isinstance(a, Tensor) else a for a in arguments)


def outputs(result: Any) -> list[Tensor]:
    return [] if result is None else [result] if isinstance(result, Tensor) else list(result)
