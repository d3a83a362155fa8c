# make setup   everything to work on hldm, in .venv        make demo   both stages and a sample, in minutes
# make test    style, types and the quick tests            make test-slow   the rest
# make docs    this documentation as a site, in build/site
# make torture kills, full disks, flipped bits, at full scale
#
# The versions installed are those of constraints.txt. A torch that is already in .venv is kept, whichever
# it is (pyproject.toml asks for 2.10 or newer). For CUDA, so: python3 -m venv .venv, install the torch
# for your driver into it, then make setup. Or let pip choose all versions: make setup CONSTRAINTS=

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
CONFIG ?= configs/tiny.yaml
BIN := .venv/bin
# torch's own threads and pytest's two processes would fight over the cores
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

.PHONY: setup demo test test-slow torture lint docs clean

setup: .venv/installed-dev
	@echo "hldm is ready in .venv ($$($(BIN)/python -V), torch $$($(TORCH_VERSION))). Next: source .venv/bin/activate"

demo: .venv/installed
	@echo "using .venv ($$($(BIN)/python -V), torch $$($(TORCH_VERSION)))"
	$(BIN)/hldm demo --config $(CONFIG)

test: lint
	$(PYTEST) -n 2 -m "not slow"

test-slow: .venv/installed-dev
	$(PYTEST) -m slow

torture: .venv/installed-dev
	$(BIN)/python -m tests.torture

lint: .venv/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "the documentation is in build/site/index.html"

clean:
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -not -path "./.venv/*" -prune -exec rm -rf {} +

TORCH_VERSION := $(BIN)/python -c "from importlib.metadata import version; print(version('torch'))" 2>/dev/null

$(BIN)/python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || \
	  { echo "hldm needs Python 3.10 or newer, and $(PYTHON) is not: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c "import ensurepip, venv" 2>/dev/null || \
	  { echo "$(PYTHON) has no venv module: install it (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv .venv

# $(call install,WHAT): with the constraints, less the one on torch where .venv has a torch
define install
	@version=$$($(TORCH_VERSION)) && echo "keeping torch $$version of .venv" || true
	@sed "$$($(TORCH_VERSION) >/dev/null && echo '/^torch==/d')" $(or $(CONSTRAINTS),/dev/null) > .venv/constraints.txt
	$(BIN)/python -m pip install -c .venv/constraints.txt -e "$(1)"
	@touch $@
endef

.venv/installed: pyproject.toml $(wildcard $(CONSTRAINTS)) | $(BIN)/python
	$(call install,.)

.venv/installed-docs: pyproject.toml $(wildcard $(CONSTRAINTS)) | $(BIN)/python
	$(call install,.[docs])
	@touch .venv/installed

.venv/installed-dev: pyproject.toml $(wildcard $(CONSTRAINTS)) | $(BIN)/python
	$(call install,.[dev])
	@touch .venv/installed
