# Two commands matter: `make demo` and `make test`. Both need Python >= 3.10, a C++ compiler and make; the rest is
# installed into .venv, in the exact versions of constraints.txt.

PYTHON ?= python3
# Passed to pip. On a Linux machine without a GPU, PyTorch's CPU wheels save gigabytes:
#   make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=
# Passed to pytest, demo or bench: make test ARGS="-k packed", make demo ARGS="--help", make bench ARGS="op --preset cpu"
ARGS ?=
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
REPORT ?= bench/results/test-gpu.json

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-gpu lint format bench clean

help:  ## this list
	@printf '\n  \033[1mm2rnn_compile\033[0m  the M2RNN recurrence as a compile-native PyTorch op\n\n'
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  \033[36mmake %-9s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@printf '\n  Options: ARGS="..." for the program, PYTHON=python3.12, PIP_ARGS="..." for pip, WORKERS=2 for pytest\n\n'

venv: $(STAMP)  ## create .venv with everything that demo and test need

# The folder is made anew whenever what is to be installed changes: no leftovers of an older set.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "m2rnn_compile needs Python >= 3.10; '$(PYTHON)' is not. Try: make PYTHON=python3.12 ..." >&2; exit 1; }
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "'$(PYTHON) -m venv' failed. On Debian or Ubuntu: apt-get install python3-venv" >&2; rm -rf $(VENV); exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check --no-input --progress-bar off -q \
	  -c constraints.txt $(PIP_ARGS) -e '.[dev,demo]'
	@touch $@

demo: $(STAMP)  ## train a small hybrid language model, generate, export, reload (under four minutes on 2 cores)
	$(BIN)/python -m m2rnn_compile demo $(ARGS)

# One thread a worker: two workers with a thread pool each would fight over the same cores.
test: lint  ## ruff, mypy and the whole test suite (no GPU needed)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-gpu:  ## the GPU suite with the current python (torch with CUDA, pytest); report in bench/results/
	$(PYTHON) -m pytest -m gpu --gpu-report $(REPORT) $(ARGS)

lint: $(STAMP)  ## ruff and mypy only
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)  ## let ruff sort imports and mend what it can
	$(BIN)/ruff check --fix .

bench: $(STAMP)  ## benchmarks: make bench ARGS="op --preset cpu --provider eager,cpp"
	$(BIN)/python -m bench $(if $(ARGS),$(ARGS),--help)

clean:  ## remove .venv, build outputs and caches (never bench/results)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
