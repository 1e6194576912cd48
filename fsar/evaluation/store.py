"""Keep computed values on disk (zarr v3), so that the next command reads what this one computed.

    STORE/KEY/part-000000/   number [n] int64, and a column [n, ...] for each tensor

A value belongs to a number: that of a view or of a video.  Facts are all that it depends on
besides.  Their SHA-256 is KEY: values of another model, shard set or rule lie in another group,
whose attributes hold its facts.  A part has its final name only when it is whole, so a killed run
loses no more than the part that it was making.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from fsar.evaluation.cache_keys import key_of
from fsar.run import ranks
from pipelines.augment.on_cpu import ClipBuffers
from shards_spec.errors import FsarError
from shards_spec.files import (
    TEMPORARY,
    DiskError,
    disk_errors,
    only_writer,
    read_json,
    sync_folder,
    sync_tree,
    temporary,
)
from shards_spec.index.layout import Layout, chunk_files, column_sha256

Ints = NDArray[np.int64]
Values = dict[str, Tensor]  # name -> [n, ...], on the host
Make = Callable[[Ints], Iterator[Values]]  # numbers [n] -> their values, some at a time and in order

FORMAT = "fsar-values 1"  # of the root group, and of every key
CHUNK = 64 << 20  # most bytes of a file
NUMBERS = "number"
BFLOAT16 = "bfloat16"  # a type that neither NumPy nor zarr has: its bits are stored as int16
PART_NAME = re.compile(r"part-(\d{6,})")


class Group:
    """The stored values that share their facts.

    Args:
        store: Folder of all groups; it need not exist.
        facts: All that the values depend on besides their numbers, as JSON has it.
        verify: Compare a part with its hashes before its first value is read.  Without it a part is
            never read as a whole: for values that take more room than memory has, drawn one by one.
    """

    def __init__(self, store: Path, facts: Mapping[str, Any], *, verify: bool = True) -> None:
        self.store, self.verify = store, verify
        self.facts = {"store": FORMAT} | dict(facts)
        self.folder = store / key_of(self.facts)

    def find(self, numbers: Ints) -> Found:
        """Find where the values of numbers [n] are.

        Raises:
            FsarError: a part is damaged, or holds other columns than another one.
        """
        return Found(numbers, [Part(path) for path in self._paths()], verify=self.verify)

    @contextmanager
    def adding(self) -> Iterator[int]:
        """Hold the group for this run; give the number of the next part.  All processes call this.

        Raises:
            FsarError: another run holds it.
            DiskError: the disk refuses.
        """
        first = ranks.is_first()
        if first:
            self._create()
        with only_writer(self.folder) if first else nullcontext():
            if first:
                for leftover in self.folder.glob(f"part-*{TEMPORARY}"):  # of a killed run
                    shutil.rmtree(leftover)
            # The others come by this number only once the first process holds the folder.
            yield ranks.of_first(max((_number(path) for path in self._paths()), default=-1) + 1)
            ranks.wait_for_all()

    def write(self, part: int, numbers: Ints, values: Mapping[str, Tensor]) -> None:
        """Write values [n, ...] of numbers [n] as a part, whole or not at all, while `adding`.

        Raises:
            DiskError: the disk is full or refuses.
        """
        path = self.folder / f"part-{part:06d}"
        building = temporary(path)
        with disk_errors(path):
            attributes: dict[str, Any] = {"columns": [NUMBERS, *values]}
            group = zarr.open_group(building, mode="w", zarr_format=3, attributes=attributes)
            _write_column(group, NUMBERS, torch.from_numpy(numbers))
            for name, tensor in values.items():
                _write_column(group, name, tensor)
            sync_tree(building)
            building.replace(path)
            sync_folder(self.folder)

    def _paths(self) -> list[Path]:
        """List the whole parts, in their order."""
        return sorted(path for path in self.folder.glob("part-*") if PART_NAME.fullmatch(path.name))

    def _create(self) -> None:
        try:
            with disk_errors(self.store):
                root = zarr.open_group(self.store, mode="a", zarr_format=3, attributes={"format": FORMAT})
                root.require_group(self.folder.name)
                zarr.open_group(self.folder, mode="a").update_attributes(self.facts)
        except (ValueError, TypeError, KeyError) as error:  # zarr on what is no JSON, or no group
            raise FsarError(
                f"the zarr.json of {self.store} or of {self.folder} is damaged ({error!r}); delete it"
            ) from error


class Found:
    """Places of the values of numbers [n] among parts; reading is safe in threads.

    Raises:
        FsarError: parts that hold some of them differ in their columns.
    """

    def __init__(self, numbers: Ints, parts: Sequence[Part], *, verify: bool) -> None:
        self.numbers, self._verify = numbers, verify
        sizes = [len(part.numbers) for part in parts]
        held = np.concatenate([*(part.numbers for part in parts), [-1]])  # -1 is no number: there is one to look up
        owner, rows = np.repeat(np.arange(len(parts)), sizes), [np.arange(size) for size in sizes]
        order = np.argsort(held, kind="stable")  # a number that two parts hold is read from the first
        place = order[np.minimum(np.searchsorted(held, numbers, sorter=order), len(held) - 1)]
        self.there = held[place] == numbers
        self._part, self._row = np.append(owner, -1)[place], np.concatenate([*rows, [-1]])[place]
        self._parts = {int(number): parts[number] for number in np.unique(self._part[self.there])}
        self._buffers: dict[str, ClipBuffers] = {}
        kinds = [part.kinds for part in self._parts.values()]
        for part, kind in zip(self._parts.values(), kinds, strict=True):
            if kind != kinds[0]:
                raise FsarError(f"{part.path} holds other columns than the parts before it; delete it")
        for name, (dtype, _) in kinds[0].items() if kinds else ():
            self._buffers[name] = ClipBuffers(dtype)

    @property
    def names(self) -> set[str]:
        """Names of the columns; none where nothing is there."""
        return set(self._buffers)

    def lacking(self) -> Ints:
        """Return the numbers whose values some process of the run does not find, rising.

        All of them then make these: one may look too early to see a part that another sees.
        """
        return np.unique(np.concatenate(ranks.gather_values(self.numbers[~self.there])))

    def read(self, places: Ints) -> Values:
        """Read the values [p, ...] of the numbers at places [p]; all must be there.

        Raises:
            FsarError: a part is damaged.
        """
        where = list(zip(self._part[places].tolist(), self._row[places].tolist(), strict=True))
        parts = {number: self._parts[number] for number, _ in where}
        if self._verify:
            for part in parts.values():
                part.check()
        read = {}
        for name, buffers in self._buffers.items():
            columns = {number: part.columns[name] for number, part in parts.items()}
            one = columns[where[0][0]]
            values = buffers.take(len(places), *one.shape)
            rows = values.numpy()
            for place, (number, row) in enumerate(where):
                rows[place] = columns[number].row(row)
            read[name] = values.view(torch.bfloat16) if one.bits else values
        return read


class Part:
    """A whole part: its numbers [n], and columns [n, ...] that are mapped into memory.

    Raises:
        FsarError: it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._checked = path, False
        with self._damage():
            names = read_json(path / "zarr.json")["attributes"]["columns"]
            if not all(str(name).isidentifier() for name in names):  # nor paths to elsewhere
                raise FsarError(f"{path} is damaged (its zarr.json names no columns)")
            columns = {str(name): Column(path / str(name)) for name in names}
            number = columns.pop(NUMBERS)
            number.check()
            self.numbers: Ints = number.values()
        self.columns, lengths = columns, {len(column) for column in columns.values()}
        if (self.numbers.dtype.name, self.numbers.ndim, {len(self.numbers)}) != ("int64", 1, lengths):
            raise FsarError(f"{path} holds other columns than one value for each number; delete it")

    @property
    def kinds(self) -> dict[str, tuple[np.dtype[Any], tuple[Any, ...]]]:
        """Type and row shape of each column."""
        return {name: (column.dtype, (*column.shape, column.bits)) for name, column in self.columns.items()}

    def check(self) -> None:
        """Compare all columns with their hashes, once.

        Raises:
            FsarError: a column is damaged.
        """
        if not self._checked:
            with self._damage():
                for column in self.columns.values():
                    column.check()
            self._checked = True

    @contextmanager
    def _damage(self) -> Iterator[None]:
        """Say of whatever cannot be read that the part is to be deleted."""
        try:
            yield
        except FsarError as error:
            raise FsarError(f"{error}; delete {self.path} and type the same command again") from error
        except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise FsarError(f"{self.path} is damaged ({error!r}); delete it and type the same command again") from error


class Column:
    """Rows [n, ...] of a column, mapped into memory: a row is read when it is asked for."""

    def __init__(self, path: Path) -> None:
        layout = Layout.load(path)
        files = chunk_files(path, len(layout.shape))
        if layout.packed or len(files) != -(-layout.shape[0] // layout.chunk):
            raise FsarError(f"{path} is damaged (it lacks rows, or is compressed)")
        self.path, self._length, self._chunk = path, layout.shape[0], layout.chunk
        self.dtype, self.shape = np.dtype(layout.dtype), layout.shape[1:]
        self.bits = layout.attributes.get("bits") == BFLOAT16 and self.dtype == np.int16
        self._sha256 = layout.attributes.get("sha256")
        self._chunks = [_mapped(files[number], layout) for number in range(len(files))]

    def __len__(self) -> int:
        return self._length

    def row(self, number: int) -> NDArray[Any]:
        """Return one row [...], mapped."""
        row: NDArray[Any] = self._chunks[number // self._chunk][number % self._chunk]
        return row

    def values(self) -> NDArray[Any]:
        """Return all rows [n, ...], copied."""
        return np.concatenate(self._chunks)[: len(self)]

    def check(self) -> None:
        """Compare the column with its hash.

        Raises:
            FsarError: it is damaged.
        """
        if column_sha256(self.values()) != self._sha256:
            raise FsarError(f"{self.path} is damaged")


def _mapped(file: Path, layout: Layout) -> NDArray[Any]:
    """Map a chunk [chunk, ...] of a column.

    torch keeps no file open for it, as NumPy does: a store of features has more files than a
    process may open.
    """
    size = layout.chunk * layout.row_bytes
    if file.stat().st_size != size:
        raise FsarError(f"{file} is damaged ({file.stat().st_size:,} bytes, not {size:,})")
    content = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8).numpy()
    return content.view(np.dtype(layout.dtype).newbyteorder("<")).reshape(layout.chunk, *layout.shape[1:])


def _write_column(group: zarr.Group, name: str, tensor: Tensor) -> None:
    """Write a column [n, ...] uncompressed: so it can be mapped, and floats hardly shrink."""
    bits = tensor.dtype == torch.bfloat16
    column = (tensor.view(torch.int16) if bits else tensor).numpy()
    attributes: dict[str, Any] = {"sha256": column_sha256(column)} | ({"bits": BFLOAT16} if bits else {})
    rows = min(len(column), max(1, CHUNK // max(column[:1].nbytes, 1)))
    group.create_array(
        name,
        data=column,
        chunks=(rows, *column.shape[1:]),
        compressors=None,
        attributes=attributes,
        config={"write_empty_chunks": True},  # zarr leaves out a chunk of zeros otherwise, which cannot be mapped
    )


def _number(path: Path) -> int:
    return int(path.name.partition("-")[2])


def fill(group: Group, numbers: Ints, make: Make, *, size: int, batch: int, unit: str, hint: str) -> Found:
    """Find the values of numbers [n] in a group; make missing ones first.

    Of several processes each makes some parts.

    Args:
        group: Where they are kept.
        numbers: [n], each once.
        make: Makes the values of a part.
        size: Values of a part.
        batch: Values that `make` gives at a time.
        unit: Word for a value on the progress bar.
        hint: Way out where the disk has no room, for the error's end.

    Raises:
        FsarError: a part is damaged, or another run adds to the group.
        DiskError: there is no room.
    """
    found = group.find(numbers)
    missing = found.lacking()
    if len(missing):
        with group.adding() as first:
            parts = [missing[start : start + size] for start in range(0, len(missing), size)]
            _make_parts(group, first, parts, make, batch=batch, unit=unit, hint=hint)
        found = group.find(numbers)
    if not found.there.all():
        raise FsarError(f"{group.folder} lacks what another process has made: give a folder that all of them share")
    return found


def _make_parts(
    group: Group, first: int, parts: Sequence[Ints], make: Make, *, batch: int, unit: str, hint: str
) -> None:
    """Make this process's share of parts.

    The processes meet after every batch, also those that have made theirs: so none waits long for
    another one.
    """
    count, rank = ranks.count(), ranks.rank()
    batches = [-(-len(part) // batch) for part in parts]
    left = max(sum(batches[other::count]) for other in range(count))  # meetings
    own = range(rank, len(parts), count)
    with tqdm(total=sum(len(parts[part]) for part in own), unit=unit, desc="features", leave=False) as bar:
        for part in own:
            made = []
            for values in make(parts[part]):
                made.append(values)
                ranks.wait_for_all()
                left -= 1
                bar.update(len(next(iter(values.values()))))
            columns = {name: torch.cat([values[name] for values in made]) for name in made[0]}
            if part == rank:
                _check_room(group.folder, sum(each.nbytes for each in columns.values()) * len(parts), hint)
            group.write(first + part, parts[part], columns)
    for _ in range(left):
        ranks.wait_for_all()


def _check_room(folder: Path, size: int, hint: str) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise DiskError(f"{folder}: the features need {size / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: {hint}")
