# `make demo` and `make test` need python3 >= 3.11 with venv, and g++; everything else they install
# into $(VENV) themselves. Extra arguments for pip: make demo PIP_ARGS="--extra-index-url ..."
VENV ?= .venv
PYTHON ?= $(firstword $(foreach name,python3 python3.14 python3.13 python3.12 python3.11, \
	$(shell $(name) -c 'import sys; sys.version_info >= (3, 11) and print("$(name)")' 2>/dev/null)))
PIP_ARGS ?=
PYTEST_ARGS ?=
DEMO_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NVRTC := $(VENV)/nvrtc/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test bench bench-gpu kernels lint install clean

help:
	@echo "make demo    train the tiny model at 4 and 2 bits, write demo/report.html (5 minutes)"
	@echo "make test    run the test suite, one process per core (TEST_PROCESSES=0: in one process)"
	@echo "make bench   run the benchmarks"
	@echo "make bench-gpu  the same on an NVIDIA GPU, in the Python environment at hand"
	@echo "make kernels write docs/kernels.md from the compilers' reports"
	@echo "make lint    ruff and mypy"
	@echo "make clean   remove $(VENV) and what the other targets wrote"

# One test process per core, each with one thread: most tests are Python and compilers, and a process
# that waits sleeps instead of spinning on a core that another one could use.
TEST_PROCESSES ?= auto
test: export OMP_WAIT_POLICY ?= PASSIVE
test: export OMP_NUM_THREADS ?= 1

demo: $(STAMP)
	$(BIN)/qmir demo --output demo $(DEMO_ARGS)

test: $(STAMP) $(NVRTC)
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --maxprocesses 8 --dist loadfile $(PYTEST_ARGS)

bench: $(STAMP)
	$(BIN)/python -m pytest -m bench tests/bench $(PYTEST_ARGS)

# Where torch, torchao, CuPy, pytest and pytest-benchmark are installed; nothing is built or installed.
bench-gpu:
	$(or $(PYTHON),python3) -m pytest -m bench tests/bench/gpu $(PYTEST_ARGS)

kernels: $(STAMP) $(NVRTC)
	PYTHONPATH=tests $(BIN)/python -m support.kernel_table

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { \
	  echo "error: Python 3.11 or newer is missing. Debian/Ubuntu: sudo apt install python3" >&2; \
	  echo "       (or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12)" >&2; exit 1; }
	@command -v "$${CXX:-g++}" >/dev/null 2>&1 || command -v clang++ >/dev/null 2>&1 || { \
	  echo "error: a C++ compiler is missing. Debian/Ubuntu: sudo apt install g++" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: Python's venv module is missing." \
	    "Debian/Ubuntu: sudo apt install python3-venv" >&2; exit 1; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) \
	  -e ".[recipes,dev]" -c constraints.txt
	@touch $@

# Compilers for the proof that the CUDA kernels compile. Without them those tests are skipped.
$(NVRTC): tests/support/nvrtc.txt | $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --upgrade \
	  --target $(VENV)/nvrtc --no-deps -r $< && touch $@ || \
	  echo "note: no NVRTC for this machine; the tests that compile CUDA kernels are skipped" >&2

clean:
	rm -rf $(VENV) demo build dist .pytest_cache .mypy_cache .ruff_cache .benchmarks *.egg-info
