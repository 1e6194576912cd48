"""Embeddings kept on disk (zarr v3): a model that is evaluated again embeds only the videos that are not there yet.

    STORE.zarr/KEY/part-000000/   view [n] int64, tokens [n, ...], and every further tensor of the embedding

KEY is the SHA-256 of all that the numbers depend on, which the group's attributes hold: what another model, shard set
or sampling rule made has another key.  A part has its final name only when it is whole, and its columns carry hashes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from fsar.evaluation.keys import key_of
from fsar.methods import Embedding
from fsar.run import ranks
from shards_spec.errors import ConfigError, FsarError
from shards_spec.files import TEMPORARY, disk_errors, only_writer, read_json, sync_folder, sync_tree, temporary
from shards_spec.index.columns import read_column
from shards_spec.index.layout import column_sha256

Ints = NDArray[np.int64]

FORMAT = "fsar-embeddings 1"  # of the root group
PART, CHUNK = 128 << 20, 4 << 20  # bytes of a part, what a killed run may lose, and of a chunk in it
NUMBERS = "view"  # column of the numbers of views: catalogue row * 65536 + view
BFLOAT16 = "bfloat16"  # a type that neither NumPy nor zarr has: its bits are stored as int16
NAMES = tuple(field.name for field in fields(Embedding))


class EmbeddingStore:
    """A folder of embeddings, one group for each model and way of looking at videos.

    Raises:
        ConfigError: the path is a file or a folder of other things.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        other = path.is_dir() and any(path.iterdir()) and _format_of(path) != FORMAT
        if other or path.is_file():
            raise ConfigError(f"{path} is no store of embeddings: name a new folder, or one that fsar-eval made")

    def fetch(
        self,
        facts: Mapping[str, Any],
        numbers: Ints,
        make: Callable[[Ints], Iterable[Embedding]],
        *,
        device: torch.device,
    ) -> Embedding:
        """Embedding [n, ...] of views by their numbers: those that are stored, the others made and stored.

        Of several processes, all of which get it, the first one stores.

        Args:
            facts: All that the embeddings depend on besides the numbers.
            numbers: [n] of the views, rising.
            make: Numbers of views -> their embeddings in order, some at a time.
            device: Where the embedding is wanted.

        Raises:
            FsarError: a stored part is damaged, or another process is adding to the same group.
            DiskError: the disk is full; what was stored before stays.
        """
        folder, gathered = self.path / key_of(facts), _Gathered(numbers, device)
        for part in _parts(folder):
            _read_part(part, gathered)
        # What any process lacks, all make: one may see a part that another is too early for.
        missing = np.unique(np.concatenate(ranks.gather_values(numbers[~gathered.there])))
        tqdm.write(f"{self.path}: {len(numbers) - len(missing):,} of {len(numbers):,} embeddings were there")
        if len(missing) and ranks.is_first():
            with self._group(folder, facts):
                _add(folder, missing, make(missing), gathered)
        elif len(missing):
            _take(missing, make(missing), gathered)
        ranks.wait_for_all()
        return Embedding(**gathered.tensors)

    @contextmanager
    def _group(self, folder: Path, facts: Mapping[str, Any]) -> Iterator[None]:
        """Make a group, clear it of what a killed run left, and hold it."""
        with disk_errors(self.path):
            root = zarr.open_group(self.path, mode="a", zarr_format=3, attributes={"format": FORMAT})
            root.require_group(folder.name)
            zarr.open_group(folder, mode="a").update_attributes(dict(facts))
        with only_writer(folder):
            for leftover in folder.glob(f"part-*{TEMPORARY}"):
                shutil.rmtree(leftover)
            yield


class _Gathered:
    """The tensors [n, ...] of an embedding, filled in as its rows are read or made."""

    def __init__(self, numbers: Ints, device: torch.device) -> None:
        self.numbers, self.device = numbers, device
        self.there = np.zeros(len(numbers), dtype=np.bool_)
        self.tensors: dict[str, Tensor] = {}

    def fits(self, name: str, values: Tensor) -> bool:
        """Whether a column is like those of this name that were taken."""
        held = self.tensors.get(name, values)
        return values.ndim > 0 and (held.dtype, held.shape[1:]) == (values.dtype, values.shape[1:])

    def put(self, numbers: Ints, columns: Mapping[str, Tensor]) -> None:
        """Take the rows of these numbers, all of which are wanted."""
        places = np.searchsorted(self.numbers, numbers)
        self.there[places] = True
        index = torch.from_numpy(places).to(self.device)
        for name, values in columns.items():
            if name not in self.tensors:
                shape = (len(self.numbers), *values.shape[1:])
                self.tensors[name] = torch.empty(shape, dtype=values.dtype, device=self.device)
            self.tensors[name][index] = values.to(self.device)


def _format_of(path: Path) -> str | None:
    """What a zarr group says that it is; None where it is none or does not say."""
    try:
        found: str = read_json(path / "zarr.json")["attributes"]["format"]
    except (FsarError, KeyError, TypeError):
        return None
    return found


def _parts(folder: Path) -> list[Path]:
    """The whole parts of a group."""
    return sorted(path for path in folder.glob("part-*") if path.suffix != TEMPORARY)


def _read_part(part: Path, gathered: _Gathered) -> None:
    """Read what is wanted of a part."""
    numbers = _read(part, NUMBERS).numpy()
    wanted = np.isin(numbers, gathered.numbers)
    if wanted.any():
        rows = torch.from_numpy(wanted)
        columns = {name: _read(part, name) for name in NAMES if (part / name).is_dir()}
        alike = all(gathered.fits(name, values) for name, values in columns.items())
        if "tokens" not in columns or not alike or {len(values) for values in columns.values()} != {len(numbers)}:
            raise FsarError(f"{part} holds other columns than the embeddings that are asked for; delete it")
        gathered.put(numbers[wanted], {name: values[rows] for name, values in columns.items()})


def _read(part: Path, name: str) -> Tensor:
    """One column of a part, checked against its hash."""
    try:
        column, attributes = read_column(part / name)
    except FsarError as error:
        raise FsarError(f"{error}; delete {part}") from error
    if column_sha256(column) != attributes.get("sha256"):
        raise FsarError(f"{part}/{name} is damaged; delete {part} and type the same command again")
    bits = attributes.get("bits") == BFLOAT16 and column.dtype == np.int16
    return torch.from_numpy(column).view(torch.bfloat16) if bits else torch.from_numpy(column)


def _add(folder: Path, numbers: Ints, made: Iterable[Embedding], gathered: _Gathered) -> None:
    """Store embeddings of these numbers, which come in order, in parts; each is whole or absent."""
    first, waiting, size = 0, [], 0
    for embedding in made:
        waiting.append(_columns(embedding))
        size += sum(values.nbytes for values in waiting[-1].values())
        stop = first + sum(len(columns["tokens"]) for columns in waiting)
        if size >= PART or stop == len(numbers):
            columns = {name: torch.cat([each[name] for each in waiting]) for name in waiting[0]}
            gathered.put(numbers[first:stop], columns)
            _write_part(folder, {NUMBERS: torch.from_numpy(numbers[first:stop])} | columns)
            first, waiting, size = stop, [], 0


def _take(numbers: Ints, made: Iterable[Embedding], gathered: _Gathered) -> None:
    """The embeddings of these numbers, which come in order and another process stores."""
    first = 0
    for embedding in made:
        columns = _columns(embedding)
        stop = first + len(columns["tokens"])
        gathered.put(numbers[first:stop], columns)
        first = stop


def _columns(embedding: Embedding) -> dict[str, Tensor]:
    """The tensors of an embedding, on the host."""
    if type(embedding) is not Embedding:
        raise ConfigError(f"a {type(embedding).__name__} of a method's own cannot be stored: leave --embeddings out")
    columns = {name: getattr(embedding, name) for name in NAMES}
    return {name: values.cpu().contiguous() for name, values in columns.items() if values is not None}


def _write_part(folder: Path, columns: Mapping[str, Tensor]) -> None:
    last = max((int(path.name.partition("-")[2]) for path in _parts(folder)), default=-1)
    part = folder / f"part-{last + 1:06d}"
    building = temporary(part)
    with disk_errors(part):
        group = zarr.open_group(building, mode="w", zarr_format=3)
        for name, values in columns.items():
            bits = values.dtype == torch.bfloat16
            column = (values.view(torch.int16) if bits else values).numpy()
            chunks = (max(1, CHUNK // max(column[:1].nbytes, 1)), *column.shape[1:])
            attributes: dict[str, Any] = {"sha256": column_sha256(column)} | ({"bits": BFLOAT16} if bits else {})
            group.create_array(name, data=column, chunks=chunks, compressors=None, attributes=attributes)
        sync_tree(building)
        building.replace(part)
        sync_folder(folder)
