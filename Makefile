# Everything a contributor runs. `make help` lists the targets.
#
# VENV=       use the interpreter PYTHON as it is (a GPU image with its own torch): only kvevict itself is installed.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= auto

ifeq ($(VENV),)
PY := $(PYTHON)
READY := .installed
else
PY := $(VENV)/bin/python
READY := $(VENV)/.installed
endif

# On a CPU, work that is not about the kernels runs on the reference: the interpreter is slow.
PLAIN = KVEVICT_BACKEND=$$($(PY) -c "import torch; print('auto' if torch.cuda.is_available() else 'reference')")

.DEFAULT_GOAL := help
.PHONY: help setup demo train test lint bench quality quality-peers clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 15

setup: $(READY)  ## create .venv and install everything, at the pinned versions

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch triton
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

.installed: pyproject.toml
	$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

demo: $(READY)  ## evict from a real model's cache and ask it for a hidden fact (DEMO="--keep 0.3 ...")
	TRITON_INTERPRET=$$($(PY) -c "import torch; print(int(not torch.cuda.is_available()))") $(PY) -m kvevict demo $(DEMO)

train: $(READY)  ## train the learned scorer on a real model (TRAIN="--layers 4 ..."); the demo's --policy all takes it up
	$(PLAIN) $(PY) -m kvevict train $(TRAIN)

test: $(READY)  ## every check; on a machine without a GPU the kernels run in Triton's interpreter
	$(PY) -m pytest -n $(WORKERS) $(TEST)

lint: $(READY)  ## ruff (lint, format) and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(READY)  ## rooflines into bench/results/<device>/ (BENCH="--quick --out DIR")
	$(PY) -m bench $(BENCH)

quality: $(READY)  ## what a model still knows after eviction, every policy and share (QUALITY="--quick")
	$(PLAIN) $(PY) -m bench.quality $(QUALITY)

.venv-peers/.installed:
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-peers.txt torch triton
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-peers.txt kvpress rich gguf
	@touch $@

quality-peers: .venv-peers/.installed  ## kvpress beside our policies on the same samples (QUALITY="--samples 2")
	KVEVICT_BACKEND=reference PYTHONPATH=. .venv-peers/bin/python -m bench.quality_peers $(QUALITY)

clean:  ## remove the environment and caches, keep fetched models and results
	rm -rf .venv .venv-peers .installed build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
