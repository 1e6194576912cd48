"""The training loop: episodes in, checkpoints and a log out; killed at any moment, it goes on bit for bit."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from tqdm import tqdm

from fsar.checkpoints import load_seen, load_state, save_state, take_colours, together
from fsar.episode import Episode
from fsar.evaluation.accuracy import Result, evaluate
from fsar.evaluation.overlap import seen_in
from fsar.loader import EpisodeLoader
from fsar.run import ranks
from fsar.run.build import build_model, check_unlabelled, class_text_of, open_episodes
from fsar.run.config import RunConfig
from fsar.run.device import keep_freed_memory
from fsar.run.folder import RunLog, last_checkpoint
from fsar.run.weights import weights_seen
from fsar.training.frozen import CachedEpisodes, freeze_trunk
from fsar.training.optim import create_optimizer, learning_rate
from fsar.training.step import EpisodeStep, Meter, Reading
from pipelines.draw import PhiloxDraw
from shards_spec import ShardSet
from shards_spec.errors import ConfigError, FsarError

MOST_SKIPPED = 20  # episodes in a row whose loss is not finite


@dataclass
class Progress:
    """The state of the loop: all that a resumed run must know besides weights and optimiser.

    Attributes:
        n: Number of the next episode.
        skipped: Episodes whose loss was not finite; they changed nothing.
        skipped_steps: Optimiser steps left out, since a gradient was not finite or there was none.
        best: Best validation accuracy so far, and the episode after which it was reached.
        seconds: Spent in the loop, validation included.
    """

    n: int = 0
    skipped: int = 0
    skipped_steps: int = 0
    best: float = -1.0
    best_n: int = 0
    seconds: float = 0.0


def own_episodes(config: RunConfig) -> int:
    """Episodes of an optimiser step that each process computes.

    Raises:
        ConfigError: they have no equal parts.
    """
    if config.episodes_per_step % ranks.count():
        raise ConfigError(
            f"episodes_per_step = {config.episodes_per_step} has no equal parts for {ranks.count()} processes: start "
            "a number of processes that divides it"
        )
    return config.episodes_per_step // ranks.count()


class Trainer:
    """Trains the model of one run; a context manager that closes what it opened.

    Of several processes each computes an equal part of every step's episodes, and the first one writes.

    Args:
        config: The resolved configuration.
        shards: The opened shard set.
        run: The run folder.
        device: Where the model computes.
        resume: Go on from the last checkpoint in the run folder.

    Raises:
        ConfigError: the configuration does not fit shards, device or the number of processes.
    """

    def __init__(
        self, config: RunConfig, shards: ShardSet, run: Path, *, device: torch.device, resume: bool = False
    ) -> None:
        self.config, self.shards, self.run, self.device = config, shards, run, device
        self.own = own_episodes(config)
        self.model = build_model(config, weights=not resume).to(device)
        if resume:
            take_colours(self.model, self.last)  # which the episodes are made with
        check_unlabelled(config)
        if config.freeze_trunk:
            freeze_trunk(self.model, config.method)
        self.optimizer = create_optimizer(
            self.model,
            lr=config.lr,
            weight_decay=config.weight_decay,
            decay_norms=config.decay_norms,  # type: ignore[arg-type]  # checked by the configuration
        )
        self.step = EpisodeStep(
            self.model,
            precision=config.precision,
            episodes_per_step=config.episodes_per_step,
            graph=config.graph,
        )
        self.progress = Progress()
        self._stack = ExitStack()
        self.train_episodes = self._open("train", training=True)
        if (texts := class_text_of(config)) is not None:
            self.model.set_base_text(texts.rows(shards.dataset.splits["train"].classes))
        before = load_seen(self.last) if resume else weights_seen(config.trunk_weights)
        self.seen = together(seen_in(shards, self.train_episodes.stream.videos()), before)
        self.val_episodes = self._open(config.select_on, training=False) if self.selects else None
        if resume:
            self.progress = Progress(**load_state(self.last, self.model, self.optimizer))
        ranks.same_weights(self.model)

    @property
    def selects(self) -> bool:
        """Whether a split chooses the checkpoint."""
        return self.config.select_on != "last" and self.config.select_on in self.shards.dataset.splits

    @property
    def last(self) -> Path:
        """The checkpoint to resume from."""
        return last_checkpoint(self.run)

    @property
    def best(self) -> Path:
        """The checkpoint of the best validation."""
        return self.run / "checkpoints" / "best.safetensors"

    def _open(self, split: str, *, training: bool) -> EpisodeLoader:
        assert self.model.trunk is not None
        loader = open_episodes(
            self.shards, split, self.config, trunk=self.model.trunk, device=self.device, training=training
        )
        self._stack.callback(loader.close)
        return loader

    def train(self) -> None:
        """Run all episodes that are left.

        Raises:
            FsarError: the loss stays not finite, or the disk is full.
        """
        config, start = self.config, self.progress.n
        source = self._cached() if config.freeze_trunk else self.train_episodes
        meter, began = Meter("episodes"), time.monotonic() - self.progress.seconds
        first, step = start + ranks.rank() * self.own, config.episodes_per_step
        with (
            RunLog(self.run, start) as log,
            tqdm(total=config.episodes, initial=start, unit="episode", desc="train", smoothing=0.1) as bar,
        ):
            self.model.train()
            for plan, episode, wait in source.planned(first, config.episodes, step=step, block=self.own):
                self.train_episode(plan.n, episode)
                if plan.n == first:
                    keep_freed_memory(self.device)
                meter.wait(wait, units=ranks.count())
                self.progress.seconds = round(time.monotonic() - began, 3)
                self._after(self._trained(plan.n), meter, log, bar)
        ranks.wait_for_all()  # for the checkpoints

    def _trained(self, n: int) -> int:
        """Episodes that all processes have trained when this one has trained episode n."""
        step = self.config.episodes_per_step
        return n // step * step + (n % self.own + 1) * ranks.count()

    def _cached(self) -> CachedEpisodes:
        config = self.config
        cache = Path(config.feature_cache) if config.feature_cache else self.run / "features"
        views, precision = config.cached_views, config.precision
        return CachedEpisodes(self.train_episodes, self.model, views, cache=cache, precision=precision)

    def train_episode(self, n: int, episode: Episode) -> None:
        """Forward and backward of episode n, and the optimiser step that ends a group of episodes."""
        # Dropout of episode n is a function of (seed, n), so that no random state needs saving.
        self.step(episode, seed=PhiloxDraw(self.config.seed, n).randint(0, 2**62))
        if (n + 1) % self.own == 0:
            self.step.update(self.optimizer, self.rate(self._trained(n) - 1))

    def read(self) -> Reading:
        """What the step has counted since the last reading; waits for the device.

        Raises:
            FsarError: the loss stays not finite.
        """
        reading = self.step.read()
        self.progress.skipped += reading.skipped
        self.progress.skipped_steps += reading.skipped_steps
        if reading.longest > MOST_SKIPPED:
            raise FsarError(f"the loss of {reading.longest} episodes in a row is not finite; lower --lr")
        return reading

    def rate(self, n: int) -> float:
        """Learning rate at episode n."""
        config = self.config
        return learning_rate(
            n,
            base_lr=config.lr,
            warmup_lr=config.warmup_lr,
            steps_iter=config.lr_epoch,
            steps=config.lr_steps,
            factors=config.lr_factors,
            clock=config.lr_clock,  # type: ignore[arg-type]  # checked by the configuration
        )

    def _after(self, n: int, meter: Meter, log: RunLog, bar: Any) -> None:  # noqa: ANN401 -- tqdm has no types
        """What follows n finished episodes: log, validate, save."""
        config, last, before = self.config, n == self.config.episodes, n - ranks.count()
        logs, validates, saves = (
            last or n // every > before // every
            for every in (config.log_every, config.val_every, config.checkpoint_every)
        )
        saves |= validates
        self.progress.n = n
        bar.update(ranks.count())
        if logs or saves:
            meter.add(self.read())
        if logs:
            record = meter.record() | {"lr": self.rate(n - 1), "skipped": self.progress.skipped}
            log.write("train", n, **record)
            bar.set_postfix_str(f"loss {record.get('loss', math.nan):.2f}, accuracy {record.get('accuracy', 0):.0%}")
        if validates:
            self._validate(n, log)
        if saves:
            log.make_durable()
            self._save(self.last, self.optimizer)

    def _save(self, path: Path, optimizer: torch.optim.Optimizer | None) -> None:
        if ranks.is_first():
            save_state(path, self.model, optimizer, vars(self.progress), seen=self.seen)

    def _validate(self, n: int, log: RunLog) -> None:
        if self.val_episodes is None:
            return
        result = self.evaluate(self.val_episodes, self.config.val_episodes, label="validate")
        log.write("val", n, split=self.config.select_on, accuracy=result.accuracy)
        tqdm.write(f"after {n} episodes, {self.config.select_on}: {result}")
        if result.accuracy > self.progress.best:
            self.progress.best, self.progress.best_n = result.accuracy, n
            self._save(self.best, None)

    def evaluate(self, loader: EpisodeLoader, episodes: int, **options: Any) -> Result:  # noqa: ANN401 -- of evaluate()
        """Evaluate the model as it stands."""
        return evaluate(self.model, loader, episodes, precision=self.config.precision, **options)

    def open_test(self) -> EpisodeLoader:
        """The episodes of the test split.

        Raises:
            ConfigError: too few videos; ShardError: no such split.
        """
        return self._open("test", training=False)

    def load_selected(self) -> int:
        """Load the checkpoint that validation chose, or the last; returns the episodes it had seen."""
        path = self.best if self.selects else self.last
        state = load_state(path, self.model)
        return int(state["n"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
