"""Means since the last record of a log: loss terms, rate, share of time spent waiting for data."""

from __future__ import annotations

import resource
import time

import torch

from fsar.training.step import Reading


class Meter:
    """Counts what a loop did; `unit` names what the rate counts, such as "episodes"."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, float] = {}
        self._counted = self._units = 0
        self._wait, self._start = 0.0, time.perf_counter()

    def wait(self, seconds: float, *, units: int = 1) -> None:
        """Count what one step reads, and the wait for it."""
        self._units += units
        self._wait += seconds

    def add(self, reading: Reading) -> None:
        """Add what the step has counted."""
        self._counted += reading.counted
        for name, value in reading.sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def record(self) -> dict[str, float]:
        """The means, and start anew."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        means = {name: value / self._counted for name, value in self._sums.items() if self._counted}
        means |= {f"{self._unit}_per_s": self._units / seconds, "data_wait": self._wait / seconds}
        means["memory_mb"] = (
            torch.cuda.max_memory_allocated() / 1e6
            if torch.cuda.is_available()
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        )
        self._reset()
        return {name: round(value, 6) for name, value in means.items()}
