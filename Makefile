# Two commands: `make demo` and `make test`. Each makes the environment first when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: demo test lint clean

demo: $(STAMP)
	$(BIN)/fsar-preprocess synthetic --out demo/shards
	@rm -rf demo/run
	$(BIN)/fsar-train --shards demo/shards --method molo --run demo/run --shuffle-control
	@echo "open demo/run/report.html"

test: $(STAMP) lint
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt torch
	$(PIP) --constraint constraints.txt --editable ".[dali,dev]"
	@touch $@

clean:
	rm -rf $(VENV) demo
