"""Load episodes of a shard set, ready for a model: iterate them, or hand them to a DataLoader."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from fsar.episode import Episode
from fsar.methods.class_text import ClassText
from pipelines.augment.clips import render
from pipelines.augment.motion import motion_maps
from pipelines.augment.on_cpu import ClipBuffers, Target, render_windows
from pipelines.decoding.raw import RawExecutor
from pipelines.episodes.pools import Labels
from pipelines.episodes.rules import EpisodeRules
from pipelines.episodes.stream import Chosen, EpisodePlan, EpisodeStream
from pipelines.loader import Loader, executor_for, executor_of
from shards_spec import ShardSet
from shards_spec.errors import ConfigError

Three = tuple[float, float, float]
Ints = NDArray[np.int64]


class Prepared(NamedTuple):
    """What the background makes of an episode: clips, or decoded pixels that become clips later.

    Attributes:
        clips: [V, T, 3, H, W], or frames for each of a plan's reads; None where none are read.
        motion: [V, T, 2, h, w], or fields for each of its motion reads; None likewise.
    """

    clips: Tensor | list[Tensor] | None
    motion: Tensor | list[Tensor] | None


class EpisodeLoader:
    """Episodes of one split, decoded ahead in the background and rendered on the device.

    Close it when done. Episode n is a pure function of (seed, n): iterating again gives the same
    episodes, and the number of the next one is all that a resumed run must know.

    Args:
        shards: The opened shard set.
        split: Name of its split.
        rules: Rules by which episodes are drawn: way, shot, queries, frames, crop, ...
        seed: Seed of the stream of episodes.
        device: Where the episodes are wanted; on CUDA with DALI, JPEG is decoded there too.
        executor: "dali", "portable", or "auto": DALI where it is installed.
        threads: Decoding threads; 0: one a core.
        prefetch: Episodes prepared ahead.
        labels: Labels that stand in for the split's own classes, such as clusters. Base ids are
            then the numbers of these labels, and the class ids -1.
        mean: Mean of each colour, of values in [0, 1]; give a trunk's own `mean` and `std`.
        std: Standard deviation of each colour.
        memory_format: Order of clips in memory; a trunk's own saves it a copy. With
            `torch.channels_last` a frame's colours lie side by side, as in its pixels, which a CPU
            writes faster; shapes and values are the same.
        class_text: Texts of the split's classes, carried by its episodes; not together with
            `labels`.
        given: Videos of the episodes, as `pipelines.episodes.read_episodes` reads them, where they
            are not drawn.
        views: In evaluation, the number of random views of each video. They are embedded once each,
            and every episode chooses among them. 0: whatever the rules draw at random is drawn anew
            in each episode.

    Raises:
        ShardError: there is no such split.
        ConfigError: a class has too few videos or no text, the rules do not fit the shards, views
            are asked for where all are alike, or there are both texts and labels.
    """

    def __init__(
        self,
        shards: ShardSet,
        split: str = "train",
        rules: EpisodeRules | None = None,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        executor: str = "auto",
        threads: int = 0,
        prefetch: int = 2,
        labels: Labels | None = None,
        mean: Three = (0.45, 0.45, 0.45),
        std: Three = (0.225, 0.225, 0.225),
        memory_format: torch.memory_format = torch.contiguous_format,
        class_text: ClassText | None = None,
        given: Sequence[Chosen] | None = None,
        views: int = 0,
    ) -> None:
        if labels is not None and class_text is not None:
            raise ConfigError("class_text has texts of the split's classes, but labels replace these: give one of both")
        self.shards, self.split = shards, split
        self.rules = rules = rules or EpisodeRules()
        check_views(self.rules, views)
        self.views = views
        self.device, self.mean, self.std = torch.device(device), mean, std
        self.stream = EpisodeStream(shards, split, self.rules, seed=seed, labels=labels, given=given)
        self._text = None if class_text is None else self._text_table(class_text)
        series = [*(["rgb"] if rules.reads_frames else []), *([rules.motion_series] if rules.reads_motion else [])]
        self.executor = executor_for(shards, self.device, name=executor, threads=threads, series=series)
        # On the CPU clips are made straight from the memory of raw files, without a copy of the
        # pixels in between.
        of_frames = executor_of(self.executor, "rgb") if rules.reads_frames else None
        self._raw = of_frames if self.device.type == "cpu" and isinstance(of_frames, RawExecutor) else None
        self.background = Loader(self.executor, device=self.device, prefetch=prefetch)
        self._target = Target(ClipBuffers(), memory_format)
        # half of the threads for each: two episodes are prepared at a time
        self._in_background = replace(self._target, threads=max(1, (threads or torch.get_num_threads()) // 2))
        self._base_rows = None if labels else base_rows(shards).to(self.device)

    def __iter__(self) -> Iterator[Episode]:
        """Yield episodes 0, 1, 2, ... without end; ConfigError after the last of a list."""
        return self.episodes()

    def episodes(self, start: int = 0, stop: int | None = None, *, step: int = 1) -> Iterator[Episode]:
        """Yield episodes start, start + step, ... below stop; rank r of k takes start=r, step=k."""
        return map(itemgetter(1), self.planned(start, stop, step=step))

    def planned(
        self, start: int = 0, stop: int | None = None, *, step: int = 1, block: int = 1
    ) -> Iterator[tuple[EpisodePlan, Episode, float]]:
        """Yield the same with each episode's plan (its videos and frames) and the seconds waited.

        Yields episodes start to start + block - 1, then the `block` from start + step on, and so on.
        """
        work = (self.stream, self._prepared, self._finished)
        return self.background.steps(*work, start, stop, step=step, block=block)

    def _prepared(self, plan: EpisodePlan) -> Prepared:
        """In the background: decode, and on a CPU make the clips, if no frame is resized."""
        clips = self._prepared_clips(plan) if self.rules.reads_frames else None
        if not self.rules.reads_motion:
            return Prepared(clips, None)
        fields = [self.executor.decode(reads) for reads in plan.motion_reads]
        return Prepared(clips, fields if self.device.type != "cpu" else self._maps(plan, fields))

    def _prepared_clips(self, plan: EpisodePlan) -> Tensor | list[Tensor]:
        if self.device.type != "cpu" or any(view.box for view in plan.views):
            return self.background.decode(plan)
        if self._raw is None:
            windows = [list(frames.numpy()) for frames in self.background.decode(plan)]
        else:
            windows = [self._raw.windows(reads) for reads in plan.reads]
        return render_windows(windows, plan.views, mean=self.mean, std=self.std, target=self._in_background)

    def _finished(self, plan: EpisodePlan, made: Prepared) -> Episode:
        """In the consumer's thread: make clips of frames, and the episode of clips."""
        clips, motion = made
        if isinstance(clips, list):
            clips = self._rendered(plan, self.background.to_device(clips))
        if isinstance(motion, list):
            motion = self._maps(plan, self.background.to_device(motion))
        return self.assemble(plan, None if clips is None else self.rules.parted(clips), motion=motion)

    def _maps(self, plan: EpisodePlan, fields: list[Tensor]) -> Tensor:
        """Make the motion [V, T, 2, h, w] of decoded fields."""
        return motion_maps(fields, plan.motion, camera=self.rules.camera, channels=self.rules.motion_channels)

    def _rendered(self, plan: EpisodePlan, frames: list[Tensor]) -> Tensor:
        """Make clips [V, T, 3, H, W] on the device."""
        look: dict[str, Any] = {"mean": self.mean, "std": self.std, "target": self._target}
        return render(frames, plan.views, crop=self.rules.crop, resize=self.rules.resized, **look)

    def assemble(
        self, plan: EpisodePlan, clips: Tensor | None, *, features: Tensor | None = None, motion: Tensor | None = None
    ) -> Episode:
        """Make the episode of clips [V, T, 3, H, W], support first, or of features [V, ...].

        Its parts are views of these tensors, as of the motion [V, T, 2, h, w]. With features the
        clips are the target of a reconstruction, which has no part for unlabelled videos.
        """
        support, query, unlabelled = _parts(plan, clips)
        support_features, query_features, unlabelled_features = _parts(plan, features)
        support_motion, query_motion, unlabelled_motion = _parts(plan, motion)
        class_ids = torch.from_numpy(plan.class_ids).to(self.device)
        return Episode(
            support=support,
            query=query,
            support_features=support_features,
            query_features=query_features,
            support_motion=support_motion,
            query_motion=query_motion,
            query_labels=torch.from_numpy(plan.query_labels).to(self.device),
            class_ids=class_ids if self._base_rows is not None else torch.full_like(class_ids, -1),
            base_ids=self._base_rows[class_ids] if self._base_rows is not None else class_ids,
            class_text=self.texts(class_ids),
            unlabelled=unlabelled if features is None else None,
            unlabelled_features=unlabelled_features,
            unlabelled_motion=unlabelled_motion,
        )

    def texts(self, class_ids: Tensor) -> Tensor | None:
        """Return the text vectors [n, w] of classes by their numbers; None without texts."""
        return None if self._text is None else self._text[class_ids.to(self.device)]

    def _text_table(self, class_text: ClassText) -> Tensor:
        """Return the text vectors [classes of the data set, w]; zeros for those of other splits."""
        dataset = self.shards.dataset
        names = dataset.splits[self.split].classes
        table = torch.zeros(len(dataset.classes), class_text.text.shape[1])
        place = {name: number for number, name in enumerate(dataset.classes)}
        table[[place[name] for name in names]] = class_text.rows(names)
        return table.to(self.device)

    @property
    def draws_each_time(self) -> bool:
        """Tell whether a video looks different in every episode: to embed it before is no use."""
        return self.rules.random_views and not self.views

    def close(self) -> None:
        """End its threads and give back the decoder; the shard set stays open."""
        self.background.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _parts(plan: EpisodePlan, values: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Part values [V, ...] of an episode's videos: support [way, shot, ...], queries, unlabelled.

    The last are None where there are none.
    """
    if values is None:
        return None, None, None
    support, query, unlabelled = torch.split(values, list(plan.videos))
    grouped = rearrange(support, "(way shot) ... -> way shot ...", way=plan.way)
    return grouped, query, unlabelled if len(unlabelled) else None


def check_views(rules: EpisodeRules, views: int) -> None:
    """Check a number of views.

    Raises:
        ConfigError: it is negative, or all views of a video would be alike.
    """
    if views < 0:
        raise ConfigError(f"views = {views}: must be at least 0")
    if views and not (rules.random_frames or rules.random_crop):
        raise ConfigError(
            f"views = {views}, but test_frames is centre: all views of a video are alike; leave views out"
        )


def base_rows(shards: ShardSet) -> Tensor:
    """Return the place of each class of the data set among its training classes; -1 for others."""
    training = shards.dataset.splits.get("train")
    place = {name: i for i, name in enumerate(training.classes)} if training else {}
    return torch.tensor([place.get(name, -1) for name in shards.dataset.classes], dtype=torch.int64)


@dataclass(frozen=True)
class EpisodeDataset(IterableDataset[Episode]):
    """Episodes of a loader for loops that want a `torch.utils.data.DataLoader`.

        DataLoader(EpisodeDataset("shards", "train", rules), batch_size=None, num_workers=2)

    An episode is a batch already, hence batch_size=None. Worker i of k makes every k-th episode, so
    that the loader delivers them in order. Each worker opens the shards itself.

    Attributes:
        path: Folder of the shard set.
        split: Name of its split.
        rules: Rules by which episodes are drawn.
        start: Number of the first episode.
        stop: The end of the numbers; None: there is none.
        step: Distance of the numbers.
        options: Options of `EpisodeLoader`.
        check: As of `ShardSet.open`.
    """

    path: Path | str
    split: str = "train"
    rules: EpisodeRules = field(default_factory=EpisodeRules)
    start: int = 0
    stop: int | None = None
    step: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    check: bool = False

    def __iter__(self) -> Iterator[Episode]:
        """Yield episodes start, start + step, ... below stop, or this worker's share of them."""
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        first, stride = self.start + number * self.step, workers * self.step
        with (
            ShardSet.open(self.path, check=self.check) as shards,
            EpisodeLoader(shards, self.split, self.rules, **self.options) as loader,
        ):
            yield from loader.episodes(first, self.stop, step=stride)
