"""Plan a step of clips of videos: the pixels that are read, and the clips made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from pipelines.draw import Draw, PhiloxDraw, permutation
from pipelines.reads import ReadLists, Reads
from shards_spec import ShardSet
from shards_spec.errors import ConfigError

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Order = Callable[[int, int, int], Ints]  # of seed, epoch and a number of videos: a permutation of these

_TRIES = 10
# Bits of a number that keep apart what is drawn with one seed; samples have numbers below both.
EPOCH, COLOURS = 1 << 63, 1 << 62


class Box(NamedTuple):
    """A window of whole pixels in a frame."""

    top: int
    left: int
    height: int
    width: int


def random_resized_box(
    draw: Draw,
    frame: tuple[int, int],
    *,
    area: tuple[float, float] = (0.2, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """Draw a box of a `frame` (height, width), of area and aspect (width / height) in these ranges.

    The share of the area is uniform, the aspect ratio log-uniform, the corner uniform. After ten
    boxes that do not fit it is the largest central one of an allowed ratio. The draws are area and
    log ratio, then row and column of the box that fits, in the order of torchvision's
    RandomResizedCrop.

    Raises:
        ConfigError: a range is empty or not positive.
    """
    for name, (low, high) in (("area", area), ("aspect", aspect)):
        if not 0 < low <= high:
            raise ConfigError(f"{name}=({low}, {high}) must be two positive numbers, the lower one first")
    height, width = frame
    logs = math.log(aspect[0]), math.log(aspect[1])
    for _ in range(_TRIES):
        pixels = height * width * draw.uniform(*area)
        ratio = math.exp(draw.uniform(*logs))
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Box(draw.randint(0, height - h), draw.randint(0, width - w), h, w)
    return _central_box(height, width, aspect)


def _central_box(height: int, width: int, aspect: tuple[float, float]) -> Box:
    ratio = min(max(width / height, aspect[0]), aspect[1])
    h = min(height, max(1, round(width / ratio)))
    w = min(width, max(1, round(height * ratio)))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def crop_coordinates(box: Box, frame: tuple[int, int], *, flip: bool) -> tuple[float, float, float, float]:
    """Return the corners (x1, y1, x2, y2) of a box of a `frame` (height, width), as shares of it.

    Pixel centres count, so 0 and 1 are the first and the last pixel; x1 > x2 marks a flipped crop.
    Source: FIMA's code (ZMHH-H/FIMA), which pairs places of two crops by them.
    """
    down, across = max(frame[0] - 1, 1), max(frame[1] - 1, 1)
    x1, x2 = box.left / across, (box.left + box.width - 1) / across
    y1, y2 = box.top / down, (box.top + box.height - 1) / down
    return (x2, y1, x1, y2) if flip else (x1, y1, x2, y2)


class Crop(NamedTuple):
    """One clip as a rule draws it: positions among a video's members, box, mirrored or not."""

    frames: list[int]
    box: Box
    flip: bool


def draw_crop(
    draw: Draw, frames: list[int], size: tuple[int, int], *, area: tuple[float, float] = (0.2, 1.0), flip: bool = True
) -> Crop:
    """Draw a random resized box for a clip of these frames of (height, width).

    Half of the clips are mirrored.
    """
    box = random_resized_box(draw, size, area=area)
    mirrored = draw.random() < 0.5  # drawn either way: the other draws stay the same
    return Crop(frames, box, mirrored and flip)


class CropView(NamedTuple):
    """One clip of a plan: members `indices` [T] of its reads number `reads`, box, mirrored or not.

    The box lies in the windows that are read.
    """

    reads: int
    indices: tuple[int, ...]
    box: Box
    flip: bool


@dataclass(frozen=True)
class ClipPlan:
    """Everything that is random about the clips of one step.

    Colours are drawn from (seed, n) on the device.

    Attributes:
        n: Number of the step.
        rows: int64 [B] catalogue rows.
        reads: Windows of pixels, each read once; flow fields after the pictures.
        views: V clips of each video, video after video.
        flow_views: W of each, with boxes in pixels of the field.
        coordinates: float32 [B, V, 4], the views' crops as `crop_coordinates` tells them.
        place: Place of this process's first sample in the step's batch.
        batch: Videos of the step, of all processes together.
    """

    n: int
    rows: Ints
    reads: tuple[Reads, ...]
    views: tuple[CropView, ...]
    flow_views: tuple[CropView, ...]
    coordinates: npt.NDArray[np.float32]
    place: int
    batch: int

    @property
    def flips(self) -> Flags:
        """[B, V], true for views that are mirrored."""
        return np.array([view.flip for view in self.views], np.bool_).reshape(len(self.rows), -1)


class ClipRules(Protocol):
    """Says what is drawn of one video: pictures, and flow fields of one series."""

    @property
    def crop(self) -> int:
        """Side of the crops in pixels."""

    @property
    def flow_series(self) -> str | None:
        """Name of the series of flow fields; None where none is read."""

    def usable(self, shards: ShardSet, rows: Ints) -> Flags:
        """Tell which videos [n] are long enough.

        Raises:
            ShardError: the shards lack what the rule reads.
        """

    def draw(self, draw: Draw, shards: ShardSet, row: int) -> tuple[list[Crop], list[Crop]]:
        """Draw the clips of a video, as many for each, and its clips of flow."""


def shuffled(seed: int, epoch: int, videos: int) -> Ints:
    """Return a random order [videos]: a pure function of seed and epoch."""
    return permutation(seed, EPOCH | epoch, videos)


class ClipStream:
    """Clips of videos, drawn by a rule: `plan(n)`, of step n, is a pure function of (seed, n).

    An epoch is an order of the videos without the last ones that fill no batch. A process takes its
    part of each step's batch, so that the step has the same clips for any number of processes. Each
    sample has draws of its own: those of its number, n * batch + i.

    Args:
        shards: The opened shard set.
        rows: Catalogue rows of the videos.
        rules: What is drawn of each.
        batch: Videos of a step, of all processes together.
        seed: Seed of all draws.
        rank: Number of this process among `ranks`.
        ranks: Processes that train together.
        order: The order of each epoch.
        draws: Added to the numbers of samples, so that streams of one seed have other draws.
        whole: Read whole frames, since the boxes of a video's clips differ; False: read their one
            box only.

    Attributes:
        rows: Rows that are long enough.
        skipped: Number of rows that are not.
        epoch_steps: Steps of an epoch.

    Raises:
        ConfigError: batch and ranks do not go together, or too few videos are long enough for one
            batch.
        ShardError: the shards lack what the rules read.
    """

    def __init__(
        self,
        shards: ShardSet,
        rows: Ints,
        rules: ClipRules,
        *,
        batch: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        order: Order = shuffled,
        draws: int = 0,
        whole: bool = True,
    ) -> None:
        PhiloxDraw(seed, 0)  # refuses an impossible seed here and not at the first step
        if batch < 1 or ranks < 1 or batch % ranks or not 0 <= rank < ranks:
            raise ConfigError(
                f"a batch of {batch} videos has no equal part for process {rank} of {ranks}: give a multiple of {ranks}"
            )
        self._shards, self.rules, self.seed, self.batch = shards, rules, seed, batch
        usable = rules.usable(shards, rows)
        self.rows, self.skipped = rows[usable], int((~usable).sum())
        self._refuse_too_few(len(rows))
        self._share = batch // ranks
        self._place = rank * self._share
        self.epoch_steps = len(self.rows) // batch
        self._order, self._draws, self._whole = order, draws, whole
        self._orders: dict[int, Ints] = {}  # of the last epochs that were asked for

    def _refuse_too_few(self, videos: int) -> None:
        if len(self.rows) >= self.batch:
            return
        short = f", {self.skipped} of them too short for these clips" if self.skipped else ""
        if not len(self.rows):
            raise ConfigError(
                f"no video of {self._shards.path} is left to train on ({videos} were given{short}): use shorter clips, "
                "or a smaller stride"
            )
        raise ConfigError(
            f"a batch of {self.batch} videos is more than the {len(self.rows)} of {self._shards.path} to train on "
            f"({videos} were given{short}): use a smaller batch"
        )

    def report(self) -> str:
        """Say how many videos and steps an epoch has, and how many videos were too short."""
        short = f"; {self.skipped:,} videos too short for these clips are left out" if self.skipped else ""
        return f"{len(self.rows):,} videos, {self.epoch_steps:,} steps an epoch{short}"

    def plan(self, n: int) -> ClipPlan:
        """Plan step n, touching no stored frame."""
        rows = self.batch_rows(n)  # [B]
        pictures, flow = _Collected("rgb", self._whole), _Collected(self.rules.flow_series or "", self._whole)
        coordinates: list[tuple[float, ...]] = []
        for sample, row in enumerate(rows.tolist(), self._draws + n * self.batch + self._place):
            crops, flow_crops = self.rules.draw(PhiloxDraw(self.seed, sample), self._shards, row)
            size = pictures.add(self._shards, row, crops)
            flow.add(self._shards, row, flow_crops)
            coordinates += [crop_coordinates(crop.box, size, flip=crop.flip) for crop in crops]
        of_pictures = pictures.reads()
        return ClipPlan(
            n=n,
            rows=rows,
            reads=of_pictures + flow.reads(),
            views=tuple(pictures.views),
            flow_views=tuple(view._replace(reads=view.reads + len(of_pictures)) for view in flow.views),
            coordinates=np.array(coordinates, np.float32).reshape(len(rows), -1, 4),
            place=self._place,
            batch=self.batch,
        )

    def batch_rows(self, n: int) -> Ints:
        """Return the rows [B] of this process's videos of step n."""
        epoch, step = divmod(n, self.epoch_steps)
        first = step * self.batch + self._place
        return self.rows[self._epoch(epoch)[first : first + self._share]]

    def _epoch(self, epoch: int) -> Ints:
        """Return the order [videos] of an epoch.

        Two are kept, since steps at an epoch's end are planned ahead.

        Of two threads each may make it, and both make the same.
        """
        order = self._orders.get(epoch)
        if order is None:
            order = self._order(self.seed, epoch, len(self.rows))
            self._orders = {e: known for e, known in self._orders.items() if e == epoch - 1} | {epoch: order}
        return order


@dataclass(frozen=True)
class _Collected:
    """Reads and views of one modality, video after video."""

    modality: str
    whole: bool
    views: list[CropView] = field(default_factory=list)
    _lists: ReadLists = field(default_factory=ReadLists)

    def add(self, shards: ShardSet, row: int, crops: Sequence[Crop]) -> tuple[int, int]:
        """Add the clips of a video, each of its frames once; return the stored (height, width)."""
        if not crops:
            return 0, 0
        height, width = shards.series(self.modality).sizes[row].tolist()
        window = Box(0, 0, height, width) if self.whole else crops[0].box
        number, reads = self._lists.of_size((window.height, window.width))
        frames = sorted({frame for crop in crops for frame in crop.frames})
        place = dict(zip(frames, reads.add(row, frames, window.top, window.left), strict=True))
        for crop in crops:
            box = crop.box._replace(top=crop.box.top - window.top, left=crop.box.left - window.left)
            self.views.append(CropView(number, tuple([place[frame] for frame in crop.frames]), box, crop.flip))
        return height, width

    def reads(self) -> tuple[Reads, ...]:
        """Return all windows as arrays."""
        return self._lists.reads(self.modality)
