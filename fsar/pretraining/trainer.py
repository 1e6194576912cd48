"""The pre-training loop: views in, checkpoints and a log out; killed at any moment, it goes on bit for bit."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fsar.checkpoints import Seen, load_state, save_state
from fsar.pretraining import Output as PretrainingOutput
from fsar.pretraining import PretrainingMethod, create_pretraining, pretraining_options
from fsar.pretraining.config import PretrainConfig
from fsar.run import ranks
from fsar.run.device import keep_freed_memory
from fsar.run.folder import RunLog, last_checkpoint
from fsar.run.weights import load_trunk_weights
from fsar.training.optim import create_sgd, epoch_learning_rate
from fsar.training.step import Meter, Reading, TrainingStep
from fsar.trunks import Trunk, parts_to_recompute
from pipelines.draw import PhiloxDraw
from shards_spec.errors import ConfigError, FsarError


class PretrainingStep(TrainingStep):
    """The step of a batch of views without labels, of which each process has its part.

    Args:
        model: In training mode, on the device; the same in all processes.
        precision: "fp32", or "bf16" for autocast.
    """

    def __init__(self, model: nn.Module, *, precision: str = "fp32") -> None:
        super().__init__(model, precision=precision, shared=True)

    def accuracies(self, output: PretrainingOutput, batch: object) -> dict[str, Tensor]:
        """Those of the method, each as `accuracy_` and its term's name."""
        del batch
        return {f"accuracy_{name}": value for name, value in output.accuracy.items()}


MOST_SKIPPED = 20  # steps in a row whose loss is not finite


class Views(Protocol):
    """Where batches come from: `ViewLoader`, or anything with its answers."""

    epoch_steps: int

    def batches(self, start: int, stop: int, *, trunk: Trunk) -> Iterator[tuple[Any, float]]:
        """Yield the batches of steps start, ... below stop, each a function of its number, and the seconds waited.

        They are normalised with the constants of the trunk.
        """


@dataclass
class Progress:
    """The state of the loop: all that a resumed run must know besides the method's state and the optimiser.

    Attributes:
        n: Number of the next step.
        skipped: Steps whose loss was not finite; they changed no trained weight and no buffer.
        skipped_steps: Optimiser steps left out, those and such with a gradient that was not finite.
        seconds: Spent in the loop.
    """

    n: int = 0
    skipped: int = 0
    skipped_steps: int = 0
    seconds: float = 0.0


def build_pretraining(config: PretrainConfig, *, samples: int, weights: bool = True) -> PretrainingMethod:
    """The method of a configuration, its random weights a function of the seed alone.

    `samples` of the whole run, one a video and epoch, is the length of a rising momentum's clock.  The trunk's starting
    weights, where a run has any, are loaded with `weights`; not needed when a checkpoint follows.

    Raises:
        ConfigError: an unknown trunk, options that do not go together, or weights that are missing or do not fit.
    """
    torch.manual_seed(config.seed)
    known = pretraining_options(config.method)
    derived = {"trunk": config.trunk, "frames": config.clip_frames, "total": samples}
    own = {key: value for key, value in derived.items() if key in known}
    try:
        model = create_pretraining(config.method, **own, **config.part(known))
    except (ValueError, RuntimeError) as error:  # a value that a layer refuses
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{config.method} cannot be made with these options ({reason}); --print-config lists them, to change one"
        ) from error
    parts = parts_to_recompute(all_parts=config.checkpoint_activations, first_parts=config.checkpoint_parts)
    for trunk in model.modules():
        if isinstance(trunk, Trunk):
            trunk.recomputes = parts
    model.encoder.clip_frames = config.clip_frames
    if weights and config.weights:
        start_from(model, config.trunk, config.weights)
    return model


def start_from(model: PretrainingMethod, trunk: str, source: str) -> None:
    """Fill the trunk of that name, and its slow copy, with the weights of a file or a run, or "fetch"ed ones.

    Raises:
        ConfigError: they are missing, or of another trunk.
    """
    load_trunk_weights(model.encoder, trunk, source, option="--weights")
    for part in model.modules():
        if getattr(part, "encoder_q", None) is model.encoder:
            part.get_submodule("encoder_k").load_state_dict(model.encoder.state_dict())


def check_queue(config: PretrainConfig, videos: int) -> None:
    """ConfigError where a queue is longer than an epoch: a video's own old keys would be among its negatives."""
    queue = config.value("queue")
    if queue > videos:
        raise ConfigError(
            f"queue = {queue} is longer than an epoch of {videos} videos, so that a video's own keys would be among "
            f"its negatives: set --queue to {videos} or less"
        )


class Pretrainer:
    """Trains the method of one run; of several processes each has a part of every batch, and the first one writes.

    Args:
        config: The resolved configuration.
        model: Its method, on the device where it computes.
        views: Where its batches come from.
        run: The run folder.
        seen: What the checkpoints say that they have seen.
        resume: Go on from the last checkpoint in the run folder.

    Raises:
        ConfigError: the checkpoint to resume from is missing, damaged or of another trunk.
    """

    def __init__(
        self,
        config: PretrainConfig,
        model: PretrainingMethod,
        views: Views,
        run: Path,
        *,
        seen: Seen,
        resume: bool = False,
    ) -> None:
        self.config, self.model, self.views, self.run, self.seen = config, model, views, run, seen
        self.optimizer = create_sgd(model, lr=config.lr, momentum=config.sgd_momentum, weight_decay=config.weight_decay)
        self.step = PretrainingStep(model, precision=config.precision)
        self.steps = config.epochs * views.epoch_steps
        self.last = last_checkpoint(run)
        self.progress = Progress(**load_state(self.last, model, self.optimizer)) if resume else Progress()
        ranks.same_weights(model)

    def rate(self, n: int) -> float:
        """Learning rate at step n, the same for a whole epoch."""
        config = self.config
        return epoch_learning_rate(
            n // self.views.epoch_steps,
            base_lr=config.lr,
            schedule=config.schedule,  # type: ignore[arg-type]  # checked by the configuration
            epochs=config.epochs,
            milestones=[int(epoch) for epoch in config.milestones],
            factor=config.lr_factor,
            warmup_lr=config.warmup_lr,
        )

    def train(self) -> None:
        """Run all steps that are left.

        Raises:
            FsarError: the loss stays not finite, or the disk is full.
        """
        start, config = self.progress.n, self.config
        meter, began = Meter("samples"), time.monotonic() - self.progress.seconds
        with (
            RunLog(self.run, start) as log,
            tqdm(total=self.steps, initial=start, unit="step", desc="pre-train", smoothing=0.1) as bar,
        ):
            self.model.train()
            batches = self.views.batches(start, self.steps, trunk=self.model.encoder)
            for n, (batch, wait) in enumerate(batches, start):
                self.train_step(n, batch)
                if n == start:
                    keep_freed_memory(next(self.model.parameters()).device)
                meter.wait(wait, units=config.batch)
                self.progress.seconds = round(time.monotonic() - began, 3)
                self._after(n + 1, meter, log, bar)

    def train_step(self, n: int, batch: Any) -> None:  # noqa: ANN401 -- each method's own dataclass of views
        """Forward, backward and optimiser step n."""
        # Dropout of step n is a function of (seed, n) and the process, so that no random state needs saving.
        draw = PhiloxDraw(self.config.seed, n)
        seeds = [draw.randint(0, 2**62) for _ in range(ranks.rank() + 1)]
        self.step(batch, seed=seeds[-1])
        self.step.update(self.optimizer, self.rate(n), clip_norm=self.config.clip_norm)

    def _after(self, n: int, meter: Meter, log: RunLog, bar: Any) -> None:  # noqa: ANN401 -- tqdm has no types
        """What follows n finished steps: log and save."""
        last = n == self.steps
        logs, saves = (last or n % every == 0 for every in (self.config.log_every, self.config.checkpoint_every))
        self.progress.n = n
        bar.update()
        if logs or saves:
            meter.add(self._read())
        if logs:
            record = meter.record()
            state = {"lr": self.rate(n - 1), "skipped": self.progress.skipped}
            log.write("train", n, epoch=round(n / self.views.epoch_steps, 4), **record, **state)
            bar.set_postfix_str(f"loss {record.get('loss', math.nan):.3f}")
        if saves and ranks.is_first():
            log.make_durable()
            save_state(self.last, self.model, self.optimizer, vars(self.progress), seen=self.seen)

    def _read(self) -> Reading:
        """What the step has counted since the last reading; waits for the device."""
        reading = self.step.read()
        self.progress.skipped += reading.skipped
        self.progress.skipped_steps += reading.skipped_steps
        if reading.longest > MOST_SKIPPED:
            raise FsarError(f"the loss of {reading.longest} steps in a row is not finite; lower --lr")
        return reading
