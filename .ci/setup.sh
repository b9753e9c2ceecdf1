#!/bin/sh
# Makes .venv ready for one of the Makefile's targets: Python, torch, the package with its extension, and extras.
#   .ci/setup.sh [EXTRAS]       of pyproject.toml, for example test,bench
#
# Environment: PYTHON (python3), TORCH (torch==2.13.0), TORCH_INDEX_URL (pip's own index), and what setup.py reads.
# What was done is remembered in .venv by a hash of everything it depends on, so a second run ends at once.
set -eu
cd "$(dirname "$0")/.."

extras=${1:-}
python=${PYTHON:-python3}
torch=${TORCH:-torch==2.13.0}
venv=.venv

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

settings="$PWD $python $torch ${TORCH_INDEX_URL:-} ${CXX:-} ${LEAD_FAST_NO_EXT:-} ${LEAD_FAST_CUDA:-} ${TORCH_CUDA_ARCH_LIST:-}"
inputs=$({ printf '%s\n' "$settings"; find csrc setup.py pyproject.toml .ci/setup.sh -type f | LC_ALL=C sort | xargs sha256sum; } | sha256sum)
stamp="$venv/.lead-fast-${extras:-base}"
if [ -x "$venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$inputs" ]; then
    exit 0
fi

# What only the machine can provide: all that is missing is named at once.
command -v "$python" >/dev/null || die "Python 3.11 to 3.13 is missing; on Debian or Ubuntu: apt-get install python3 python3-venv python3-dev g++"
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' ||
    die "$("$python" --version) is too old or too new: Python 3.11 to 3.13 is needed; name one with PYTHON=/path/to/python3.11"
missing=
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing="$missing python3-venv"
if [ "${LEAD_FAST_NO_EXT:-}" != 1 ]; then
    "$python" -c 'import pathlib, sys, sysconfig; sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())' ||
        missing="$missing python3-dev"
    [ -n "${CXX:-}" ] || command -v g++ >/dev/null || command -v clang++ >/dev/null || missing="$missing g++"
fi
[ -z "$missing" ] || die "missing; on Debian or Ubuntu: apt-get install$missing"

"$venv/bin/python" -c '' 2>/dev/null || {
    say "making $venv"
    "$python" -m venv --clear "$venv"
}
install() { "$venv/bin/python" -m pip --disable-pip-version-check install --no-compile "$@"; }

install_torch() {
    if [ -n "${TORCH_INDEX_URL:-}" ]; then
        install --index-url "$TORCH_INDEX_URL" "$@"
    else
        install "$@"
    fi
}

has_nvidia_driver() { command -v nvidia-smi >/dev/null || [ -e /proc/driver/nvidia ]; }

say "installing $torch"
case $torch in
*==*+*) install_torch "$torch" ;;
*==*)
    # A machine without a driver cannot use the several GB of CUDA libraries that the plain release brings.
    if has_nvidia_driver; then
        install_torch "$torch"
    elif ! install_torch "$torch+cpu"; then
        say "the configured index has no CPU build $torch+cpu: installing $torch (TORCH_INDEX_URL names another index)"
        install_torch "$torch"
    fi
    ;;
*) install_torch "$torch" ;;
esac

say "installing lead-fast${extras:+ with its extras [$extras]}"
install --quiet 'setuptools>=77' wheel 'pybind11>=2.13'
install --no-build-isolation --editable ".${extras:+[$extras]}"
# To bytecode by all cores and without the packages' tests, where pip takes a minute with one.
"$venv/bin/python" -m compileall -q -j 0 -x '/tests?/' "$("$venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')" \
    >/dev/null 2>&1 || true # some packages hold files that are no Python of this version
printf '%s\n' "$inputs" | tee "$stamp" >"$venv/.lead-fast-base"
