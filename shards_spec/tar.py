"""Write a tar of a series so that equal samples are equal bytes, and scan one without trust."""

from __future__ import annotations

import hashlib
import os
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO, Self

from shards_spec.errors import ShardError
from shards_spec.files import TEMPORARY, disk_errors
from shards_spec.schema import BLOCK, archive_size, padded

OWNER = "fsar"
MODE = 0o444


@cache
def _nameless() -> bytes:
    """Make a header without name, size and checksum: our members differ in no other field."""
    info = tarfile.TarInfo()
    info.mode, info.mtime = MODE, 0
    info.uname = info.gname = OWNER
    block = info.tobuf(tarfile.USTAR_FORMAT)
    return block[:148] + b" " * 8 + block[156:]


def header(name: str, size: int) -> bytes:
    """Return the ustar header of a member of this name and size, as our writer makes it.

    `verify` makes one for every member.  From a template it takes a third of the time of `tarfile`:
    the checksum is the sum of all bytes, and only those of name and size change.

    Raises:
        ValueError: the name is no ASCII of 1 to 100 characters, or the size exceeds 8 GiB.
    """
    path, digits, block = name.encode("ascii"), b"%011o" % size, _nameless()
    if not 0 < len(path) <= 100 or len(digits) > 11:
        raise ValueError(f"no plain ustar header holds {len(path)} characters and {size} bytes")
    checksum = b"%06o\0" % (sum(block) + sum(path) + sum(digits) - sum(block[124:135]))
    return b"".join((path.ljust(100, b"\0"), block[100:124], digits, block[135:148], checksum, block[155:]))


@dataclass(frozen=True)
class Member:
    """One file inside a tar: its name, and the start, size and CRC-32 of its payload."""

    name: str
    offset: int
    size: int
    crc32: int

    @property
    def key(self) -> str:
        """Key of its sample: all before the first dot."""
        return self.name.partition(".")[0]

    @property
    def extension(self) -> str:
        """All after the first dot."""
        return self.name.partition(".")[2]


class _Hashed:
    """A file to write to; its bytes are hashed and counted on their way, not read again later."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        """Write all of it."""
        self.digest.update(data)
        self.size += len(data)
        return self.file.write(data)


def unfinished(path: Path, process: int) -> Path:
    """Return the name under which a process writes a shard.

    The number of the process keeps apart what an orphan of a killed run still writes.
    """
    return path.with_name(f"{path.name}.{process}{TEMPORARY}")


class TarSeriesWriter:
    """Write one shard of one series under a temporary name; `files.publish` gives it its own.

    Args:
        path: Final name of the shard.

    Attributes:
        members: The members that were added, in stored order.
    """

    def __init__(self, path: Path) -> None:
        from webdataset import TarWriter  # noqa: PLC0415 -- it loads PyTorch, for seconds

        self.path = path
        self.written = unfinished(path, os.getpid())
        self.members: list[Member] = []
        with disk_errors(path):
            self._file: BinaryIO = self.written.open("wb")
        self._out = _Hashed(self._file)
        self._tar = TarWriter(
            self._out, user=OWNER, group=OWNER, mode=MODE, encoder=False, mtime=0, format="USTAR_FORMAT"
        )

    @property
    def size(self) -> int:
        """Bytes written; those of the whole archive once it is closed."""
        return self._out.size

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of the bytes written."""
        return self._out.digest.hexdigest()

    def add(self, key: str, files: Mapping[str, bytes]) -> None:
        """Append one sample: extension -> content; members are stored sorted by extension.

        Raises:
            DiskError: the disk is full or cannot be written.
        """
        with disk_errors(self.path):
            for extension in sorted(files):
                data = files[extension]
                offset = self._tar.tarstream.offset + BLOCK
                self._tar.write({"__key__": key, extension: data})
                self.members.append(Member(f"{key}.{extension}", offset, len(data), zlib.crc32(data)))

    def close(self) -> None:
        """End the archive, still under the temporary name."""
        with disk_errors(self.path):
            self._tar.close()
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            if not self._file.closed:  # the shard is not whole: remove it
                self._tar.tarstream.fileobj.closed = True  # else its destructor would write more
                with suppress(OSError):
                    self._file.close()
                self.written.unlink(missing_ok=True)


def scan(path: Path) -> Iterator[tuple[Member, bytes]]:
    """Yield the members of a shard in order, with their payloads, from the tar only.

    Each header must be the one that we would write.

    Raises:
        ShardError: naming the shard and the offset of the first header that is damaged or not ours.
    """
    with path.open("rb") as file:
        total = os.fstat(file.fileno()).st_size
        position = 0
        while True:
            block = file.read(BLOCK)
            if block == bytes(BLOCK):
                break
            member = parse_header(block, position, path)
            if member.offset + padded(member.size) > total:  # before memory is taken for what is not there
                raise ShardError(f"{path}: cut short inside {member.name} at byte {total}")
            data = file.read(padded(member.size))[: member.size]
            yield Member(member.name, member.offset, member.size, zlib.crc32(data)), data
            position = member.offset + padded(member.size)
        if archive_size(position) != total:
            raise ShardError(f"{path}: has {total} bytes where its members need {archive_size(position)}")


def parse_header(block: bytes, position: int, path: Path) -> Member:
    """Read one 512-byte header and compare it with the one that we would write.

    Raises:
        ShardError: it differs.
    """
    try:
        info = tarfile.TarInfo.frombuf(block, "ascii", "strict")
        if header(info.name, info.size) != block:
            raise ShardError(f"{path}: the header at byte {position} is damaged or not ours")
    except (tarfile.HeaderError, ValueError) as error:
        raise ShardError(f"{path}: the header at byte {position} is damaged ({error})") from error
    return Member(info.name, position + BLOCK, info.size, 0)


def file_sha256(path: Path) -> str:
    """Return the hex SHA-256 of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
