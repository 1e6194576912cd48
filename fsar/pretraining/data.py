"""The configuration of a pre-training run -> the batches that its method reads."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from fsar.pretraining.batches import ColourRules, FIMABatches, MoCoBatches, MSCLBatches
from fsar.pretraining.config import RULES, PretrainConfig, rule_defaults
from fsar.pretraining.flow_rotation import FlowViews
from fsar.pretraining.loader import ClipLoader, ClipViews
from fsar.run import ranks
from fsar.trunks import Trunk
from pipelines.augment.clip_jitter import ClipJitter
from pipelines.augment.photometric import Photometric
from pipelines.clips.stream import ClipPlan, ClipRules
from shards_spec import ShardSet
from shards_spec.files import json_line
from shards_spec.splits.divisions import listed_division


def training_rows(shards: ShardSet, split: str) -> NDArray[np.int64]:
    """Catalogue rows of a split that were stored, or of every stored video for "all"; ShardError for another name."""
    return np.flatnonzero(shards.frames > 0) if split == "all" else shards.split_rows(split)


@dataclass(frozen=True)
class TrainingVideos:
    """Which videos a run reads: catalogue rows [n], ascending; in words; and how many listed ones are not stored."""

    rows: NDArray[np.int64]
    text: str
    absent: int = 0

    def sha256(self, shards: ShardSet) -> str:
        """Hash of their names."""
        return hashlib.sha256(json_line(list(shards.names(self.rows)))).hexdigest()


def training_videos(config: PretrainConfig, shards: ShardSet) -> TrainingVideos:
    """The videos of a run's split, or the training videos of its lists.

    Raises:
        ShardError: there is no such split, or the lists are not there or not of this data set.
    """
    name = shards.dataset.name
    if config.lists:
        division = listed_division(shards, Path(config.lists), number=config.list, needed=["train"])
        return TrainingVideos(division.train, f"{name}: training videos of {division.name}", division.absent["train"])
    text = "all videos" if config.split == "all" else f"split {config.split}"
    return TrainingVideos(training_rows(shards, config.split), f"{name}: {text}")


def clip_rules(config: PretrainConfig) -> ClipRules:
    """How the clips of a video are drawn."""
    derived: dict[str, Any] = {}
    if config.method == "fima":
        derived["extra_frame"] = config.value("diff_wrap") == "extra_frame"
    if config.method == "mscl":
        derived["flow_crops"] = "both" if config.value("flow_layout") == "released" else "own"
    own = config.part(rule_defaults(config.method))
    rules: ClipRules = RULES[config.method](
        frames=config.clip_frames, stride=config.clip_stride, crop=config.crop, **own, **derived
    )
    return rules


def batch_maker(config: PretrainConfig, trunk: Trunk) -> Callable[[ClipPlan, ClipViews], Any]:
    """What makes a method's batch of cropped clips, on their device."""
    look: dict[str, Any] = {"mean": trunk.mean, "std": trunk.std}
    seed = config.seed
    if config.method == "fima":
        photometric = Photometric(**look, blur_sigma=config.value("blur_sigma"), seed=seed)
        return FIMABatches(photometric, wrap=config.value("diff_wrap"), seed=seed)
    colours = ColourRules(**look, jitter=ClipJitter(sync=config.value("jitter_sync")))
    if config.method == "moco":
        return MoCoBatches(colours, seed=seed)
    flow = FlowViews(layout=config.value("flow_layout"), fra=config.value("fra"))
    return MSCLBatches(colours, flow, negate_u=config.value("flip_negate_u"), seed=seed)


class ViewLoader:
    """Batches of a method's views from shards, decoded ahead in the background; close it when done.

    Of several processes each has its part of every batch.

    Attributes:
        videos: Those that were to be read.
        rows: Catalogue rows of those that an epoch goes through.
        skipped: Videos of the split that are too short for the clips.
        epoch_steps: Steps of an epoch.

    Raises:
        ConfigError: too few videos for a batch, or options that do not fit.
        ShardError: no such split, or the shards lack what the method reads.
    """

    def __init__(self, config: PretrainConfig, shards: ShardSet, *, device: torch.device) -> None:
        self._config = config
        self.videos = training_videos(config, shards)
        self._clips = ClipLoader(
            shards,
            self.videos.rows,
            clip_rules(config),
            batch=config.batch,
            seed=config.seed,
            device=device,
            executor=config.executor,
            threads=ranks.threads(config.threads),
            prefetch=config.prefetch,
            rank=ranks.rank(),
            ranks=ranks.count(),
        )
        stream = self._clips.stream
        self.rows, self.skipped, self.epoch_steps = stream.rows, stream.skipped, stream.epoch_steps

    def batches(self, start: int, stop: int, *, trunk: Trunk) -> Iterator[tuple[Any, float]]:
        """Yield the batches of steps start, start + 1, ... below stop, in a trunk's colours, and the seconds waited."""
        make = batch_maker(self._config, trunk)
        for plan, views, wait in self._clips.batches(start, stop):
            yield make(plan, views), wait

    def close(self) -> None:
        """End its threads and give back the decoder; the shard set stays open."""
        self._clips.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
