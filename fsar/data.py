"""Shards -> the episodes of a run: which split, by which rules, on which device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fsar.episode import Episode
from pipelines.dali import dali_is_installed
from pipelines.executors import create_executor
from pipelines.loader import EpisodeLoader
from pipelines.plan import EpisodeRules, EpisodeStream
from shards_spec.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from fsar.config import RunConfig
    from fsar.trunks import Trunk
    from pipelines.executors import Executor
    from pipelines.loader import EpisodeBatch
    from pipelines.plan import EpisodePlan
    from shards_spec import ShardSet


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto` is CUDA where there is one.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f'device "{name}" is not to be had here: {str(error).splitlines()[0]}') from error
    return device


def training_rules(config: RunConfig) -> EpisodeRules:
    """How training episodes are drawn."""
    return EpisodeRules(
        way=config.way,
        shot=config.shot,
        queries=config.queries,
        frames=config.frames,
        frame_rule=config.frame_rule,
        random_frames=True,
        resize=config.resize,
        crop=config.crop,
        random_crop=config.random_crop,
        query_flip=config.query_flip,
        query_jitter=config.query_jitter,
        groups=config.groups,
    )


def evaluation_rules(config: RunConfig) -> EpisodeRules:
    """How validation and test episodes are drawn: centre crop, no augmentation."""
    return EpisodeRules(
        way=config.test_way,
        shot=config.test_shot,
        queries=config.test_queries,
        frames=config.frames,
        frame_rule=config.frame_rule,
        random_frames=config.test_frames == "random",
        resize=config.resize,
        crop=config.crop,
        groups=config.groups,
    )


@dataclass(frozen=True)
class Source:
    """Where the episodes of one split come from."""

    stream: EpisodeStream
    loader: EpisodeLoader
    executor: Executor
    base_rows: Tensor  # [classes of the data set] row of the auxiliary classifier, -1 for novel classes

    def episodes(self, start: int, stop: int) -> Iterator[tuple[EpisodePlan, Episode, float]]:
        """Plan, episode and seconds waited, for episode numbers start to stop."""
        for batch in self.loader.batches(start, stop):
            yield batch.plan, to_episode(batch, self.base_rows), batch.wait

    def close(self) -> None:
        """End its threads and give back the decoder."""
        self.loader.close()
        self.executor.close()


def open_source(
    shards: ShardSet, split: str, config: RunConfig, *, trunk: Trunk, device: torch.device, training: bool
) -> Source:
    """Open the episodes of a split; close the source when done.

    Raises:
        ConfigError: a class has too few videos, or the rules do not fit the shards.
        ShardError: there is no such split.
    """
    rules = training_rules(config) if training else evaluation_rules(config)
    stream = EpisodeStream(shards, split, rules, seed=config.seed if training else config.eval_seed)
    dali = config.executor == "dali" or (config.executor == "auto" and dali_is_installed())
    executor = create_executor(
        config.executor,
        shards,
        threads=config.threads or None,
        device="gpu" if device.type == "cuda" and dali else "cpu",
        pin_memory=device.type == "cuda",
    )
    loader = EpisodeLoader(stream, executor, device=device, mean=trunk.mean, std=trunk.std, prefetch=config.prefetch)
    return Source(stream, loader, executor, base_rows(shards).to(device))


def base_rows(shards: ShardSet) -> Tensor:
    """[classes of the data set] place of each class among the training classes, -1 where it is none."""
    training = shards.dataset.splits.get("train")
    place = {name: i for i, name in enumerate(training.classes)} if training else {}
    return torch.tensor([place.get(name, -1) for name in shards.dataset.classes], dtype=torch.int64)


def to_episode(batch: EpisodeBatch, rows: Tensor) -> Episode:
    """The tensors of a batch as an episode."""
    class_ids = torch.from_numpy(batch.plan.class_ids).to(rows.device)
    labels = torch.from_numpy(batch.plan.query_labels).to(rows.device)
    return Episode(
        support=batch.support,
        query=batch.query,
        query_labels=labels,
        class_ids=class_ids,
        base_ids=rows[class_ids],
    )
