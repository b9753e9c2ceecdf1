"""Who may import whom: the rooms of the house stay apart."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lead_fast"
# Only these rooms know transformers, accelerate and peft.
HOSTS = {"transformers", "accelerate", "peft"}
HOST_ROOMS = {
    "attention.py",
    "turns.py",
    "packing.py",
    "models.py",
    "layers.py",
    "loading.py",
    "lora.py",
    "optimization.py",
    "cli.py",
}
HOST_ROOMS |= {"lora_linear.py", "offline", "integrations"}
# What the inner rooms may import of this package; None: torch and triton alone.
INNER = {
    "reference.py": set(),
    "rng.py": {"extension"},
    "ops.py": {"extension", "reference", "kernels"},
    "reference_bandit.py": set(),
    "reference_state.py": {"rng", "reference_bandit"},
    "state.py": {"extension", "reference_state"},
    "device.py": set(),
    "ranks.py": set(),
    "bandit.py": {"state", "reference_state"},
    "selection.py": {"device", "reference_state", "rng"},
    "utility.py": {"device", "state", "reference_state", "selection"},
    "estimators.py": {"utility", "reference_state"},
    "first_order.py": {"device", "rng", "reference_state", "utility"},
    "visits.py": {"device", "utility", "reference_state"},
    "rounds.py": {"device", "utility", "selection", "visits"},
    "pool.py": {"files", "rows", "rowfile"},
    "engine.py": {
        "bandit",
        "config",
        "device",
        "estimators",
        "files",
        "first_order",
        "pool",
        "ranks",
        "reference_state",
        "rng",
        "rounds",
        "selection",
        "utility",
        "visits",
    },
}


def imported(path):
    """Modules that a file imports, dotted, wherever in the file the import stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files():
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_some_rooms_know_the_hosts(path):
    room = path.relative_to(PACKAGE).parts[0]
    hosts = {name.split(".")[0] for name in imported(path)} & HOSTS
    assert not hosts or room in HOST_ROOMS, f"{room} imports {', '.join(sorted(hosts))}"


@pytest.mark.parametrize("room", INNER)
def test_inner_rooms_import_inner_rooms_only(room):
    own = {name.split(".")[1] for name in imported(PACKAGE / room) if name.startswith("lead_fast.")}
    assert own <= INNER[room], f"{room} imports {', '.join(sorted(own - INNER[room]))}"


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda p: p.name)
def test_kernels_know_torch_and_triton_only(path):
    tops = {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names)
    assert tops <= {"torch", "triton"}


def test_the_help_and_the_pool_do_not_wait_for_torch():
    code = "import sys, lead_fast.cli, lead_fast.pool; print('torch' in sys.modules, 'transformers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]
