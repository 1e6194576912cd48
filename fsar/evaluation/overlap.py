"""What a checkpoint saw in training, as hashes of names, and whether test episodes hold any of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fsar.checkpoints import Hashes, Seen
from shards_spec import ShardSet
from shards_spec.errors import ConfigError
from shards_spec.splits.shipped import class_key


@dataclass(frozen=True)
class Overlap:
    """What training and test share; `known` is False for weights that do not say what they saw.

    Attributes:
        classes: Names of the shared classes.
        videos: Number of the shared videos.
        sources: What the weights were trained on, in words.
    """

    known: bool
    classes: tuple[str, ...] = ()
    videos: int = 0
    sources: tuple[str, ...] = ()

    @property
    def found(self) -> bool:
        """Whether anything is shared."""
        return bool(self.classes or self.videos)

    def __str__(self) -> str:
        return f"overlaps training: {self.short}" if self.found else f"overlap with training: {self.short}"

    @property
    def short(self) -> str:
        """A cell of a table."""
        if not self.known:
            return "unknown"
        return f"{len(self.classes)} classes, {self.videos:,} videos" if self.found else "none"

    def to_json(self) -> dict[str, Any]:
        """`status`: none, overlaps or unknown; the counts, null where unknown; what training read, where it says so."""
        if not self.known:
            return {"status": "unknown", "classes": None, "videos": None}
        said = {"training": list(self.sources)} if self.sources else {}
        status = "overlaps" if self.found else "none"
        return {"status": status, "classes": len(self.classes), "videos": self.videos} | said


UNKNOWN = Overlap(known=False)


def seen_in(shards: ShardSet, rows: NDArray[np.int64], *, source: str = "") -> Seen:
    """The record of a training on the videos of these catalogue rows; `source` says in words which they are."""
    classes = _hashes(class_key(name) for name in class_names(shards, rows))
    known, videos = (torch.from_numpy(np.unique(part)) for part in (classes, _video_hashes(shards, rows)))
    return Seen(known, videos, (source,) if source else ())


def find_overlap(seen: Seen | None, shards: ShardSet, rows: NDArray[np.int64]) -> Overlap:
    """What of the videos of these rows, and of their classes, was seen.

    Class names are compared without case, spaces and underscores, videos by their original names: the same file in
    another shard set is found where it kept its name.
    """
    if seen is None:
        return UNKNOWN
    names = class_names(shards, rows)
    shared = np.isin(_hashes(class_key(name) for name in names), seen.classes.numpy())
    videos = int(np.isin(_video_hashes(shards, rows), seen.videos.numpy()).sum())
    both = tuple(name for name, known in zip(names, shared.tolist(), strict=True) if known)
    return Overlap(True, both, videos, seen.sources)


def check_overlap(overlap: Overlap, what: str, *, allowed: bool) -> None:
    """Refuse a test on what the weights `what` were trained on.

    Raises:
        ConfigError: with counts and an example.
    """
    if overlap.found and not allowed:
        example = f' (such as "{overlap.classes[0]}")' if overlap.classes else ""
        raise ConfigError(
            f"{what} was trained on {len(overlap.classes)} classes{example} and {overlap.videos:,} videos of these "
            "test episodes: take a split that it has not seen, or --allow-overlap to have the result stamped with it"
        )


def class_names(shards: ShardSet, rows: NDArray[np.int64]) -> list[str]:
    """Names of the classes of videos, each once."""
    return [shards.dataset.classes[label] for label in np.unique(shards.labels[rows]).tolist()]


def _video_hashes(shards: ShardSet, rows: NDArray[np.int64]) -> Hashes:
    return _hashes(shards.names(rows))


def _hashes(names: Iterable[str]) -> Hashes:
    """[n] int64 BLAKE2b of each name; a name that is no text of any encoding keeps its bytes."""
    digests = (hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest() for name in names)
    return np.frombuffer(b"".join(digests), dtype="<i8").astype(np.int64)
