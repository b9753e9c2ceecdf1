"""The build and the loading of its libraries: what is built when, what is said when something is missing."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lead_fast import extension

ROOT = Path(__file__).parent.parent


@pytest.fixture
def build(tmp_path, monkeypatch) -> ModuleType:
    """setup.py as a module, with its objects in a folder of the test's own and none of its variables set."""
    spec = importlib.util.spec_from_file_location("lead_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "BUILD", tmp_path / "build")
    for name in ("LEAD_FAST_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH", "CXX", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    return module


def make_nvcc(home: Path, release: str = "13.0", archs: str = "compute_80 compute_90 compute_100") -> Path:
    """A stand-in that answers what setup.py asks nvcc."""
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "release {release}, V{release}.88" || echo "{archs}"\n')
    nvcc.chmod(0o755)
    return nvcc


# What is installed


@pytest.mark.skipif(os.environ.get("LEAD_FAST_NO_EXT") == "1", reason="LEAD_FAST_NO_EXT=1: nothing was built")
def test_extension_is_built_and_loaded():
    available = extension.available()
    assert available["_C"] and available["_ops_cpu"]
    assert torch._C._dispatch_has_kernel_for_dispatch_key("lead_fast::philox_uniform", "CPU")

    from lead_fast import _C

    info = _C.build_info()
    assert info["version"] == importlib.metadata.version("lead-fast")
    assert info["cpp_standard"] >= 201703
    assert info["torch_target_version"] == "0x020a000000000000"
    assert (info["cuda_archs"] is not None) == extension._FOLDER.joinpath("_ops_cuda.so").exists()
    if Path("/proc/cpuinfo").exists() and "avx2" in Path("/proc/cpuinfo").read_text().split():
        assert "avx2+fma" in info["instruction_sets"]


# What is said when something is missing


def test_missing_torch_names_the_command(build, monkeypatch):
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"needs torch >= 2\.10(.|\n)*pip install torch(.|\n)*--no-build-isolation"):
        build.plan("0.0")


def test_old_torch_is_named(build, monkeypatch):
    monkeypatch.setattr(build.importlib.metadata, "version", lambda name: "2.9.1+cpu")
    with pytest.raises(SystemExit, match=r"needs torch >= 2\.10, and 2\.9\.1\+cpu is there"):
        build.plan("0.0")


def test_missing_compiler_names_the_package(build, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"C\+\+17 compiler(.|\n)*apt-get install g\+\+(.|\n)*LEAD_FAST_NO_EXT=1"):
        build.find_compiler()


def test_compiler_without_cpp17_is_named(build, monkeypatch):
    monkeypatch.setenv("CXX", shutil.which("false"))
    with pytest.raises(SystemExit, match=r"false` does not compile C\+\+17"):
        build.find_compiler()


def test_compiler_error_is_shown(build, tmp_path):
    broken = tmp_path / "broken.cpp"
    broken.write_text("int main() { return undeclared; }\n")
    with pytest.raises(SystemExit, match=r"this command failed(.|\n)*undeclared"):
        build.run([*build.find_compiler(), "-c", str(broken), "-o", str(tmp_path / "broken.o")])


def test_no_ext_builds_nothing(tmp_path):
    environment = os.environ | {"LEAD_FAST_NO_EXT": "1", "PATH": str(tmp_path)}
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path / "out")]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    built = [path.name for path in (tmp_path / "out").rglob("*")]
    assert "rng.py" in built and not [name for name in built if name.endswith((".so", ".o"))]


# When CUDA is built


@pytest.mark.parametrize(
    ("wish", "torch_cuda", "has_nvcc", "built"),
    [
        (None, None, True, False),
        (None, "13.0", True, True),
        (None, "13.2", True, True),
        (None, "12.8", True, False),  # another major version: the library would not load
        (None, "13.0", False, False),
        ("1", None, True, True),
        ("0", "13.0", True, False),
    ],
)
def test_cuda_follows_nvcc_and_torch(build, monkeypatch, tmp_path, wish, torch_cuda, has_nvcc, built):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    if wish is not None:
        monkeypatch.setenv("LEAD_FAST_CUDA", wish)
    nvcc = make_nvcc(tmp_path) if has_nvcc else None
    found = build.nvcc_for(build.Torch(tmp_path, "2.13.0", torch_cuda))
    assert found == (nvcc if built else None)


@pytest.mark.parametrize(
    ("wish", "torch_cuda", "has_nvcc", "message"),
    [
        ("1", None, False, "no nvcc was found"),
        ("1", "12.8", True, "torch was built for CUDA 12.8"),
        ("yes", None, True, "LEAD_FAST_CUDA must be 0, 1 or unset, got 'yes'"),
    ],
)
def test_cuda_that_cannot_be_built_is_said(build, monkeypatch, tmp_path, wish, torch_cuda, has_nvcc, message):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("LEAD_FAST_CUDA", wish)
    if has_nvcc:
        make_nvcc(tmp_path)
    with pytest.raises(SystemExit, match=message):
        build.nvcc_for(build.Torch(tmp_path, "2.13.0", torch_cuda))


@pytest.mark.parametrize(
    ("asked", "known", "archs"),
    [
        (None, "compute_80 compute_90 compute_100", ["8.0", "9.0", "10.0+PTX"]),
        (None, "compute_80 compute_90", ["8.0", "9.0+PTX"]),
        ("9.0a", "compute_90", ["9.0a"]),
        ("8.0 8.6;12.0+PTX", "compute_80", ["8.0", "8.6", "12.0+PTX"]),
    ],
)
def test_cuda_architectures(build, monkeypatch, tmp_path, asked, known, archs):
    if asked is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert build.cuda_archs(make_nvcc(tmp_path, archs=known)) == archs


def test_cuda_architecture_that_cannot_be_read_is_said(build, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0;Hopper")
    with pytest.raises(SystemExit, match=r"TORCH_CUDA_ARCH_LIST must look like .*, got 'Hopper'"):
        build.cuda_archs(make_nvcc(tmp_path))


def test_gencode_adds_ptx_where_asked(build):
    assert build.gencode(["8.0", "10.0+PTX"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc on PATH")
def test_cuda_sources_compile_and_link_without_a_gpu(build, monkeypatch, capfd):
    monkeypatch.setenv("LEAD_FAST_CUDA", "1")
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-Xptxas=-v")
    cpu_torch = dataclasses.replace(build.find_torch(), cuda=None)
    monkeypatch.setattr(build, "find_torch", lambda: cpu_torch)
    library = next(library for library in build.plan("0.0") if library.name == "_ops_cuda")
    build.build([library])

    report = capfd.readouterr().out
    assert "warning" not in report
    written = "".join(source.read_text() for source in library.sources)
    kernels = set(re.findall(r"__global__ void(?:\s+__launch_bounds__\(.*?\))?\s+(\w+)\(", written))
    assert len(kernels) == written.count("__global__") > 10
    for kernel in kernels:
        entry = rf"Compiling entry function '\S*\d{kernel}[EI]\S*' for 'sm_(\d+)'"
        assert set(re.findall(entry, report)) == {"80", "90", "100"}, kernel
    assert set(re.findall(r"(\d+) bytes spill", report)) == {"0"}
    assert library.output.stat().st_size > 0


# What is built again


def test_only_what_changed_is_built_again(build, monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(build, "ROOT", tmp_path)
    header, first, second = tmp_path / "shared.h", tmp_path / "first.cpp", tmp_path / "second.cpp"
    header.write_text("constexpr int value = 1;\n")
    first.write_text('#include "shared.h"\nint first() { return value; }\n')
    second.write_text("int second() { return 2; }\n")
    compiler = build.find_compiler()

    def steps(sources: list[Path], flags: tuple[str, ...] = ()) -> list[str]:
        compile_command = [*compiler, "-fPIC", *flags]
        build.build([build.Library("_ops_test", sources, compile_command, [*compiler, "-shared"], [], "")])
        return sorted(re.findall(r"lead-fast: (.*)", capfd.readouterr().out))

    everything = ["compiling first.cpp", "compiling second.cpp", "linking _ops_test.so"]
    assert steps([first, second]) == everything
    assert steps([first, second]) == []

    header.write_text("constexpr int value = 3;\n")
    assert steps([first, second]) == ["compiling first.cpp", "linking _ops_test.so"]
    assert steps([first]) == ["linking _ops_test.so"]
    assert steps([first, second], flags=("-O1",)) == everything


# How it is loaded


@pytest.fixture
def library_folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(extension, "_FOLDER", tmp_path)
    monkeypatch.delenv("LEAD_FAST_NO_EXT", raising=False)
    return tmp_path


def test_absent_libraries_are_said_once(library_folder, caplog):
    with caplog.at_level(logging.INFO, logger="lead_fast"):
        assert extension._load()["_ops_cpu"] is False
    assert [record.levelname for record in caplog.records if "CPU operators run on" in record.message] == ["WARNING"]


def test_present_library_that_does_not_load_is_an_error(library_folder):
    (library_folder / "_ops_cpu.so").write_bytes(b"not a library")
    with pytest.raises(ImportError, match=r"`_ops_cpu\.so` is installed and does not load \((.|\n)*LEAD_FAST_NO_EXT=1"):
        extension._load()


def test_no_ext_ignores_a_library_that_does_not_load(library_folder, monkeypatch, caplog):
    (library_folder / "_ops_cpu.so").write_bytes(b"not a library")
    monkeypatch.setenv("LEAD_FAST_NO_EXT", "1")
    with caplog.at_level(logging.INFO, logger="lead_fast"):
        assert not any(extension._load().values())
    assert [record.levelname for record in caplog.records] == ["INFO"]


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is a CUDA build, which loads _ops_cuda")
def test_cuda_library_is_never_loaded_under_a_cpu_torch(library_folder):
    (library_folder / "_ops_cuda.so").write_bytes(b"not a library")
    assert extension._load()["_ops_cuda"] is False


def test_reference_serves_the_operator_without_the_libraries():
    program = (
        "import torch; from lead_fast import extension; from lead_fast.rng import philox_uniform;"
        "assert not any(extension.available().values());"
        "assert not torch._C._dispatch_has_kernel_for_dispatch_key('lead_fast::philox_uniform', 'CPU');"
        "print(philox_uniform(1, 2, 3, torch.arange(4)).tolist())"
    )
    environment = os.environ | {"LEAD_FAST_NO_EXT": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    from lead_fast.rng import philox_uniform

    assert done.stdout.strip() == str(philox_uniform(1, 2, 3, torch.arange(4)).tolist())
