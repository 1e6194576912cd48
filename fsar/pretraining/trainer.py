"""Pre-train a video trunk on views; a killed run is resumed bit for bit on a CPU."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fsar.checkpoints import TrainingRecord, load_state, save_state
from fsar.pretraining import Output as PretrainingOutput
from fsar.pretraining import PretrainingMethod, create_pretraining, pretraining_options
from fsar.pretraining.config import PretrainConfig
from fsar.run import ranks
from fsar.run.folder import last_checkpoint
from fsar.run.weights import load_trunk_weights
from fsar.training.loop import Batch, Loop, Progress
from fsar.training.optim import create_sgd, epoch_learning_rate
from fsar.training.step import Reading, TrainingStep
from fsar.trunks import Trunk, parts_to_recompute
from pipelines.draw import PhiloxDraw
from shards_spec.errors import ConfigError


def pretraining_step(model: nn.Module, *, precision: str = "fp32") -> TrainingStep:
    """Make the step of a batch of views, shared by all processes."""
    return TrainingStep(model, precision=precision, processes=ranks.count(), shared=True, accuracies=named_accuracies)


def named_accuracies(output: PretrainingOutput, _batch: object) -> dict[str, Tensor]:
    """Return the accuracies of a method, each as `accuracy_` and the name of its term."""
    return {f"accuracy_{name}": value for name, value in output.accuracy.items()}


class BatchSource(Protocol):
    """A source of batches, such as `ViewLoader`."""

    epoch_steps: int

    def batches(self, start: int, stop: int, *, trunk: Trunk) -> Iterator[tuple[Any, float]]:
        """Yield the batches of steps start, ... below stop, and the seconds waited for each.

        A batch is a function of its number, normalised with the constants of the trunk.
        """


def build_pretraining(config: PretrainConfig, *, samples: int, weights: bool = True) -> PretrainingMethod:
    """Build the method of a configuration; its random weights are a function of the seed only.

    Args:
        config: The resolved configuration.
        samples: Of the whole run, one for each video and epoch: the length of a rising momentum's
            clock.
        weights: Load the starting weights of the trunk, if the run has any; a checkpoint makes this
            unnecessary.

    Raises:
        ConfigError: the trunk is unknown, options do not go together, or weights are missing or do
            not fit.
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
    """Fill the trunk of a method, and its slow copy, with weights.

    Args:
        model: The method.
        trunk: Name of its trunk.
        source: A file, a run folder, or "fetch".

    Raises:
        ConfigError: they are missing, or of another trunk.
    """
    load_trunk_weights(model.encoder, trunk, source, option="--weights")
    for part in model.modules():
        if getattr(part, "encoder_q", None) is model.encoder:
            part.get_submodule("encoder_k").load_state_dict(model.encoder.state_dict())


def check_queue(config: PretrainConfig, videos: int) -> None:
    """Check that a queue is no longer than an epoch.

    In a longer one a video's own old keys would be among its negatives.

    Raises:
        ConfigError: it is longer.
    """
    queue = config.value("queue")
    if queue > videos:
        raise ConfigError(
            f"queue = {queue} is longer than an epoch of {videos} videos, so that a video's own keys would be among "
            f"its negatives: set --queue to {videos} or less"
        )


class Pretrainer:
    """The pre-training of one method.

    Of several processes each computes a part of every batch, and the first one writes.

    Args:
        config: The resolved configuration.
        model: Its method, on the device where it computes.
        views: The source of its batches.
        run: The run folder.
        trained_on: Classes and videos that the checkpoints name as trained on.
        resume: Go on from the last checkpoint in the run folder.

    Raises:
        ConfigError: the checkpoint to resume from is missing, damaged or of another trunk.
    """

    def __init__(
        self,
        config: PretrainConfig,
        model: PretrainingMethod,
        views: BatchSource,
        run: Path,
        *,
        trained_on: TrainingRecord,
        resume: bool = False,
    ) -> None:
        self.config, self.model, self.views, self.run, self.trained_on = config, model, views, run, trained_on
        self.optimizer = create_sgd(model, lr=config.lr, momentum=config.sgd_momentum, weight_decay=config.weight_decay)
        self.step = pretraining_step(model, precision=config.precision)
        self.steps = config.epochs * views.epoch_steps
        self.last = last_checkpoint(run)
        self.progress = Progress(**load_state(self.last, model, self.optimizer)) if resume else Progress()
        ranks.same_weights(model)

    def rate(self, n: int) -> float:
        """Return the learning rate at step n, the same for a whole epoch."""
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
        """Take all steps that are left.

        Raises:
            FsarError: the loss stays not finite.
            DiskError: the disk is full.
        """
        Loop(
            self,
            total=self.steps,
            unit="step",
            items="samples",
            log_every=self.config.log_every,
            save_every=self.config.checkpoint_every,
            label="pre-train",
        ).train()

    def batches(self) -> Generator[Batch]:
        """Yield the batches of the steps that are left."""
        start = self.progress.n
        for n, (batch, wait) in enumerate(self.views.batches(start, self.steps, trunk=self.model.encoder), start):
            yield Batch(n, batch, self.config.batch, wait)

    def train_step(self, n: int, batch: Any) -> None:  # noqa: ANN401 -- each method's own dataclass of views
        """Run forward, backward and optimiser step n."""
        # Dropout of step n is a function of (seed, n) and the process, so that no random state
        # needs saving.
        draw = PhiloxDraw(self.config.seed, n)
        seeds = [draw.randint(0, 2**62) for _ in range(ranks.rank() + 1)]
        self.step(batch, seed=seeds[-1])
        self.step.update(self.optimizer, self.rate(n), clip_norm=self.config.clip_norm)

    def read(self) -> Reading:
        """Return the counts of the step since the last reading; this waits for the device."""
        return self.step.read()

    def log_values(self, n: int) -> dict[str, float]:
        """Return epochs and learning rate of n steps, and the steps skipped so far."""
        epoch = round(n / self.views.epoch_steps, 4)
        return {"epoch": epoch, "lr": self.rate(n - 1), "skipped": self.progress.skipped}

    def save(self) -> None:
        """Write the checkpoint from which the run is resumed."""
        save_state(self.last, self.model, self.optimizer, vars(self.progress), trained_on=self.trained_on)
