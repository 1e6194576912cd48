"""Features of a frozen trunk on disk: views of videos that are put through it once and read whenever they are drawn.

    FOLDER/facts.json               all that the features depend on; its SHA-256 is the folder's name
    FOLDER/pooled-000000.npy        [n, T, C] float32 of the first n views
    FOLDER/maps-000000.npy          [n, T, C, h, w] float16, and
    FOLDER/images-000000.npy        [n, T, 3, H, W] uint8 where a method reads them

Pooled features are small, and float32 keeps them as the trunk made them; maps are forty-nine times larger, and what
float16 takes from them (1 part in 2,000) is far less than a change of the crop.  Files are whole or absent, so that a
killed run goes on with the first one that is missing; they are mapped into memory and never read as a whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from fsar.run import ranks
from pipelines.augment.on_cpu import ClipBuffers
from shards_spec.errors import FsarError
from shards_spec.files import DiskError, disk_errors, only_writer, publish, temporary

Ints = NDArray[np.int64]
Make = Callable[[Ints], dict[str, Tensor]]

TYPES = {"pooled": np.float32, "maps": np.float16, "images": np.uint8}
IN_A_FILE = {"pooled": 512, "maps": 32}  # views: some tens of MB


@dataclass(frozen=True)
class FeatureStore:
    """Mapped files of each kind of feature, `size` views in each but the last."""

    files: dict[str, list[NDArray[Any]]]
    size: int
    buffers: dict[str, ClipBuffers]

    @classmethod
    def open(cls, folder: Path, kinds: Sequence[str], views: int) -> FeatureStore:
        """The files of a folder that holds all of them.

        Raises:
            FsarError: one is damaged.
        """
        size = IN_A_FILE[kinds[0]]
        paths = {kind: [path_of(folder, kind, first // size) for first in range(0, views, size)] for kind in kinds}
        files = {kind: [_mapped(path) for path in paths[kind]] for kind in kinds}
        for kind in kinds:
            for first, path, file in zip(range(0, views, size), paths[kind], files[kind], strict=True):
                if file.dtype != TYPES[kind] or file.shape != (min(size, views - first), *files[kind][0].shape[1:]):
                    raise FsarError(
                        f"{path} holds {file.dtype} {file.shape}: delete it and type the same command again"
                    )
        return cls(files, size, {kind: ClipBuffers(TYPES[kind]) for kind in kinds})

    def read(self, places: Ints) -> dict[str, Tensor]:
        """The features [v, T, ...] of the views at these places, by kind."""
        read = {}
        for kind, files in self.files.items():
            read[kind] = self.buffers[kind].take(len(places), *files[0].shape[1:])
            rows = read[kind].numpy()
            for row, place in enumerate(places.tolist()):
                rows[row] = files[place // self.size][place % self.size]
        return read


def path_of(folder: Path, kind: str, number: int) -> Path:
    """Path of a file of features."""
    return folder / f"{kind}-{number:06d}.npy"


def make_features(folder: Path, kinds: Sequence[str], numbers: Ints, make: Make, *, batch: int) -> FeatureStore:
    """The features of numbered views: what a folder lacks is made first, a file at a time; each process makes some.

    Args:
        folder: Of these features alone.
        kinds: pooled, or maps, or maps and images.
        numbers: [n] of the views.
        make: Numbers of some views -> their features by kind.
        batch: Views that are made together.

    Raises:
        FsarError: a feature is not finite as it is stored, or another process writes to the folder.
        DiskError: there is no room.
    """
    size = IN_A_FILE[kinds[0]]
    missing = [
        first
        for first in range(0, len(numbers), size)
        if not all(path_of(folder, kind, first // size).exists() for kind in kinds)
    ]
    missing = ranks.of_first(missing)
    if missing:
        with only_writer(folder) if ranks.is_first() else nullcontext():
            ranks.wait_for_all()  # until the first one holds the folder
            _make_files(folder, missing, kinds, numbers, make, batch=batch)
            ranks.wait_for_all()
    return FeatureStore.open(folder, kinds, len(numbers))


def _make_files(
    folder: Path, firsts: Sequence[int], kinds: Sequence[str], numbers: Ints, make: Make, *, batch: int
) -> None:
    """This process's part of the files that begin with these of the views.

    The processes meet after every batch, those too that have no more to make: so none waits long for another one.
    """
    size = IN_A_FILE[kinds[0]]
    shares = [firsts[number :: ranks.count()] for number in range(ranks.count())]
    left = max(sum(_batches(len(numbers), first, size, batch) for first in share) for share in shares)
    own = shares[ranks.rank()]
    views_missing = sum(len(numbers[first : first + size]) for first in own)
    bar = tqdm(total=views_missing, unit="view", desc="features", leave=False)
    for done, first in enumerate(own):
        views, parts = numbers[first : first + size], []
        for start in range(0, len(views), batch):
            parts.append(_stored(make(views[start : start + batch])))
            ranks.wait_for_all()
            left -= 1
        columns = {kind: np.concatenate([part[kind] for part in parts]) for kind in kinds}
        if not done:
            _check_room(folder, sum(column.nbytes for column in columns.values()) * len(firsts))
        for kind, column in columns.items():
            _write(path_of(folder, kind, first // size), column)
        bar.update(len(views))
    bar.close()
    for _ in range(left):
        ranks.wait_for_all()


def _batches(views: int, first: int, size: int, batch: int) -> int:
    """Batches of the file that begins with view `first`."""
    return len(range(first, min(first + size, views), batch))


def _stored(made: dict[str, Tensor]) -> dict[str, NDArray[Any]]:
    """Features on the host as they are stored."""
    columns = {}
    for kind, values in made.items():
        column = values.to(getattr(torch, np.dtype(TYPES[kind]).name))
        if not bool(column.isfinite().all()):
            raise FsarError(f"features ({kind}) of the trunk are not finite as {column.dtype}: leave freeze_trunk out")
        columns[kind] = column.cpu().numpy()
    return columns


def _check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise DiskError(
            f"{folder}: the features need {size / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: "
            "take fewer --cached-views, or another disk with --feature-cache"
        )


def _write(path: Path, column: NDArray[Any]) -> None:
    with disk_errors(path):
        with temporary(path).open("wb") as file:
            np.save(file, column)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary(path), path)


def _mapped(path: Path) -> NDArray[Any]:
    try:
        mapped: NDArray[Any] = np.load(path, mmap_mode="r")
    except Exception as error:  # a damaged header can fail anywhere
        raise FsarError(f"{path} is damaged ({error}): delete it and type the same command again") from error
    return mapped
