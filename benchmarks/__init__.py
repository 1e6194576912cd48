"""Measurements: each module prints a table and writes its rows to `benchmarks/results/`."""
