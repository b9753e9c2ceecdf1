#!/bin/sh
# On a bare CUDA machine, within ten minutes and without a network: build, test what is marked `cuda`, benchmark, print the table.
#   .ci/gpu.sh [RESULTS]        folder for logs and tables, benchmarks/results by default; LIMIT=570 seconds
#
# The machine's own python (PYTHON, python3) is used as it is. The package goes into .venv-gpu, which sees that python's
# packages; nothing is downloaded. Wheels in the folder WHEELS, if set, are installed there first; what is missing is named.
set -eu
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
results=${1:-benchmarks/results}
venv=.venv-gpu

limit=${LIMIT:-570}
start=$(date +%s)

say() { printf 'gpu: %s\n' "$*" >&2; }
# Seconds for a part: at most $1, and what the parts after it do not need ($2).
within() {
    left=$((limit - $(date +%s) + start - $2))
    [ "$left" -lt "$1" ] || left=$1
    echo $((left > 1 ? left : 1))
}

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { say "no CUDA device that torch can use"; exit 1; }
mkdir -p "$results"
"$python" -m venv --clear --without-pip "$venv"
# The python may live in a venv itself, whose packages a new venv does not see: they are named. pip and setuptools are its own.
"$python" -c 'import site; print("\n".join(site.getsitepackages()))' >"$("$venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')/parent.pth"
py="$PWD/$venv/bin/python"
if [ -n "${WHEELS:-}" ]; then
    "$py" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl
fi
missing=$("$py" -c '
from importlib.util import find_spec
names = "torch triton transformers accelerate peft safetensors pyarrow sklearn matplotlib yaml tqdm jinja2 numpy"
names += " pybind11 setuptools pytest pytest_benchmark pytest_timeout hypothesis"
print(*[name for name in names.split() if find_spec(name) is None])')
[ -z "$missing" ] || { say "missing: $missing; give their wheels in WHEELS=folder"; exit 1; }
optional=$("$py" -c '
from importlib.util import find_spec
print(*[name for name in "flash_attn trl datasets bitsandbytes liger_kernel".split() if find_spec(name) is None])')
[ -z "$optional" ] || say "not there, and so not tested: $optional"
"$py" -c 'import setuptools, sys; sys.exit(int(setuptools.__version__.split(".")[0]) < 77)' || { say "setuptools must be 77 or newer"; exit 1; }
say "building"
# For this card alone: other architectures are the package's, and would take the time of its tests.
card=$("$py" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))')
LEAD_FAST_CUDA=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$card} "$py" -m pip install --quiet --no-index --no-deps --no-build-isolation --editable .
"$py" -m lead_fast.cli doctor >"$results/gpu-doctor.txt"
cat "$results/gpu-doctor.txt"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee -a "$results/gpu-doctor.txt"
say "testing"
failed=0
# Most of a test's time is its kernels' compilation, on the host: several processes where pytest-xdist is there.
parallel=$("$py" -c '
from importlib.util import find_spec; import os
print(f"-n {min(8, len(os.sched_getaffinity(0)) // 2 or 1)} --dist worksteal" if find_spec("xdist") else "")')
# shellcheck disable=SC2086  the words are options
OMP_NUM_THREADS=2 timeout "$(within 240 200)" "$py" -m pytest -q -rs -m cuda --durations=5 $parallel tests 2>&1 | tee "$results/gpu-tests.txt" || failed=1
tail -n 1 "$results/gpu-tests.txt" | grep -q passed || failed=1
if grep -Eq '[0-9]+ (failed|error)' "$results/gpu-tests.txt"; then failed=1; fi
say "benchmarking the state"
timeout "$(within 60 120)" "$py" benchmarks/test_state.py --device cuda --sizes 100000 1000000 10000000 --rounds 5 --out "$results" || {
    failed=1
    say "the benchmark of the state failed or ran out of time; what it had measured:"
    cat "$results/state_cuda.md" || true
}
say "benchmarking the fused loss"
timeout "$(within 270 0)" "$py" benchmarks/test_linear_cross_entropy.py --device cuda --out "$results" || {
    failed=1
    say "the benchmark of the loss failed or ran out of time; what it had measured:"
    cat "$results/linear_cross_entropy_cuda.md" || true
}
exit $failed
