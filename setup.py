"""Builds the extension: `_C` (pybind11), `_ops_cpu` and `_ops_cuda` (torch operators). Metadata is in pyproject.toml.

Environment:
  LEAD_FAST_NO_EXT=1    build nothing; every operator runs on its PyTorch reference
  LEAD_FAST_CUDA=1|0    build the CUDA sources always | never; otherwise when nvcc is there and torch is a CUDA build
  TORCH_CUDA_ARCH_LIST  CUDA architectures, default "8.0;9.0;10.0+PTX" as far as nvcc knows them
  CXX, CUDA_HOME        compiler, CUDA toolkit
  MAX_JOBS              parallel compilations, default one a core
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "ext"
TORCH_MINIMUM = (2, 10)
TORCH_TARGET = "0x020a000000000000"  # the stable ABI of torch 2.10: one binary for it and everything later
DEFAULT_CUDA_ARCHS = ("8.0", "9.0", "10.0+PTX")
CXX_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", f"-I{CSRC}")
# The vector kernels may fuse a product and a sum; everything else rounds each, as its PyTorch twin does on every machine.
UNFUSED = "-ffp-contract=off"
NVCC_FLAGS = (
    *("-O3", "-std=c++17", "-DUSE_CUDA", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"),
    *("-fmad=false", f"-I{CSRC}"),
)
PIP = f"{sys.executable} -m pip install"
INSTALL_COMMAND = f"{PIP} torch pybind11 setuptools wheel && {PIP} --no-build-isolation ."


class BuildError(SystemExit):
    """Ends the build with one message that says what to do, without a traceback."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(
            f"\nlead-fast: {problem}\n  {remedy}\n"
            "  Or set LEAD_FAST_NO_EXT=1 to install without compiled parts (slower: the PyTorch reference runs).\n"
        )


@dataclass(frozen=True)
class Torch:
    """The installed torch, found without importing it (an import costs seconds)."""

    root: Path
    version: str
    cuda: str | None  # the CUDA version torch was built for


@dataclass(frozen=True)
class Library:
    """One shared library: its sources, and the commands that compile one of them and link all."""

    name: str
    sources: list[Path]
    compile: list[str]
    link: list[str]
    link_flags: list[str]
    toolchain: str  # versions that the commands do not show; a change rebuilds

    @property
    def folder(self) -> Path:
        """Objects live under the hash of what made them, so that a new flag, compiler or torch starts afresh."""
        identity = "\0".join([*self.compile, UNFUSED, *self.link, *self.link_flags, self.toolchain])
        return BUILD / f"{self.name}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"

    @property
    def output(self) -> Path:
        return self.folder / f"{self.name}.so"


def run(command: list[str]) -> str:
    """The command's standard output; its error output ends the build."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"\nlead-fast: this command failed:\n  {shlex.join(command)}\n{done.stdout}{done.stderr}")
    if done.stderr:
        print(done.stderr, end="")
    return done.stdout


def find_torch() -> Torch:
    needs = "building the extension needs torch >= 2.10, and"
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        isolated = "(pip isolates a build unless told --no-build-isolation)"
        raise BuildError(f"{needs} the environment that builds has none {isolated}.", f"Run: {INSTALL_COMMAND}")
    root = Path(spec.origin).parent
    version = importlib.metadata.version("torch")
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or tuple(map(int, numbers.groups())) < TORCH_MINIMUM:
        raise BuildError(f"{needs} {version} is there.", f"Run: {INSTALL_COMMAND}")
    found = re.search(r"^cuda[^=]*= *'([\d.]+)'", (root / "version.py").read_text(), re.MULTILINE)
    return Torch(root, version, found.group(1) if found else None)


def find_compiler() -> list[str]:
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    compiler = next((shlex.split(name) for name in candidates if shutil.which(shlex.split(name)[0])), None)
    if compiler is None:
        raise BuildError(
            f"building the extension needs a C++17 compiler, and none of {', '.join(candidates)} was found.",
            "On Debian or Ubuntu run: apt-get install g++   (or name your compiler in CXX)",
        )
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.cpp")
        probe.write_text("#include <optional>\nstatic_assert(__cplusplus >= 201703L);\n")
        if subprocess.run([*compiler, "-std=c++17", "-fsyntax-only", str(probe)], capture_output=True).returncode:
            raise BuildError(
                f"`{shlex.join(compiler)}` does not compile C++17.",
                "Install g++ 9 or newer (on Debian or Ubuntu: apt-get install g++), or name another compiler in CXX.",
            )
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise BuildError("the Python headers are missing.", "On Debian or Ubuntu run: apt-get install python3-dev")
    return compiler


def find_pybind11() -> str:
    try:
        import pybind11
    except ModuleNotFoundError:
        raise BuildError("building the extension needs pybind11.", f"Run: {INSTALL_COMMAND}") from None
    return pybind11.get_include()


def find_nvcc() -> Path | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        nvcc = Path(home, "bin", "nvcc")
        return nvcc if nvcc.exists() else None
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    return Path(found) if found else None


def nvcc_for(torch: Torch) -> Path | None:
    """nvcc when the CUDA sources are to be built, else None. A visible GPU plays no part."""
    wish = os.environ.get("LEAD_FAST_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"lead-fast: LEAD_FAST_CUDA must be 0, 1 or unset, got {wish!r}")
    nvcc = find_nvcc()
    if wish == "0" or (not wish and (nvcc is None or torch.cuda is None)):
        return None
    if nvcc is None:
        raise BuildError(
            "LEAD_FAST_CUDA=1, and no nvcc was found.", "Install the CUDA toolkit, or name its folder in CUDA_HOME."
        )
    release = re.search(r"release (\d+)\.(\d+)", run([str(nvcc), "--version"]))
    if torch.cuda and release and release.group(1) != torch.cuda.split(".")[0]:
        problem = f"torch was built for CUDA {torch.cuda}, and {nvcc} is CUDA {release.group(1)}.{release.group(2)}"
        if wish:
            raise BuildError(problem + ".", f"Name a CUDA {torch.cuda} toolkit in CUDA_HOME.")
        say(f"{problem}: the CUDA operators are not built.")
        return None
    return nvcc


def cuda_archs(nvcc: Path) -> list[str]:
    """Compute capabilities such as "9.0" or "10.0+PTX": TORCH_CUDA_ARCH_LIST, else the default that nvcc knows."""
    asked = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    if asked != [""]:
        for arch in asked:
            if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
                raise SystemExit(f'lead-fast: TORCH_CUDA_ARCH_LIST must look like "8.0;9.0;10.0+PTX", got {arch!r}')
        return asked
    known = set(run([str(nvcc), "--list-gpu-arch"]).split())
    archs = [a for a in DEFAULT_CUDA_ARCHS if "compute_" + a.removesuffix("+PTX").replace(".", "") in known]
    archs[-1] = archs[-1].removesuffix("+PTX") + "+PTX"  # PTX of the newest lets later cards run
    return archs


def gencode(archs: list[str]) -> list[str]:
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def plan(version: str) -> list[Library]:
    """The libraries to build on this machine."""
    torch, compiler = find_torch(), find_compiler()
    nvcc = nvcc_for(torch)
    archs = cuda_archs(nvcc) if nvcc else []
    toolchain = run([*compiler, "--version"]) + torch.version

    torch_flags = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-isystem", str(torch.root / "include")]
    torch_link = [f"-L{torch.root / 'lib'}", "-ltorch_cpu"]
    python_defines = {"VERSION": version, "CUDA_ARCHS": ";".join(archs), "TORCH_TARGET": TORCH_TARGET}
    python_flags = [f'-DLEAD_FAST_{key}="{value}"' for key, value in python_defines.items()]
    for include in (find_pybind11(), sysconfig.get_path("include")):
        python_flags += ["-isystem", include]

    compile_cxx, link_cxx = [*compiler, *CXX_FLAGS], [*compiler, "-shared"]
    libraries = [
        Library("_ops_cpu", sources("cpu/*.cpp"), [*compile_cxx, *torch_flags], link_cxx, torch_link, toolchain),
        Library("_C", sources("python/*.cpp"), [*compile_cxx, *python_flags], link_cxx, [], toolchain),
    ]
    if nvcc:
        compile_cuda = [str(nvcc), "-ccbin", compiler[0], *NVCC_FLAGS, *gencode(archs), *torch_flags]
        link_cuda = [str(nvcc), "-ccbin", compiler[0], "-shared", "-cudart=shared"]
        # A CPU torch has no libtorch_cuda: what was built beside it is never loaded.
        cuda_link = [*torch_link, "-ltorch_cuda"] if torch.cuda else torch_link
        toolchain += run([str(nvcc), "--version"])
        libraries.append(Library("_ops_cuda", sources("cuda/*.cu"), compile_cuda, link_cuda, cuda_link, toolchain))
    return libraries


def sources(pattern: str) -> list[Path]:
    return sorted(CSRC.glob(pattern))


def is_current(output: Path, inputs: list[Path]) -> bool:
    if not output.exists():
        return False
    made = output.stat().st_mtime_ns
    return all(path.exists() and path.stat().st_mtime_ns < made for path in inputs)


def dependencies(depfile: Path) -> list[Path]:
    """The files a compilation read, from the rule that -MMD wrote."""
    _, _, files = depfile.read_text().replace("\\\n", " ").partition(":")
    return [Path(name) for name in files.split()]


def say(text: str) -> None:
    """One line on stdout; one write, so that lines of several compilers running at once stay apart."""
    sys.stdout.write(f"lead-fast: {text}\n")
    sys.stdout.flush()


def compile_source(library: Library, source: Path) -> Path:
    """Compiles one source unless its object is newer than everything the last compilation read."""
    target = library.folder / f"{source.stem}.o"
    depfile = target.with_suffix(".d")
    if depfile.exists() and is_current(target, dependencies(depfile)):
        return target
    say(f"compiling {source.relative_to(ROOT)}")
    target.unlink(missing_ok=True)
    rounding = [UNFUSED] if source.suffix == ".cpp" and not source.name.startswith("kernels_") else []
    run([*library.compile, *rounding, "-MMD", "-MF", str(depfile), "-c", str(source), "-o", str(target)])
    return target


def link_objects(library: Library, objects: list[Path]) -> None:
    """Links unless the library is newer than its objects and was made of exactly these."""
    linked = library.folder / "linked"
    names = "\n".join(map(str, objects))
    if linked.exists() and linked.read_text() == names and is_current(library.output, objects):
        return
    say(f"linking {library.output.name}")
    run([*library.link, "-o", str(library.output), *map(str, objects), *library.link_flags])
    linked.write_text(names)


def build(libraries: list[Library]) -> None:
    """Brings every library's output up to date; one build at a time in this checkout."""
    BUILD.mkdir(parents=True, exist_ok=True)
    jobs = int(os.environ.get("MAX_JOBS", 0)) or len(os.sched_getaffinity(0))
    with open(BUILD / "lock", "w") as lock, ThreadPoolExecutor(jobs) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        compiling = []
        for library in libraries:
            library.folder.mkdir(exist_ok=True)
            compiling.append([pool.submit(compile_source, library, source) for source in library.sources])
        for library, objects in zip(libraries, compiling, strict=True):
            link_objects(library, [job.result() for job in objects])


class BuildLibraries(build_ext):
    """setuptools' build_ext, with the compiling done above."""

    def run(self) -> None:
        self.force = True  # copy by plan, not by time: another plan's library may be the newer file
        self.planned = {f"lead_fast.{library.name}": library for library in plan(self.distribution.get_version())}
        build(list(self.planned.values()))
        for ext in self.extensions:
            if ext.name not in self.planned:
                self.remove_earlier(ext)
        self.extensions = [ext for ext in self.extensions if ext.name in self.planned]
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.build_lib, self.get_ext_filename(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(self.planned[ext.name].output, target)

    def remove_earlier(self, ext: Extension) -> None:
        """An earlier build's library that this one leaves out must not slip into the wheel or the checkout."""
        filename = self.get_ext_filename(ext.name)
        Path(self.build_lib, filename).unlink(missing_ok=True)
        if self.inplace:
            Path(ROOT, filename).unlink(missing_ok=True)

    def get_ext_filename(self, fullname: str) -> str:
        """`_ops_*.so` hold no Python, so they carry no Python version in their names."""
        if fullname.rpartition(".")[2].startswith("_ops_"):
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)


if __name__ == "__main__":
    names = [] if os.environ.get("LEAD_FAST_NO_EXT") == "1" else ["_C", "_ops_cpu", "_ops_cuda"]
    setup(
        ext_modules=[Extension(f"lead_fast.{name}", sources=[]) for name in names],
        cmdclass={"build_ext": BuildLibraries},
    )
