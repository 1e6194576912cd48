"""Write files that are either whole or absent: temporary name, fsync, rename, fsync of the folder.

Locks, JSON and the form of URLs are here too.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Generic, TypeVar

from shards_spec.errors import FsarError

# Names of the files that a run leaves unfinished in a shard set: `sweep` removes nothing else.
OURS = re.compile(
    r"([a-z0-9]+-\d{6}\.(tar|idx|json)(\.\d+)?|index\.zarr|old-index|(dataset|plan)\.json|failures\.jsonl|part-\d+-of-\d+(\.jsonl)?|parts|attempt-[0-9a-f]{32})\.tmp"
)
TEMPORARY = ".tmp"  # every unfinished file ends with it; no file that ends with it is ever read
OPEN_FILES = 256  # that a reader keeps open; well below the usual limit of 1,024 a process
URL = re.compile(r"(?P<protocol>[a-z][a-z0-9+.-]+):/{1,2}(?=[^/])")
NO_LOCKS = {errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}  # of network file systems, on a folder
REFUSED = {
    getattr(errno, name)
    for name in "ENOSPC EDQUOT EIO EROFS EACCES EPERM EFBIG EEXIST ENOTDIR EISDIR ENAMETOOLONG".split()  # noqa: SIM905
}
Key = TypeVar("Key")
Value = TypeVar("Value")


class DiskError(FsarError):
    """A disk that is full or refuses to be written."""


class NoLocksError(FsarError):
    """A file system that locks no files; the text is the reason of the system."""


class Recent(Generic[Key, Value]):
    """The open files, or other things, that were used last; safe in threads.

    Args:
        limit: Most that are kept.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: OrderedDict[Key, Value] = OrderedDict()  # the one used last at the end
        self._lock = threading.Lock()

    def __contains__(self, key: Key) -> bool:
        return key in self._kept

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """Return the value of a key; make it where it is not kept."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        value = make()  # without the lock: it may be a download, and other threads need not wait
        with self._lock:
            value = self._kept.setdefault(key, value)  # another thread may have been faster
            self._kept.move_to_end(key)
            if len(self._kept) > self._limit:
                self._kept.popitem(last=False)  # a file is closed when its last reader lets go
        return value

    def clear(self) -> list[Value]:
        """Keep nothing any more; return what was kept."""
        with self._lock:
            values = list(self._kept.values())
            self._kept.clear()
        return values


def is_url(text: str) -> bool:
    """Tell whether a text is a URL, not a path."""
    return "://" in text and URL.match(text) is not None


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a failed write under `path` into a DiskError; finished files are left as they are."""
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        free = shutil.disk_usage(nearest_folder(path)).free / 1e6
        raise DiskError(
            f"cannot write {path}: {os.strerror(error.errno or 0)} ({free:.0f} MB free); "
            "make room or choose another folder, then type the same command again: finished files are kept"
        ) from error


@contextmanager
def only_writer(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Make `folder` and hold it: two runs at once would remove each other's unfinished files.

    On a file system that locks no folders (NFS) it is not held.

    Args:
        folder: The shard set.
        shared: Hold it together with others that share it, such as the parts of a run.

    Raises:
        FsarError: another process holds it.
        DiskError: it cannot be made.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(NoLocksError):
            lock(handle, shared=shared)
        yield
    except BlockingIOError:
        raise FsarError(f"{folder} is being written by another process; wait for it or stop it") from None
    finally:
        os.close(handle)  # releases the lock


def lock(handle: int, *, shared: bool = False, wait: bool = False) -> None:
    """Lock an open file or folder until its handle is closed.

    The lock of a killed process is gone with it.

    Args:
        handle: The open file or folder.
        shared: Hold it together with others that share it.
        wait: Wait while another process holds it.

    Raises:
        BlockingIOError: another process holds it, and we do not wait.
        NoLocksError: the file system has no such locks.
    """
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise NoLocksError(str(error.strerror)) from error


def nearest_folder(path: Path) -> Path:
    """Return the closest folder above `path` that exists."""
    while not path.is_dir():
        path = path.parent
    return path


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Make the bytes of `path` durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Make all files below `folder` durable, and their names."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
        else:
            sync_file(path)
    sync_folder(folder)


def temporary(path: Path) -> Path:
    """Return the name under which `path` is written before it is whole."""
    return path.with_name(path.name + TEMPORARY)


def publish(written: Path, path: Path) -> None:
    """Give a finished temporary file its final name.

    Its bytes are made durable before, the name after: a crash between leaves the old file.

    Raises:
        DiskError: the disk refuses.
    """
    with disk_errors(path):
        sync_file(written)
        written.replace(path)
        sync_folder(path.parent)


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a crash leaves the old file or the new one, never a part.

    Raises:
        DiskError: the disk is full or cannot be written.
    """
    with disk_errors(path):
        temporary(path).write_bytes(data)
        publish(temporary(path), path)


def json_bytes(value: Any) -> bytes:  # noqa: ANN401 -- JSON is what it is
    """Return a value as JSON text; sorted keys make equal values equal bytes."""
    return (json.dumps(value, sort_keys=True, indent=1) + "\n").encode()


def json_line(value: Any) -> bytes:  # noqa: ANN401
    """Return a value as one line of JSON, without the newline."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def read_json(path: Path) -> Any:  # noqa: ANN401
    """Read a JSON file.

    Raises:
        FsarError: the file is missing, cannot be read or is no JSON.
    """
    try:
        if path.exists() and not path.is_file():  # to open a pipe would wait for ever
            raise FsarError(f"{path} is no file")
        return parse_json(path.read_bytes())
    except FileNotFoundError:
        raise FsarError(f"{path} is missing") from None
    except OSError as error:
        raise FsarError(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise FsarError(f"{path} is damaged: it is no JSON ({error})") from error


def parse_json(data: str | bytes) -> Any:  # noqa: ANN401
    """Return the value of JSON text.

    Raises:
        ValueError: it is no JSON, holds NaN or infinity, or is nested too deeply to be ours.
    """
    try:
        return json.loads(data, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse_constant(name: str) -> Any:  # noqa: ANN401
    raise ValueError(f"{name} is no number of JSON")


def sweep(folder: Path) -> None:
    """Remove the unfinished files of an interrupted run in `folder`."""
    with disk_errors(folder):
        for leftover in (path for path in folder.glob(f"*{TEMPORARY}") if OURS.fullmatch(path.name)):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink(missing_ok=True)  # a killed run's worker may be cleaning up yet
