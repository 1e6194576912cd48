"""Train a few-shot method on episodes; a killed run is resumed bit for bit on a CPU.

The way of an episode: `Trainer.train` starts a `Loop`, which asks `Trainer.batches` for episodes.
For each it calls `Trainer.train_step`. That calls the `TrainingStep` (forward and backward), and
after the last episode of a group its `update` (the optimiser's step).
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from tqdm import tqdm

from fsar.checkpoints import join_records, load_state, load_training_record, save_state, take_colours
from fsar.episode import Episode
from fsar.evaluation.accuracy import Result, evaluate
from fsar.evaluation.overlap import training_record
from fsar.evaluation.shared_episodes import fuse
from fsar.loader import EpisodeLoader
from fsar.methods import Fusion, TwoStreams
from fsar.run import ranks
from fsar.run.build import build_model, check_unlabelled, class_text_of, open_episodes
from fsar.run.config import RunConfig
from fsar.run.folder import RunLog, last_checkpoint
from fsar.run.streams import write_fusion
from fsar.run.weights import training_record_of
from fsar.training.frozen import CachedEpisodes, freeze_trunk
from fsar.training.loop import Batch, Loop, Progress
from fsar.training.optim import create_optimizer, learning_rate
from fsar.training.step import Reading, TrainingStep
from pipelines.draw import PhiloxDraw
from shards_spec import ShardSet
from shards_spec.errors import ConfigError


def own_episodes(config: RunConfig) -> int:
    """Return how many episodes of an optimiser step each process computes.

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
    """The training of one few-shot model; a context manager that closes what it opened.

    Of several processes each computes an equal part of the episodes of every optimiser step, and
    the first one writes.

    Attributes:
        best_accuracy: The best of validation so far.
        best_n: Episodes after which it was reached.

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
        self.own_per_step = own_episodes(config)
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
        self.step = TrainingStep(
            self.model,
            precision=config.precision,
            per_update=config.episodes_per_step,
            processes=ranks.count(),
            graph=config.graph,
        )
        self.progress, self.best_accuracy, self.best_n = Progress(), -1.0, 0
        self._stack = ExitStack()
        self.train_episodes = self._open("train", training=True)
        self._source: EpisodeLoader | CachedEpisodes = self.train_episodes
        if (texts := class_text_of(config)) is not None:
            self.model.set_base_text(texts.rows(shards.dataset.splits["train"].classes))
        before = load_training_record(self.last) if resume else training_record_of(config.trunk_weights)
        self.trained_on = join_records(training_record(shards, self.train_episodes.stream.videos()), before)
        self.val_episodes = self._open(config.select_on, training=False) if self.selects else None
        self.two = self.model if isinstance(self.model, TwoStreams) else None
        if resume:
            self._resume()
        ranks.same_weights(self.model)

    @property
    def selects(self) -> bool:
        """Tell whether a split chooses the checkpoint."""
        return self.config.select_on != "last" and self.config.select_on in self.shards.dataset.splits

    @property
    def last(self) -> Path:
        """The checkpoint to resume from."""
        return last_checkpoint(self.run)

    @property
    def best(self) -> Path:
        """The checkpoint of the best validation."""
        return self.run / "checkpoints" / "best.safetensors"

    def _resume(self) -> None:
        state = load_state(self.last, self.model, self.optimizer)
        self.best_accuracy, self.best_n = state.pop("best", -1.0), state.pop("best_n", 0)
        self.progress = Progress(**state)

    def _open(self, split: str, *, training: bool) -> EpisodeLoader:
        assert self.model.trunk is not None
        loader = open_episodes(
            self.shards, split, self.config, trunk=self.model.trunk, device=self.device, training=training
        )
        self._stack.callback(loader.close)
        return loader

    def train(self) -> None:
        """Train on all episodes that are left.

        Raises:
            FsarError: the loss stays not finite.
            DiskError: the disk is full.
        """
        config = self.config
        if config.freeze_trunk:  # before the loop, whose clock does not count it
            self._source = self._cached()
        Loop(
            self,
            total=config.episodes,
            unit="episode",
            items="episodes",
            stride=ranks.count(),
            log_every=config.log_every,
            save_every=config.checkpoint_every,
            validate=self.validate,
            validate_every=config.val_every,
        ).train()

    def batches(self) -> Generator[Batch]:
        """Yield the episodes of this process that are left."""
        start, step = self.progress.n + ranks.rank() * self.own_per_step, self.config.episodes_per_step
        for plan, episode, wait in self._source.planned(
            start, self.config.episodes, step=step, block=self.own_per_step
        ):
            yield Batch(plan.n, episode, ranks.count(), wait)

    def _cached(self) -> CachedEpisodes:
        config = self.config
        cache = Path(config.feature_cache) if config.feature_cache else self.run / "features"
        views, precision = config.cached_views, config.precision
        return CachedEpisodes(self.train_episodes, self.model, views, cache=cache, precision=precision)

    def train_step(self, n: int, episode: Episode) -> None:
        """Run forward and backward of episode n, and the optimiser's step at the end of a group."""
        # Dropout of episode n is a function of (seed, n), so that no random state needs saving.
        self.step(episode, seed=PhiloxDraw(self.config.seed, n).randint(0, 2**62))
        if (n + 1) % self.own_per_step == 0:  # this process's part of a group has consecutive numbers
            step = self.config.episodes_per_step
            self.step.update(self.optimizer, self.rate(n // step * step + step - 1))

    def read(self) -> Reading:
        """Return the counts of the step since the last reading; this waits for the device."""
        return self.step.read()

    def log_values(self, n: int) -> dict[str, float]:
        """Return the learning rate of the last episode, and the episodes skipped so far."""
        return {"lr": self.rate(n - 1), "skipped": self.progress.skipped}

    def rate(self, n: int) -> float:
        """Return the learning rate at episode n."""
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

    def validate(self, log: RunLog) -> None:
        """Evaluate on the split that chooses the checkpoint, and keep the best one."""
        if self.val_episodes is None:
            return
        n, split = self.progress.n, self.config.select_on
        calibrate = self.two is not None and split != "test"
        result = self.evaluate(self.val_episodes, self.config.val_episodes, label="validate", calibrate=calibrate)
        if self.two is not None:
            self.two.fusion = Fusion()  # training has equal shares: a checkpoint does not hold what was chosen here
        log.write("val", n, split=split, accuracy=result.accuracy)
        tqdm.write(f"after {n} episodes, {split}: {result}")
        if result.accuracy > self.best_accuracy:
            self.best_accuracy, self.best_n = result.accuracy, n
            if ranks.is_first():
                self._save(self.best, None)

    def save(self) -> None:
        """Write the checkpoint from which the run is resumed."""
        self._save(self.last, self.optimizer)

    def _save(self, path: Path, optimizer: torch.optim.Optimizer | None) -> None:
        state = vars(self.progress) | {"best": self.best_accuracy, "best_n": self.best_n}
        save_state(path, self.model, optimizer, state, trained_on=self.trained_on)

    def evaluate(self, loader: EpisodeLoader, episodes: int, **options: Any) -> Result:  # noqa: ANN401 -- of evaluate()
        """Evaluate the model as it stands."""
        return evaluate(self.model, loader, episodes, precision=self.config.precision, **options)

    def open_test(self) -> EpisodeLoader:
        """Open the episodes of the test split.

        Raises:
            ConfigError: a class has too few videos.
            ShardError: there is no such split.
        """
        return self._open("test", training=False)

    def load_selected(self) -> int:
        """Load the checkpoint that validation chose, or the last one; return its episodes.

        For two streams, choose how their answers are mixed, and write that.
        """
        path = self.best if self.selects else self.last
        state = load_state(path, self.model)
        if self.two is not None:
            split = fuse(self.two, self.shards, self.config, device=self.device)
            if ranks.is_first():
                write_fusion(self.run, self.two.fusion, split)
        return int(state["n"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
