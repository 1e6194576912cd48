"""Run a training from its last checkpoint to its end: steps, log, progress bar, checkpoints."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from tqdm import tqdm

from fsar.run import ranks
from fsar.run.device import keep_freed_memory
from fsar.run.folder import RunLog
from fsar.training.step import Reading
from shards_spec.errors import FsarError


class Batch(NamedTuple):
    """A batch that is ready to be trained on.

    Attributes:
        number: The batch and its random values are functions of this number.
        content: The input of a step.
        size: Episodes, samples or clips of the batch, in all processes.
        wait: Seconds that passed until it was ready.
    """

    number: int
    content: Any
    size: int
    wait: float


@dataclass
class Progress:
    """The state of a loop that a resumed run needs, with weights and optimiser.

    Attributes:
        n: Episodes or steps that are done.
        skipped: Batches whose loss was not finite; they changed nothing.
        skipped_steps: Steps of the optimiser left out: a gradient was not finite, or all batches
            were skipped.
        seconds: Time spent in the loop, validation included.
    """

    n: int = 0
    skipped: int = 0
    skipped_steps: int = 0
    seconds: float = 0.0

    def add(self, reading: Reading) -> None:
        """Count the skipped batches and steps of a reading."""
        self.skipped += reading.skipped
        self.skipped_steps += reading.skipped_steps


class AnyTrainer(Protocol):
    """The contract of a loop with those who train a few-shot method, a trunk or a classifier."""

    progress: Progress

    @property
    def model(self) -> nn.Module:
        """The model, on the device where it computes."""

    @property
    def run(self) -> Path | None:
        """Folder of log and checkpoints; None: neither is written."""

    def batches(self) -> Generator[Batch]:
        """Yield the batches that are left after `progress`."""

    def train_step(self, n: int, batch: Any) -> None:  # noqa: ANN401 -- each trainer's own kind
        """Train on the batch of number n."""

    def read(self) -> Reading:
        """Return the counts since the last reading; this waits for the device."""

    def log_values(self, n: int) -> dict[str, float]:
        """Return further values of a log record after n units, such as the learning rate."""

    def save(self) -> None:
        """Write the checkpoint from which a run is resumed."""


@dataclass(frozen=True)
class Loop:
    """The loop over the batches of a trainer.

    `total`, `stride` and the intervals count units: episodes or steps.  At the end of a run
    everything is due.

    Attributes:
        trainer: Knows what a step is, what the log says and what is saved.
        total: Units of the whole run.
        unit: Name of a unit: "episode" or "step".
        items: Name of the things that the rate counts: "episodes", "samples" or "clips".
        log_every: Units between records of the log.
        save_every: Units between checkpoints.
        validate: Measures the model as it stands, and logs that.
        validate_every: Units between validations, each followed by a checkpoint; 0: none.
        stride: Units that one step of all processes takes.
        log_unit: Units that count as one in the log, such as the steps of an epoch.
        most_skipped: Batches in a row whose loss may be not finite.
        label: Name of the progress bar.
    """

    trainer: AnyTrainer
    total: int
    unit: str
    items: str
    log_every: int
    save_every: int
    validate: Callable[[RunLog], None] | None = None
    validate_every: int = 0
    stride: int = 1
    log_unit: int = 1
    most_skipped: int = 20
    label: str = "train"

    def train(self) -> None:
        """Take all steps that are left.

        Raises:
            FsarError: the loss stays not finite.
            DiskError: the disk is full.
        """
        trainer, progress = self.trainer, self.trainer.progress
        averages, began = Averages(self.items), time.monotonic() - progress.seconds
        trainer.model.train()
        with (
            RunLog(trainer.run, progress.n // self.log_unit) as log,
            tqdm(total=self.total, initial=progress.n, unit=self.unit, desc=self.label, smoothing=0.1) as bar,
            closing(trainer.batches()) as batches,
        ):
            for place, batch in enumerate(batches):
                trainer.train_step(batch.number, batch.content)
                if place == 0:  # the first step shows how much memory is needed
                    keep_freed_memory(next(trainer.model.parameters()).device)
                averages.count(batch.size, batch.wait)
                progress.n += self.stride
                progress.seconds = round(time.monotonic() - began, 3)
                bar.update(self.stride)
                self._after_step(averages, log, bar)
        ranks.wait_for_all()  # the first process may still write the checkpoint that the others read

    def _after_step(self, averages: Averages, log: RunLog, bar: Any) -> None:  # noqa: ANN401 -- tqdm has no types
        """Log, validate and save, each where it is due."""
        trainer, n = self.trainer, self.trainer.progress.n
        logs, validates, saves = map(self._is_due, (self.log_every, self.validate_every, self.save_every))
        if logs or validates or saves:  # reading waits for the device, so it is not done after every step
            averages.add(self._read())
        if logs:
            record = averages.record() | trainer.log_values(n)
            averages.reset()
            log.write("train", n // self.log_unit, **record)
            bar.set_postfix_str(f"loss {record.get('loss', math.nan):.3f}" + _accuracy_text(record))
        if validates and self.validate is not None:
            self.validate(log)
        if (validates or saves) and trainer.run is not None and ranks.is_first():
            log.make_durable()  # a checkpoint must not know more than the log
            trainer.save()

    def _is_due(self, every: int) -> bool:
        """Tell whether the last step completed an interval; stride need not divide it."""
        n = self.trainer.progress.n
        return every > 0 and (n == self.total or n // every > (n - self.stride) // every)

    def _read(self) -> Reading:
        reading = self.trainer.read()
        self.trainer.progress.add(reading)
        if reading.longest > self.most_skipped:
            raise FsarError(f"the loss of {reading.longest} {self.unit}s in a row is not finite; lower --lr")
        return reading


def _accuracy_text(record: dict[str, float]) -> str:
    return f", accuracy {record['accuracy']:.1%}" if "accuracy" in record else ""


class Averages:
    """Mean losses and accuracies, and the rate of a loop, since the last record.

    Args:
        items: Name of the things that the rate counts, such as "episodes".
    """

    def __init__(self, items: str) -> None:
        self._items = items
        self.reset()

    def reset(self) -> None:
        """Start anew, the clock too."""
        self._totals: dict[str, float] = {}
        self._counted = self._size = 0
        self._wait, self._start = 0.0, time.perf_counter()

    def count(self, size: int, wait: float) -> None:
        """Count the items of a batch, and the seconds until it was ready."""
        self._size += size
        self._wait += wait

    def add(self, reading: Reading) -> None:
        """Add the totals of some batches."""
        self._counted += reading.counted
        for name, value in reading.totals.items():
            self._totals[name] = self._totals.get(name, 0.0) + value

    def record(self) -> dict[str, float]:
        """Return means, items per second, share of time waited for data, and peak memory in MB."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        means = {name: value / self._counted for name, value in self._totals.items() if self._counted}
        means |= {f"{self._items}_per_s": self._size / seconds, "data_wait": self._wait / seconds}
        means["memory_mb"] = (
            torch.cuda.max_memory_allocated() / 1e6
            if torch.cuda.is_available()
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        )
        return {name: round(value, 6) for name, value in means.items()}
