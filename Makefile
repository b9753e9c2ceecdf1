# Every target sets itself up: a virtual environment in .venv, torch, the package with its extension (.ci/setup.sh).
#   make test TORCH=torch==2.12.0 TORCH_INDEX_URL=... PYTHON=python3.12

.PHONY: demo test test-kill bench gpu gpu-price gpu-train gpu-tune lint clean
.DEFAULT_GOAL := demo

demo:
	@.ci/setup.sh
	.venv/bin/lead-fast demo --out demo-run --overwrite

# A process a core, each with one thread; a file's tests stay together, for what they share.
test:
	@.ci/setup.sh test
	OMP_NUM_THREADS=1 .venv/bin/pytest -q --durations=15 -n logical --dist loadfile --no-loadscope-reorder tests

# Fifty runs killed by SIGKILL at seeded random moments, resumed, and compared with runs that were not killed.
test-kill:
	@.ci/setup.sh test
	.venv/bin/pytest -q -m kill tests/test_kill.py

bench:
	@.ci/setup.sh test,bench
	.venv/bin/pytest -q --timeout=0 benchmarks

# On a machine with a CUDA card, with its python as it is: build, the tests marked cuda, benchmarks, the table.
gpu:
	@.ci/gpu.sh

# After `make gpu`, in its environment: what LEAD costs a training step of an 8B-shape Llama. About a quarter of an hour; the
# results are written after every round, and `--add` goes on from them.
gpu-price:
	.venv-gpu/bin/python benchmarks/test_estimation_price.py --device cuda

# After `make gpu`: this loop beside Trainer, TRL and a loop in the published style, on an 8B-shape Llama.
gpu-train:
	.venv-gpu/bin/python benchmarks/train/test_train.py --device cuda

# After `make gpu`: launch configurations of the Triton kernels on this card, for their tables.
gpu-tune:
	.venv-gpu/bin/python benchmarks/tune_kernels.py

lint:
	@.ci/setup.sh dev,test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/clang-format --dry-run --Werror $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
	.venv/bin/pyright

# Keeps .venv; the next target rebuilds the extension into it.
clean:
	rm -rf build dist *.egg-info demo-run .pytest_cache .ruff_cache .hypothesis .benchmarks .venv/.lead-fast-*
	rm -f lead_fast/*.so
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
