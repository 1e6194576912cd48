"""Compare the classes and videos of a training with those of test episodes, by name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fsar.checkpoints import Hashes, TrainingRecord
from shards_spec import ShardSet
from shards_spec.errors import ConfigError
from shards_spec.splits.shipped import class_key


@dataclass(frozen=True)
class Overlap:
    """The classes and videos that training and test share.

    Attributes:
        known: False for weights that do not tell what they were trained on.
        classes: Names of the shared classes.
        videos: Number of the shared videos.
        sources: Names of the sets of training videos, for people.
    """

    known: bool
    classes: tuple[str, ...] = ()
    videos: int = 0
    sources: tuple[str, ...] = ()

    @property
    def found(self) -> bool:
        """Tell whether anything is shared."""
        return bool(self.classes or self.videos)

    def __str__(self) -> str:
        return f"overlaps training: {self.short}" if self.found else f"overlap with training: {self.short}"

    @property
    def short(self) -> str:
        """Text for a cell of a table."""
        if not self.known:
            return "unknown"
        return f"{len(self.classes)} classes, {self.videos:,} videos" if self.found else "none"

    def to_json(self) -> dict[str, Any]:
        """Return `status` (none, overlaps, unknown), counts (null if unknown), and sources."""
        if not self.known:
            return {"status": "unknown", "classes": None, "videos": None}
        said = {"training": list(self.sources)} if self.sources else {}
        status = "overlaps" if self.found else "none"
        return {"status": status, "classes": len(self.classes), "videos": self.videos} | said


UNKNOWN = Overlap(known=False)


def training_record(shards: ShardSet, rows: NDArray[np.int64], *, source: str = "") -> TrainingRecord:
    """Record a training on videos by their catalogue rows [n]; `source` is for people."""
    classes = _hashes(class_key(name) for name in class_names(shards, rows))
    known, videos = (torch.from_numpy(np.unique(part)) for part in (classes, _video_hashes(shards, rows)))
    return TrainingRecord(known, videos, (source,) if source else ())


def find_overlap(record: TrainingRecord | None, shards: ShardSet, rows: NDArray[np.int64]) -> Overlap:
    """Find which of the videos of these rows [n], and of their classes, a training holds.

    Class names are compared without case, spaces and underscores, videos by their original names:
    the same file in another shard set is found where it kept its name.
    """
    if record is None:
        return UNKNOWN
    names = class_names(shards, rows)
    shared = np.isin(_hashes(class_key(name) for name in names), record.classes.numpy())
    videos = int(np.isin(_video_hashes(shards, rows), record.videos.numpy()).sum())
    both = tuple(name for name, known in zip(names, shared.tolist(), strict=True) if known)
    return Overlap(True, both, videos, record.sources)


def check_overlap(overlap: Overlap, what: str, *, allowed: bool) -> None:
    """Refuse to test weights, named by `what`, on videos of their training.

    Raises:
        ConfigError: they share classes or videos; it gives counts and an example.
    """
    if overlap.found and not allowed:
        example = f' (such as "{overlap.classes[0]}")' if overlap.classes else ""
        raise ConfigError(
            f"{what} was trained on {len(overlap.classes)} classes{example} and {overlap.videos:,} videos of these "
            "test episodes: take a split that it has not seen, or --allow-overlap to have the result stamped with it"
        )


def class_names(shards: ShardSet, rows: NDArray[np.int64]) -> list[str]:
    """Name the classes of videos, each once."""
    return [shards.dataset.classes[label] for label in np.unique(shards.labels[rows]).tolist()]


def _video_hashes(shards: ShardSet, rows: NDArray[np.int64]) -> Hashes:
    return _hashes(shards.names(rows))


def _hashes(names: Iterable[str]) -> Hashes:
    """Hash names by BLAKE2b to [n] int64; a name that is no UTF-8 keeps its bytes."""
    digests = (hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest() for name in names)
    return np.frombuffer(b"".join(digests), dtype="<i8").astype(np.int64)
