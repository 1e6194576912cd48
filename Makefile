# `make demo`, `make test`, `make bench`. Each makes the environment first when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH_STAMP := $(VENV)/.installed-bench
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: demo test faults lint bench bench-gpu clean

demo: $(STAMP)
	$(BIN)/fsar-preprocess synthetic --out demo/shards
	@rm -rf demo/run
	$(BIN)/fsar-train --shards demo/shards --method molo --run demo/run --shuffle-control
	@echo "open demo/run/report.html"

test: $(STAMP) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# Up to twenty minutes on two cores: what the tests do a few times, hundreds and thousands of times.
faults: $(STAMP)
	TQDM_DISABLE=1 $(BIN)/python -m pytest -m faults -s

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# About a quarter of an hour on two cores; results and charts in benchmarks/results.
bench: $(BENCH_STAMP)
	$(BIN)/python -m benchmarks

bench-gpu: $(BENCH_STAMP)
	$(BIN)/python -m benchmarks.gpu --out gpu-results

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt torch
	$(PIP) --constraint constraints.txt --editable ".[dali,dev]"
	@touch $@

$(BENCH_STAMP): $(STAMP)
	$(PIP) --constraint constraints.txt --editable ".[bench]"
	@touch $@

clean:
	rm -rf $(VENV) demo gpu-results
