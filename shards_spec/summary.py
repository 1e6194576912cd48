"""Describe each tar of a shard set by two files: the summary `.json` and DALI's `.idx`.

Both are made while the tar is written, and can be made again from the tar only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards_spec.errors import FsarError, ShardError
from shards_spec.files import disk_errors, json_line, parse_json, read_json, sync_folder, write_whole
from shards_spec.schema import (
    BLOCK,
    CODECS,
    MOST_FRAMES,
    MOST_SIDE,
    PER_PICTURE,
    padded,
    path_fault,
    picture_name,
    quoted,
    row_of_key,
    sample_key,
    text_fault,
)
from shards_spec.tar import Member, file_sha256, scan

SHA256 = re.compile(r"[0-9a-f]{64}")
REQUIRED = frozenset({"name", "label", "group", "frames", "fps", "source_size", "size"})
TAIL = ("cls", "json")  # the last two members of a sample, in their stored order


@dataclass(frozen=True)
class Sample:
    """One video inside one shard.

    Attributes:
        row: Its catalogue row.
        offset: Bytes of the shard before its first header.
        frames: Source frame numbers of its pictures.
        sizes: Bytes of all its members in stored order: the pictures, `cls`, `json`.
        crc32: CRC-32 of the same members.
        info: Content of its `json`.
    """

    row: int
    offset: int
    frames: list[int]
    sizes: list[int]
    crc32: list[int]
    info: dict[str, Any]

    @property
    def codec(self) -> str:
        """Codec of its pictures."""
        return str(self.info.get("codec", "jpeg"))

    def check(self) -> None:
        """Raise ValueError or TypeError where lists differ in length or the JSON is not ours."""
        row_of_key(sample_key(self.row))
        if not len(self.sizes) == len(self.crc32) == len(self.frames) + len(TAIL):
            raise ValueError(f"sample {self.row} has lists of different lengths")
        _check_info(self.info, self.frames)

    @property
    def end(self) -> int:
        """Offset of the first byte after its last member's padding."""
        return self.offset + sum(BLOCK + padded(size) for size in self.sizes)


@dataclass(frozen=True)
class Summary:
    """One shard of one series."""

    size: int
    sha256: str
    samples: list[Sample]

    @property
    def rows(self) -> set[int]:
        """The catalogue rows of its samples."""
        return {sample.row for sample in self.samples}

    def to_json(self) -> bytes:
        """Return the content of the `.json` of a tar."""
        return json_line({"bytes": self.size, "sha256": self.sha256, "samples": [vars(s) for s in self.samples]})

    @staticmethod
    def load(path: Path) -> Summary:
        """Read the `.json` of a tar.

        Raises:
            FsarError: it is missing or damaged.
        """
        raw = read_json(path)
        try:
            summary = Summary(raw["bytes"], raw["sha256"], [Sample(**sample) for sample in raw["samples"]])
            if not SHA256.fullmatch(summary.sha256) or type(summary.size) is not int or not 0 <= summary.size < 1 << 63:
                raise ValueError("its sha256 or bytes are none")  # noqa: TRY301 -- as the errors below
            for sample in summary.samples:
                sample.check()
        except (KeyError, TypeError, ValueError) as error:
            raise ShardError(f"{path} is damaged: {error!r}") from error
        return summary


def summarise(members: Iterable[Member], infos: dict[int, dict[str, Any]], path: Path) -> list[Sample]:
    """Group the members of a shard, in stored order, into samples.

    Raises:
        ShardError: a sample that is not contiguous, not whole or not sorted.
    """
    grouped: dict[int, list[Member]] = {}
    last = -1
    for member in members:
        row = row_of_key(member.key)
        if row < last or (row in grouped and grouped[row][-1].extension >= member.extension):
            raise ShardError(f"{path}: {member.name} at byte {member.offset} is out of order")
        grouped.setdefault(row, []).append(member)
        last = row
    return [_sample(row, of_row, infos, path) for row, of_row in grouped.items()]


def _sample(row: int, members: list[Member], infos: dict[int, dict[str, Any]], path: Path) -> Sample:
    if tuple(m.extension for m in members[-2:]) != TAIL or row not in infos:
        raise ShardError(f"{path}: the sample {members[0].key} is not whole (its cls or json is missing)")
    try:
        frames = [int(m.extension.partition(".")[0]) for m in members[:-2]]
    except ValueError:
        raise ShardError(f"{path}: the sample {members[0].key} has a member that is no frame") from None
    sizes, crcs = [m.size for m in members], [m.crc32 for m in members]
    sample = Sample(row, members[0].offset - BLOCK, frames, sizes, crcs, infos[row])
    try:
        sample.check()
    except (TypeError, ValueError) as error:
        raise ShardError(f"{path}: the JSON of the sample {members[0].key} is none of ours ({error})") from error
    _check_pictures(sample, members[:-2], path)
    return sample


def _check_pictures(sample: Sample, pictures: Iterable[Member], path: Path) -> None:
    """Refuse pictures that differ from the JSON of their sample: readers decode them by it."""
    if sample.codec not in CODECS:
        raise ShardError(f'{path}: the sample of row {sample.row} has pictures of an unknown codec "{sample.codec}"')
    size = 3 * math.prod(sample.info["size"]) if sample.codec == "raw" else None
    for picture, frame in zip(pictures, sample.frames, strict=True):
        if picture.extension != picture_name(frame, sample.codec):
            raise ShardError(f"{path}: {picture.name} is no {sample.codec} picture, as its sample's JSON has it")
        if size is not None and picture.size != size:
            raise ShardError(f"{path}: {picture.name} has {picture.size} bytes where its size needs {size}")


def from_tar(tar: Path) -> Summary:
    """Make the summary of a shard from its tar only.

    Raises:
        ShardError: the tar is damaged.
    """
    members: list[Member] = []
    infos: dict[int, dict[str, Any]] = {}
    for member, data in scan(tar):
        members.append(member)
        if member.extension == "json":
            try:
                infos[row_of_key(member.key)] = parse_json(data)
            except ValueError as error:
                raise ShardError(f"{tar}: {member.name} at byte {member.offset} is no JSON ({error})") from error
    return Summary(tar.stat().st_size, file_sha256(tar), summarise(members, infos, tar))


def dali_index(samples: Iterable[Sample]) -> bytes:
    """Return the `.idx` of DALI's `readers.webdataset`, one line a sample (`wds2idx` v1.2)."""
    lines = []
    for sample in samples:
        key = sample_key(sample.row)
        extensions = [picture_name(frame, sample.codec) for frame in sample.frames] + list(TAIL)
        offset, parts = sample.offset, []
        for extension, size in zip(extensions, sample.sizes, strict=True):
            parts.append(f"{extension} {offset + BLOCK} {size} {key}.{extension}")
            offset += BLOCK + padded(size)
        lines.append(" ".join(parts))
    return "\n".join([f"v1.2 {len(lines)}", *lines, ""]).encode()


def sidecars(tar: Path) -> tuple[Path, Path]:
    """Return the paths of the `.idx` and the summary of a tar."""
    return tar.with_suffix(".idx"), tar.with_suffix(".json")


def drop_sidecars(tar: Path) -> None:
    """Remove both, durably.

    Called before a shard is replaced, so that they never describe another tar.
    """
    with disk_errors(tar):
        for path in sidecars(tar):
            path.unlink(missing_ok=True)
        sync_folder(tar.parent)


def write_sidecars(tar: Path, summary: Summary) -> None:
    """Write both for a whole tar."""
    index, description = sidecars(tar)
    write_whole(index, dali_index(summary.samples))
    write_whole(description, summary.to_json())


def check_as_described(tar: Path) -> None:
    """Refuse a tar whose summary describes another one: a new index would hide the damage.

    Raises:
        ShardError: their SHA-256 differ.  A missing or unreadable summary is no reason.
    """
    described: str | None = None
    with suppress(FsarError):
        described = Summary.load(sidecars(tar)[1]).sha256
    if described is not None and described != file_sha256(tar):
        raise ShardError(
            f"{tar} is not the one that {tar.stem}.json describes: damaged or replaced; "
            f"copy it again, or delete {tar.stem}.json to take it as it is"
        )


def load_or_make(tar: Path) -> Summary:
    """Return the summary of a whole tar; make it again where it is missing or of another tar.

    Raises:
        ShardError: the tar is damaged.
    """
    index, description = sidecars(tar)
    summary: Summary | None = None
    with suppress(FsarError):
        summary = Summary.load(description)
    if summary is None or summary.size != tar.stat().st_size or not index.exists():
        summary = from_tar(tar)
        write_sidecars(tar, summary)
    return summary


def _check_info(info: Any, frames: Sequence[int]) -> None:  # noqa: ANN401 -- whatever the JSON holds
    """Raise ValueError where the JSON of a sample is not as in SPEC.md; `frames`: its pictures."""
    if not isinstance(info, dict) or not info.keys() >= REQUIRED:
        raise ValueError(f"it is no object with {', '.join(sorted(REQUIRED))}")
    _check_info_names(info)
    count, fps = info.get("frames"), info.get("fps")
    if type(count) is not int or not 0 < count <= MOST_FRAMES:
        raise ValueError(f"frames is {str(count)[:40]!r}")
    if not isinstance(fps, int | float) or not 0 <= fps < math.inf:
        raise ValueError(f"fps is {str(fps)[:40]!r}")
    for key in ("size", "source_size"):
        sides = info.get(key)
        if not (isinstance(sides, list) and len(sides) == 2 and all(_is_side(side) for side in sides)):
            raise ValueError(f"{key} is {str(sides)[:40]!r}")
    if info.get("kept", frames) != frames or (frames and not 0 <= min(frames) <= max(frames) < count):
        raise ValueError("its pictures are not those that it names, or of frames that it has not")
    for key in PER_PICTURE:
        values = info.get(key, frames)
        if not isinstance(values, list) or len(values) != len(frames):
            raise ValueError(f"{key} has not one value for each picture")


def _check_info_names(info: dict[str, Any]) -> None:
    name, label, group = info.get("name"), info.get("label"), info.get("group")
    if not isinstance(name, str) or not isinstance(label, str) or not isinstance(group, str | None):
        raise ValueError("name, label or group is no text")  # noqa: TRY004
    for text, fault in ((name, path_fault(name)), (label, text_fault(label)), (group or "", text_fault(group or ""))):
        if fault:
            raise ValueError(f"{quoted(text)} {fault}")


def _is_side(side: Any) -> bool:  # noqa: ANN401
    return type(side) is int and 0 <= side <= MOST_SIDE
