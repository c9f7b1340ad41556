# Every target sets up .venv by itself, once; change pyproject.toml or constraints.txt and it is brought up to date.
PYTHON ?= $(shell for python in python3 python3.11 python3.12 python3.13 python3.14; do \
  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$python; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# -qq: errors of pip's only, not its warnings.
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check

.PHONY: help install quickstart test lint test-lowest test-long test-gpu campaign clean
.DEFAULT_GOAL := help

help:
	@echo "make quickstart  train, build, verify and bench a small network here (about 5 minutes, nothing downloaded)"
	@echo "make test        ruff, mypy --strict, pytest: what CI runs"
	@echo "make lint        ruff and mypy only"
	@echo "make test-lowest the run-time half with the lowest versions that are allowed, without torch and onnx (a minute)"
	@echo "make test-long   the tests that take minutes (BDEXPORT_CIFAR10=DIR: CIFAR-10, python version)"
	@echo "make campaign    hostile files, kills, races and long use (MINUTES=20 SEED=1; REPLAY='KIND SEED NUMBER': one case)"
	@echo "make test-gpu    the tests that need an NVIDIA GPU"
	@echo "make clean       remove .venv and caches"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || \
	  { echo "Python 3.11 or newer is needed and not found: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (once; torch makes it take a few minutes)"
	@$(PIP_INSTALL) -c constraints.txt -e '.[build,cpu,openvino,tensorrt-rtx,report,sign,dev]'
	@touch $@

quickstart: $(STAMP)
	@$(BIN)/bdexport quickstart

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet . || { echo "formatting: run $(BIN)/ruff format ." >&2; exit 1; }
	@$(BIN)/mypy

test: lint
	@$(BIN)/pytest -q -n 2 --dist loadfile

# Neither torch nor onnx is installed there, as on a production machine. The folder's name is covered by .gitignore.
LOWEST := .venv/lowest
LOWEST_TESTS := $(addprefix tests/unit/test_,$(addsuffix .py,run_time_alone backend_arrays cli_console cli_main \
  dataset_samples files hardware preprocess runtime_grouping runtime_inputs))

test-lowest: $(LOWEST)/.installed
	@$(LOWEST)/bin/python -m pytest -q -p no:cacheprovider $(LOWEST_TESTS)

$(LOWEST)/.installed: pyproject.toml constraints-lowest.txt
	@test -n "$(PYTHON)" || \
	  { echo "Python 3.11 or newer is needed and not found: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	@$(LOWEST)/bin/python -m pip install -qq --disable-pip-version-check -c constraints-lowest.txt \
	  -e '.[cpu,openvino]' pytest pytest-timeout
	@touch $@

test-long: $(STAMP)
	@$(BIN)/pytest -q -m long

# It writes its figures, and what runs each failure again, to campaign.json.
MINUTES ?= 20
SEED ?= 1
campaign: $(STAMP)
	@PYTHONPATH=tests:tests/unit $(BIN)/python -m campaign $(if $(REPLAY),--replay $(REPLAY),--minutes $(MINUTES) --seed $(SEED) \
	  --json $(or $(JSON),campaign.json))

# With GPU_PYTHON=python3 the tests run in that Python as it is: where torch for CUDA is installed already. Its packages
# are of whatever versions, so their warnings are no failures, and only the folders with GPU tests are imported.
# The GPU is looked for before anything is installed.
test-gpu:
	@nvidia-smi -L 2>/dev/null | grep -q '^GPU' || \
	  { echo "test-gpu: no NVIDIA GPU found (nvidia-smi lists none); nothing was tested" >&2; exit 1; }
	@$(if $(GPU_PYTHON),,$(MAKE) --no-print-directory install)
	@$(or $(GPU_PYTHON),$(BIN)/python) -m pytest -q -m gpu -W default tests/gpu tests/contract

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
