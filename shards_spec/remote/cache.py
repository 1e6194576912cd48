"""Keep files on the disk, up to a number of bytes; several processes share them.

The files that were used longest ago are removed first.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from shards_spec.errors import ConfigError
from shards_spec.files import TEMPORARY, NoLocksError, disk_errors, lock

COUNT = "bytes"  # the file of the number of bytes in use; it is locked while the number changes
SPARE = 10  # a tenth of the cache is freed at once: to list all files costs more than to remove one
ABANDONED = 3600.0  # seconds after which an unfinished file is that of a process that was killed
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(|K|M|G|T)I?B?", re.IGNORECASE)
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_bytes(text: str) -> int:
    """Read a number of bytes such as `50GB`, `800 MB` or `1.5T`.

    Raises:
        ConfigError: it is no such number.
    """
    match = SIZE.fullmatch(text.strip())
    if not match or (count := int(float(match[1]) * UNITS[match[2].upper()])) < 1:
        raise ConfigError(f'"{text}" is no number of bytes; expected one such as 50GB')
    return count


class Cache:
    """A folder of at most `limit` bytes; every process that uses it must have the same limit.

    A file has its name only when it is whole.  It may be damaged later, so its reader checks it.
    A file that is removed stays readable for those who opened it before.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def open(self, name: str) -> BinaryIO | None:
        """Open a file of the cache for reading; return None where it is not there."""
        try:
            file = (self.folder / name).open("rb")
        except FileNotFoundError:
            return None
        with suppress(PermissionError):  # a file that another user keeps here
            os.utime(file.fileno())
        return file

    def add(self, name: str, data: bytes) -> BinaryIO:
        """Keep `data` under a name, and open it.

        Raises:
            ConfigError: it is larger than the whole cache.
            DiskError: the disk is full.
        """
        if len(data) > self.limit:
            raise ConfigError(
                f"the cache {self.folder} may hold {self.limit:,} bytes, and one file of the shard set needs "
                f"{len(data):,}; give a larger --cache-size"
            )
        path = self.folder / name
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}{TEMPORARY}")
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with unfinished.open("w+b") as file:
                    self._reserve(file, len(data))
                    file.write(data)
                opened = unfinished.open("rb")  # before it has a name under which others may remove it
                with self._count():  # else `_make_room` of another process could list the files and miss both names
                    unfinished.replace(path)
            except OSError:
                unfinished.unlink(missing_ok=True)
                raise
        return opened

    def drop(self, name: str) -> None:
        """Remove a file that was damaged; the next `_make_room` no longer counts its bytes."""
        (self.folder / name).unlink(missing_ok=True)

    def _reserve(self, file: BinaryIO, size: int) -> None:
        """Count the bytes of a file before it is written.

        The file gets its size at once, so that other processes count it too.
        """
        with self._count() as count:
            if count.value < 0 or count.value + size > self.limit:
                count.value = self._make_room(size)
            os.truncate(file.fileno(), size)
            count.value += size

    @contextmanager
    def _count(self) -> Iterator[_Count]:
        """Hold the number of bytes in use (-1: not known) while no other process changes it."""
        handle = os.open(self.folder / COUNT, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._lock(handle)
            text = os.read(handle, 32)
            count = _Count(int(text) if text.isdigit() else -1)
            yield count
            os.truncate(handle, 0)
            os.pwrite(handle, str(count.value).encode(), 0)
        finally:
            os.close(handle)

    def _lock(self, handle: int) -> None:
        try:
            lock(handle, wait=True)
        except NoLocksError as error:
            raise ConfigError(
                f"the file system of the cache {self.folder} locks no files ({error}); give a --cache-dir "
                "on a local disk"
            ) from error

    def _make_room(self, size: int) -> int:
        """Free `size` bytes and a tenth of the cache; return the bytes then in use."""
        files = sorted(self._files(), key=lambda item: item[0])
        used = sum(size for _, size, _ in files)
        if used + size <= self.limit:
            return used
        aim = max(0, self.limit - self.limit // SPARE - size)
        now = time.time()
        for moment, bytes_of, path in files:
            if used <= aim:
                break
            if not path.endswith(TEMPORARY) or moment < now - ABANDONED:
                with suppress(FileNotFoundError):
                    os.unlink(path)  # noqa: PTH108 -- there may be a million
                used -= bytes_of
        return used

    def _files(self) -> Iterator[tuple[float, int, str]]:
        """Yield time of last use, bytes and path of every file that is still there."""
        for place, _, names in os.walk(self.folder):
            for name in names:
                path = f"{place}/{name}"
                if name != COUNT or place != str(self.folder):
                    with suppress(FileNotFoundError):
                        status = os.stat(path)  # noqa: PTH116
                        yield status.st_mtime, status.st_size, path


class _Count:
    """A number that the process with the lock may change."""

    def __init__(self, value: int) -> None:
        self.value = value
