# Two commands need nothing but Python >= 3.11, git and make: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/demo

.PHONY: help demo test test-all lint format types lock clean

help:
	@echo "make demo              the whole life of the model on synthetic recordings -> $(OUT)/report.html"
	@echo "make demo DATA=FOLDER  the same on your recordings (with FOLDER/labels.csv)"
	@echo "make test              the test suite"
	@echo "make test-all          the test suite with its slow part and, with PyTorch, the parity tests against PyTorch"
	@echo "make lint | format | types | lock"

demo: $(BIN)/.installed
	$(BIN)/python examples/demo.py --out $(OUT) $(if $(DATA),--data "$(DATA)")

test: $(BIN)/.installed-dev
	$(BIN)/python -m pytest -n auto --maxprocesses 4 -m "not slow"

test-all: $(BIN)/.installed-dev
	$(BIN)/python -m pytest -n auto --maxprocesses 4

lint: $(BIN)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(BIN)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(BIN)/.installed-dev
	$(BIN)/pyright

# The locks hold for every platform and Python; needs `uv`.
lock:
	uv pip compile pyproject.toml --universal --fork-strategy fewest --python-version 3.11 --no-header --no-emit-index-url --no-annotate -o requirements.lock
	uv pip compile pyproject.toml --extra dev --universal --fork-strategy fewest --python-version 3.11 --no-header --no-emit-index-url --no-annotate -o requirements-dev.lock

clean:
	rm -rf runs build .pytest_cache .ruff_cache *.egg-info

$(BIN)/python:
	$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 11) else 'lumamba_jax needs Python 3.11 or newer: make PYTHON=python3.11 ...')"
	$(PYTHON) -m venv $(VENV)

$(BIN)/.installed: requirements.lock pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

$(BIN)/.installed-dev: requirements-dev.lock $(BIN)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.lock
	@touch $@
