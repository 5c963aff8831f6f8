# run          set up and serve the built-in model          make run ARGS="--port 9000"
# test         set up and run every test                    make test ARGS="tests/web -k pipeline"
# check        lint, types and the import rules
# format       fix what the linter can fix, and format
# fixtures     fetch the models, vocabularies and templates that tests read (170 MB, kept in ~/.cache)
# conformance  install the real clients that tests use, each into .venv-conformance/NAME
# llamacpp     compile llama.cpp for this processor into .venv, for ARM boards; takes minutes
# finetune     install what fine-tuning needs into .venv: torch, without CUDA where the index has such a build
# san          run the C module under the address and undefined-behaviour sanitizers
# fuzz         run the C module's fuzz targets, FUZZ_SECONDS each
# bench        print every benchmark's table
# model        train the built-in model again (installs torch into .venv-train)
# dist         build the wheel and the source archive
# clean        remove build files and caches; the environments stay

VENV := .venv
BIN := $(VENV)/bin
FUZZ_SECONDS ?= 30
# 0: go without the engine for today's models
LLAMACPP ?= 1
NATIVE := setup.py pyproject.toml $(wildcard csrc/*.c csrc/*.h csrc/*.py)

# ctransformers' wheel has libraries for x86-64 only; on other processors pip compiles it with a C++ compiler.
ifeq ($(filter x86_64 amd64,$(shell uname -m)),)
export PIP_NO_BINARY := ctransformers
COMPILED := yes
LASTS := some minutes the first time: ctransformers is compiled for this processor
else
LASTS := a minute the first time
endif

ifneq ($(LLAMACPP),0)
ENGINE := $(VENV)/.installed-llamacpp
endif

.DEFAULT_GOAL := help
.PHONY: help run test check format fixtures conformance llamacpp finetune san fuzz bench model dist clean

help:
	@sed -n 's/^# \([a-z]\)/make \1/p; /^$$/q' Makefile

run: $(VENV)/.installed $(ENGINE)
	@exec $(BIN)/python -m tinyoai $(ARGS)

test: $(VENV)/.installed-dev $(ENGINE)
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_house.py

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

san: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests/csrc

fuzz: $(VENV)/.installed-dev
	$(BIN)/python -m tests.csrc.programs --seconds $(FUZZ_SECONDS)

bench: $(VENV)/.installed-dev
	for name in decode sampler startup concurrent_streams http_path pooling builtin_streams; do $(BIN)/python bench/$$name.py || exit 1; done
	@model=$$($(BIN)/python -c 'from tests.fixtures import smollm2; print(smollm2() or "")'); \
	if [ -z "$$model" ]; then echo "make fixtures fetches the model of the benchmarks beside llama-server" >&2; fi; \
	for name in load llama_server conversations restart two_models stalls; do [ -z "$$model" ] || $(BIN)/python bench/$$name.py "$$model" || exit 1; done

fixtures: $(VENV)/.installed-dev
	@$(BIN)/python -m tests.fetch

conformance: $(VENV)/.made
	$(BIN)/python .ci/conformance

llamacpp: $(VENV)/.installed
	@$(BIN)/python .ci/llamacpp compile

finetune: $(VENV)/.installed-dev
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c training/requirements.txt torch gguf

model: $(VENV)/.made
	$(VENV)/bin/python -m venv .venv-train
	.venv-train/bin/python -m pip install -q -r training/requirements.txt
	.venv-train/bin/python -m training.make

dist: $(VENV)/.installed-dev
	$(BIN)/python -m build

# Before anything is built: one sentence for each thing that the machine lacks, with the command to install it.
$(VENV)/.made:
	@python=$$(.ci/python) && command -v "$${CC:-cc}" >/dev/null || { \
	  [ -z "$$python" ] || echo "tinyoai builds a small C module and needs a C compiler: install one (Debian, Ubuntu: apt install gcc) or name yours in CC." >&2; \
	  exit 1; }; \
	[ -z "$(COMPILED)" ] || command -v "$${CXX:-c++}" >/dev/null || { \
	  echo "ctransformers is compiled for this processor and needs a C++ compiler: install one (Debian, Ubuntu: apt install g++) or name yours in CXX." >&2; \
	  exit 1; }; \
	"$$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_paths()["include"] + "/Python.h"))' || { \
	  echo "$$python has no C headers: install them (Debian, Ubuntu: apt install python3-dev)." >&2; exit 1; }; \
	"$$python" -m venv $(VENV) || { \
	  echo "$$python cannot create a virtual environment: install its venv module (Debian, Ubuntu: apt install python3-venv)." >&2; \
	  rm -rf $(VENV); exit 1; }
	@$(BIN)/python -m pip install -q --disable-pip-version-check --upgrade pip
	@touch $@

$(VENV)/.installed: $(VENV)/.made $(NATIVE)
	@echo "installing tinyoai into $(VENV) ($(LASTS))" >&2
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e .[docs,metrics]
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.made $(NATIVE)
	@echo "installing tinyoai and its test tools into $(VENV) ($(LASTS))" >&2
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e .[docs,metrics,dev]
	@touch $@ $(VENV)/.installed

# Where there is no wheel or no network, the server runs without this engine, and the next call tries again.
$(VENV)/.installed-llamacpp: $(VENV)/.made pyproject.toml .ci/llamacpp
	@if $(BIN)/python .ci/llamacpp; then touch $@; fi

clean:
	rm -rf build dist *.egg-info tinyoai/_native.* csrc/build .mypy_cache .ruff_cache .pytest_cache .hypothesis
