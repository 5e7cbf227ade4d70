# Sets up virtual environments and runs the demo, the tests and the checks in them. Needs Python >= 3.10 with venv, and nothing else.
#
#   make demo         train a small Whisper on speech with one line added; show what probe shows
#   make test         run the tests with the newest supported transformers
#   make test-all     run the tests that take minutes, too
#   make test-matrix  run the tests with the newest, the last 4.x and the oldest supported transformers
#   make test-oldest  run the tests with the oldest one only
#   make check        lint, format, types, the documentation and its examples
#   make format       put the source into the format that "make check" asks for
#   make bench-units  measure what one unit of the probe's work costs; writes benchmarks/results/units-*.json
#   make bench-gpu    check synchronisations, copies, kernels and gaps of sampled steps on a CUDA device, where there is one
#   make scaling      compute the cost on many ranks and for 70B models from the units; writes docs/scaling.md
#   make bench        measure what the probe costs beside a plain Trainer and other tools; writes docs/overhead.md; about two hours on two cores
#   make exactness    measure attention, heads and loss audit against independent references; writes docs/exactness.md
#   make verdicts     train the example voice cloner and broken variants of it over five seeds; writes docs/verdicts-table.md
#   make faults       break trainings on purpose, and see what the findings say; writes docs/faults.md
#   make clean        remove what these commands made
#
# Variables:
#   PYTHON=python3.12       the Python to use; otherwise the first of python3, python3.13 ... python3.10 that fits
#   PIP_FLAGS="..."         given to every pip install, such as --extra-index-url https://download.pytorch.org/whl/cpu for torch without CUDA
#   DEMO_FLAGS="..."        given to the demo, such as --data FOLDER or --steps 100
#   BENCH_FLAGS="..."       given to the benchmark, such as --models tiny --minutes 5
#   PYTEST_FLAGS="..."      given to pytest; the default runs two processes

PYTHON ?=
PIP_FLAGS ?=
DEMO_FLAGS ?=
BENCH_FLAGS ?=
PYTEST_FLAGS ?= -n 2 --dist loadfile
DEMO_OUTPUT := demo-output

# Two test processes with as many threads each as there are cores would get in each other's way.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.DELETE_ON_ERROR:
.PHONY: demo test test-all test-matrix test-middle test-oldest check lint types docs format bench exactness verdicts clean

demo: .venv/.demo
	rm -rf $(DEMO_OUTPUT)
	HF_HUB_OFFLINE=1 .venv/bin/python docs/examples/finetune_whisper.py --output-dir $(DEMO_OUTPUT) $(DEMO_FLAGS)
	.venv/bin/python docs/examples/read_run.py $(DEMO_OUTPUT)/_probe

test: .venv/.dev
	$(TEST_ENV) .venv/bin/python -m pytest $(PYTEST_FLAGS)

test-all: .venv/.dev
	$(TEST_ENV) .venv/bin/python -m pytest $(PYTEST_FLAGS) --slow

test-middle: .venv-middle/.test
	$(TEST_ENV) .venv-middle/bin/python -m pytest $(PYTEST_FLAGS)

test-oldest: .venv-oldest/.test
	$(TEST_ENV) .venv-oldest/bin/python -m pytest $(PYTEST_FLAGS)

test-matrix: test test-middle test-oldest

check: lint types docs

lint: .venv/.dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: .venv/.dev
	.venv/bin/mypy --strict probe

docs: .venv/.dev
	$(TEST_ENV) .venv/bin/python -m pytest tests/test_docs_examples.py
	.venv/bin/sphinx-build -W -q -b html docs docs/_build/html

format: .venv/.dev
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

# All cores: what is measured is a training as it is run. The profiler that weighs a step's memory would else tell of itself in each.
bench: .venv/.bench
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false KINETO_LOG_LEVEL=99 .venv/bin/python -m benchmarks.overhead $(BENCH_FLAGS)

.PHONY: bench-units bench-gpu scaling
bench-units: .venv/.dev
	PYTHONPATH=.:tests HF_HUB_OFFLINE=1 .venv/bin/python -m benchmarks.units

bench-gpu: .venv/.dev
	PYTHONPATH=.:tests HF_HUB_OFFLINE=1 .venv/bin/python -m benchmarks.gpu

scaling: .venv/.dev
	PYTHONPATH=.:tests HF_HUB_OFFLINE=1 .venv/bin/python -m benchmarks.scaling

exactness: .venv/.dev
	PYTHONPATH=.:tests HF_HUB_OFFLINE=1 .venv/bin/python -m benchmarks.exactness

verdicts: .venv/.dev
	OMP_NUM_THREADS=1 PYTHONPATH=.:docs/examples HF_HUB_OFFLINE=1 .venv/bin/python -m benchmarks.verdicts

faults: .venv/.dev
	PYTHONPATH=.:tests OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 .venv/bin/python -m benchmarks.faults

clean:
	rm -rf .venv .venv-middle .venv-oldest $(DEMO_OUTPUT) build dist docs/_build .pytest_cache .mypy_cache .ruff_cache trainer_probe.egg-info

# ---- virtual environments: a stamp file for each set of packages, made anew when what it depends on changes

INSTALL = -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS)

.venv/.demo: .venv/.made setup.cfg constraints/newest.txt constraints/common.txt
	.venv/bin/python $(INSTALL) -c constraints/newest.txt -e '.[demo]'
	touch $@

.venv/.dev: .venv/.made setup.cfg constraints/newest.txt constraints/common.txt
	.venv/bin/python $(INSTALL) -c constraints/newest.txt -e '.[dev]'
	touch $@

.venv/.bench: .venv/.made setup.cfg constraints/newest.txt constraints/common.txt
	.venv/bin/python $(INSTALL) -c constraints/newest.txt -e '.[bench]'
	touch $@

.venv-%/.test: .venv-%/.made setup.cfg constraints/%.txt constraints/common.txt
	.venv-$*/bin/python $(INSTALL) -c constraints/$*.txt -e '.[test]'
	touch $@

# A Python fits if it runs (shims of version managers may not), is new enough, and can make a virtual environment with pip in it.
FITS := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))

define MAKE_VENV
@set -e; \
for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.10); do \
    if "$$python" -c '$(FITS)' 2>/dev/null; then \
        echo "making $(@D) with $$("$$python" -c 'import platform, sys; print(sys.executable, platform.python_version())')"; \
        rm -rf $(@D); "$$python" -m venv $(@D); touch $@; exit 0; \
    fi; \
done; \
echo "None of these is a Python >= 3.10 with venv: $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.10)." >&2; \
echo "On Debian or Ubuntu: apt-get install python3 python3-venv. Elsewhere: make PYTHON=/path/to/python3 ..." >&2; \
exit 1
endef

.venv/.made:
	$(MAKE_VENV)

.venv-%/.made:
	$(MAKE_VENV)

.PRECIOUS: .venv-%/.made
