"""Check what only a GPU can answer: how busy training keeps it, and whether a step waits or allocates."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure.bounds import synchronise
from benchmarks.sides.step_side import Side, Sizes, make_episode, make_model
from fsar.episode import Episode
from fsar.run.config import RunConfig, build_config
from fsar.training.optim import create_optimizer
from fsar.training.step import TrainingStep
from fsar.training.trainer import Trainer
from pipelines.episodes.rules import EpisodeRules
from shards_spec import ShardSet
from shards_spec.errors import FsarError

UNCOUNTED = 8  # episodes before the clock starts: a graph is captured, decoders start
NEVER = 1_000_000  # episodes
CHECKED = 4  # steps


class _EnoughError(Exception):
    """Ends a training run whose time is over."""


class Stopwatch:
    """Seconds between two places of the device's stream; on a CPU of its clock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pairs: list[tuple[Any, Any]] = []

    def mark(self) -> Any:  # noqa: ANN401 -- an event or a number
        """A place."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, start: Any, end: Any) -> None:  # noqa: ANN401
        """Count what lies between."""
        self._pairs.append((start, end))

    def seconds(self) -> float:
        """All that was counted; waits for the device."""
        synchronise(self._device)
        if self._device.type != "cuda":
            return float(sum(end - start for start, end in self._pairs))
        return sum(start.elapsed_time(end) for start, end in self._pairs) / 1000


class TimedTrainer(Trainer):
    """A trainer that times its steps, and ends after some seconds."""

    def time_steps(self, seconds: float) -> dict[str, Any]:
        """Train, and say how much of the time the device spent between the start and the end of a step.

        That is an upper bound of the share in which a kernel ran: with a graph the two are nearly the same; without,
        gaps between kernels count as busy.  Decoding, uploads and augmentation lie outside of steps.
        """
        self._seconds, self._watch, self._count = seconds, Stopwatch(self.device), 0
        self._began = time.perf_counter()
        try:
            self.train()
        except _EnoughError:
            synchronise(self.device)
        wall = time.perf_counter() - self._began
        counted = self._count - UNCOUNTED
        if counted < 1:
            raise FsarError(f"{self._count} episodes ended: give more --seconds")
        return {
            "episodes": counted,
            "episodes_per_second": round(counted / wall, 2),
            "busy_share": round(self._watch.seconds() / wall, 4),
            "busy_is": "time between start and end of a step on the device's stream, over wall time",
        }

    def train_step(self, n: int, episode: Episode) -> None:
        """As in training, between two marks."""
        if self._count == UNCOUNTED:
            synchronise(self.device)
            self._began = time.perf_counter()
        elif time.perf_counter() - self._began > self._seconds and self._count > UNCOUNTED:
            raise _EnoughError
        start = self._watch.mark()
        super().train_step(n, episode)
        if self._count >= UNCOUNTED:
            self._watch.add(start, self._watch.mark())
        self._count += 1


def busy_share(
    shards: ShardSet, rules: EpisodeRules, run: Path, *, device: torch.device, trunk: str, seconds: float
) -> dict[str, Any]:
    """Figures of a training run of MoLo as fsar-train does it, of about so many seconds."""
    config = training_config(rules, shards, trunk=trunk, device=device)
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    with TimedTrainer(config, shards, run, device=device) as trainer:
        return {"trunk": trunk, "precision": config.precision} | trainer.time_steps(seconds)


def training_config(rules: EpisodeRules, shards: ShardSet, *, trunk: str, device: torch.device) -> RunConfig:
    """MoLo, the episodes of these rules, bfloat16 on a GPU; nothing validates or saves."""
    values = {"method": "molo", "trunk": trunk, "trunk_weights": "random", "device": str(device), "select_on": "last"}
    numbers = {"way": rules.way, "queries": rules.queries, "crop": rules.crop, "resize": rules.resize}
    never = dict.fromkeys(("episodes", "val_every", "checkpoint_every"), NEVER)
    classes = len(shards.dataset.splits["train"].classes)
    precision = "bf16" if device.type == "cuda" else "fp32"
    more = {"groups": "any", "precision": precision, "num_classes": classes}
    return build_config(values | numbers | never | more)


def check_step(sizes: Sizes, device: torch.device, *, trunk: str, graph: bool) -> dict[str, Any]:
    """Refuse a step that waits for the device, or takes memory anew when it is repeated.

    Raises:
        FsarError: it does.
    """
    side = Side("checked", "bf16", "channels-last", graph=graph)
    model, episode = make_model(side, trunk_name=trunk).to(device), make_episode(sizes).to(device)
    step, optimizer = TrainingStep(model, precision=side.precision, graph=graph), create_optimizer(model, lr=1e-4)

    def work(*, updates: bool = True) -> None:
        for number in range(CHECKED):
            step(episode, seed=number)
            if updates:
                step.update(optimizer, 1e-4)

    work()
    row: dict[str, Any] = {"name": "graph" if graph else "eager", "episodes": 2 * CHECKED}
    if device.type != "cuda":
        work(updates=False)
        return row | {"note": "a CPU says neither of waiting nor of allocations"}
    refuse_waiting(work)
    before = torch.cuda.memory_stats(device)
    work(updates=False)
    after = torch.cuda.memory_stats(device)
    names = {"tensors": "allocation.all.allocated", "segments": "segment.all.allocated"}
    row |= {name: after[key] - before[key] for name, key in names.items()}
    if row["segments"] or (graph and row["tensors"]):
        raise FsarError(f"{CHECKED} steps took memory anew: {row}")
    return row


def refuse_waiting(work: Any) -> None:  # noqa: ANN401 -- a function without values
    """Call a function in which nothing may wait for the device.

    Raises:
        FsarError: something did.
    """
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    except RuntimeError as error:
        raise FsarError(f"a step waits for the device: {str(error).splitlines()[0]}") from error
    finally:
        torch.cuda.set_sync_debug_mode("default")
