"""Turn cropped clips into the batches of each method: colours, blur, differences, turned flow.

Random values of a whole step are drawn from (seed, step) on the CPU, and each process takes its
part. So clips look the same for any number of processes, and nothing waits for the device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from fsar.pretraining.config import RULES, PretrainConfig, rule_defaults
from fsar.pretraining.flow_rotation import Clip, FlowViews, draw_angles
from fsar.pretraining.loader import ClipLoader, CroppedClips
from fsar.pretraining.moco import Views
from fsar.pretraining.motion_views import MotionViews, Wrap, motion_views
from fsar.pretraining.mscl import PairedViews
from fsar.run import ranks
from fsar.trunks import Trunk
from pipelines.augment.clips import normalise
from pipelines.augment.on_cpu import Three
from pipelines.augment.photometric import ClipJitter, Photometric, gaussian_blur
from pipelines.clips.stream import COLOURS, ClipPlan, ClipRules
from pipelines.draw import PhiloxDraw
from shards_spec import ShardSet
from shards_spec.errors import ConfigError
from shards_spec.files import json_line
from shards_spec.splits.divisions import listed_division


def step_generator(seed: int, n: int) -> torch.Generator:
    """Make the generator of the random values of a step, a pure function of (seed, n)."""
    return torch.Generator().manual_seed(PhiloxDraw(seed, COLOURS | n).randint(0, (1 << 63) - 1))


@dataclass(frozen=True)
class ColourRules:
    """Jitter and grey, then blur, then normalisation, as in MSCL's code (megvii-research/MSCL).

    Attributes:
        mean: Mean of each colour, the trunk's own.
        std: Standard deviation of each colour, the trunk's own.
        jitter: Rules of jitter and grey.
        blur: Probability of blur, for each clip.
        sigma: Range of the blur's standard deviation in pixels; one value is drawn for a step.
    """

    mean: Three
    std: Three
    jitter: ClipJitter = field(default_factory=ClipJitter)
    blur: float = 0.5
    sigma: tuple[float, float] = (0.1, 2.0)

    def __call__(self, clips: Tensor, plan: ClipPlan, generator: torch.Generator) -> Tensor:
        """Augment clips [B, V, T, 3, S, S] in [0, 1], each by itself -> [B, V, 3, T, S, S]."""
        videos, views, frames = clips.shape[:3]
        first, count = plan.place * views, videos * views  # this process's part of the step's clips
        draws = self.jitter.draw(plan.batch * views, frames, generator=generator).part(first, count)
        low, high = self.sigma
        sigma = (low + (high - low) * torch.rand(1, generator=generator)).expand(count)
        blurs = (torch.rand(plan.batch * views, generator=generator) < self.blur)[first : first + count]
        flat = self.jitter.apply(rearrange(clips, "b v t c h w -> (b v) t c h w"), draws)
        flat = gaussian_blur(flat, sigma, where=blurs)
        return rearrange(normalise(flat, self.mean, self.std), "(b v) t c h w -> b v c t h w", v=views)


@dataclass(frozen=True)
class MoCoBatches:
    """The maker of `MoCo` batches from clips of `PairRules`."""

    colours: ColourRules
    seed: int = 0

    def __call__(self, plan: ClipPlan, views: CroppedClips) -> Views:
        """Augment the two views of each video."""
        query, key = self.colours(views.clips, plan, step_generator(self.seed, plan.n)).unbind(1)
        return Views(query, key)


@dataclass(frozen=True)
class FIMABatches:
    """The maker of `FIMA` batches from clips of `WindowRules`.

    Attributes:
        photometric: Rules of the augmentation, with the trunk's mean and std.
        wrap: The method's `diff_wrap`; "extra_frame" requires `WindowRules.extra_frame`.
        seed: Seed of the draws.
    """

    photometric: Photometric
    wrap: Wrap = "cyclic"
    seed: int = 0

    def __call__(self, plan: ClipPlan, views: CroppedClips) -> MotionViews:
        """Augment RGB and differences, each clip with draws of its own."""
        generator = step_generator(self.seed, plan.n)

        def augment(clips: Tensor) -> Tensor:
            draws = self.photometric.draw(plan.batch, generator).part(plan.place, len(clips))
            return self.photometric.apply(clips, draws)

        whole = views.clips.shape[1] // 2  # the place of n's whole span, after m and its parts
        return motion_views(views.clips, views.coordinates[:, ::whole], augment=augment, wrap=self.wrap)


@dataclass(frozen=True)
class MSCLBatches:
    """The maker of `MSCL` batches from clips of `FlowPairRules`.

    Attributes:
        colours: Rules for pictures.
        flow: The parts of a view's flow; the released layout requires `FlowPairRules.flow_crops`
            "both".
        negate_u: Change the sign of u in mirrored views; the published code does not.
        seed: Seed of the draws.
    """

    colours: ColourRules
    flow: FlowViews = field(default_factory=FlowViews)
    negate_u: bool = False
    seed: int = 0

    def __call__(self, plan: ClipPlan, views: CroppedClips) -> PairedViews:
        """Augment the two views of each video, and colour their flow."""
        if views.flow is None:
            raise ConfigError("MSCL reads optical flow, and there is none in these clips; draw them with FlowPairRules")
        generator = step_generator(self.seed, plan.n)
        query, key = self.colours(views.clips, plan, generator).unbind(1)
        angles = draw_angles(plan.batch, generator=generator)[plan.place : plan.place + len(plan.rows)]
        angles = angles.to(views.flow.device, non_blocking=True)
        flow = rearrange(views.flow, "b w t c h w2 -> b w c t h w2")
        of_query, of_key = (self._flow(view, flow, angles, views.flips) for view in (0, 1))
        return PairedViews(query, key, of_query, of_key)

    def _flow(self, number: int, flow: Tensor, angles: Tensor, flips: Tensor) -> Tensor:
        """Colour flow [B, W, 2, t, S, S] of view 0, the query, or 1 -> [B, 3, n t, S, S]."""
        clips: tuple[Clip, ...] = ("q", "k")
        view, crops = clips[number], flow.chunk(2, dim=1)[number]
        held = dict(zip(clips if crops.shape[1] == 2 else (view,), crops.unbind(1), strict=True))
        if missing := set(self.flow.clips(view)) - held.keys():
            raise ConfigError(
                f'this order of flow needs clip "{min(missing)}" in view "{view}"; set flow_crops = "both"'
            )
        mirrored = flips[:, number] if self.negate_u else None
        coloured: Tensor = self.flow.to(flow.device)(view, held, angles, mirrored=mirrored)
        return coloured


def training_rows(shards: ShardSet, split: str) -> NDArray[np.int64]:
    """Return the catalogue rows of a split's stored videos; of all stored videos for "all".

    Raises:
        ShardError: there is no such split.
    """
    return np.flatnonzero(shards.frames > 0) if split == "all" else shards.split_rows(split)


@dataclass(frozen=True)
class TrainingVideos:
    """The videos of a run.

    Attributes:
        rows: Their catalogue rows [n], ascending.
        text: Which videos they are, in words.
        absent: Listed videos that are not stored.
    """

    rows: NDArray[np.int64]
    text: str
    absent: int = 0

    def sha256(self, shards: ShardSet) -> str:
        """Return a hash of their names."""
        return hashlib.sha256(json_line(list(shards.names(self.rows)))).hexdigest()


def training_videos(config: PretrainConfig, shards: ShardSet) -> TrainingVideos:
    """Find the videos of a run's split, or the training videos of its lists.

    Raises:
        ShardError: there is no such split, or the lists are missing or of another data set.
    """
    name = shards.dataset.name
    if config.lists:
        division = listed_division(shards, Path(config.lists), number=config.list, needed=["train"])
        return TrainingVideos(division.train, f"{name}: training videos of {division.name}", division.absent["train"])
    text = "all videos" if config.split == "all" else f"split {config.split}"
    return TrainingVideos(training_rows(shards, config.split), f"{name}: {text}")


def clip_rules(config: PretrainConfig) -> ClipRules:
    """Make the rules by which the clips of a video are drawn."""
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


def batch_maker(config: PretrainConfig, trunk: Trunk) -> Callable[[ClipPlan, CroppedClips], Any]:
    """Return the function that makes a method's batch of cropped clips, on their device."""
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
        videos: The videos of the run, with those too short.
        rows: Catalogue rows of the videos that an epoch reads.
        skipped: Number of videos that are too short for the clips.
        epoch_steps: Steps of an epoch.

    Raises:
        ConfigError: there are too few videos for a batch, or options do not fit.
        ShardError: there is no such split, or the shards lack what the method reads.
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
        """Yield the batches of steps start, ... below stop for a trunk, and the seconds waited."""
        make = batch_maker(self._config, trunk)
        for plan, views, wait in self._clips.batches(start, stop):
            yield make(plan, views), wait

    def close(self) -> None:
        """End the threads and release the decoder; the shard set stays open."""
        self._clips.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
