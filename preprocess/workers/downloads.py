"""Copy videos at URLs to files for the decoder, the next one while this one is decoded."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from preprocess.decode import VideoError
from shards_spec.errors import GoneError
from shards_spec.files import disk_errors
from shards_spec.remote.store import Remote, RemotePath


class Downloads:
    """Files of videos by row; videos at URLs are copied to a temporary folder. A context manager.

    At most three copies are on the disk at once. One video is decoded, the decoder of the next one
    was started, and the one after it is still copied.
    """

    def __init__(self, paths: Mapping[int, Path]) -> None:
        self._paths = paths
        self._next = dict(zip(paths, list(paths)[1:], strict=False))  # row -> the row after it
        self._stack = ExitStack()
        self._copies: dict[int, Future[None]] = {}
        self._pool: ThreadPoolExecutor | None = None
        if any(isinstance(path, RemotePath) for path in paths.values()):
            self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="fsar-videos-")))
            self._pool = self._stack.enter_context(ThreadPoolExecutor(1))

    def take(self, row: int) -> Path:
        """Return the file of a video, and begin to copy the next one.

        Raises:
            VideoError: it was listed and is gone.
            RemoteError: the place refuses us or does not answer.
            DiskError: the disk is full.
        """
        path = self._paths[row]
        if not isinstance(path, RemotePath):
            return path
        self._begin_copy(row)
        if row in self._next:
            self._begin_copy(self._next[row])
        self._copies.pop(row).result()
        return self._copy(row)

    def done(self, row: int) -> None:
        """Remove the copy of a video, if it has one: nobody reads it any more."""
        if isinstance(self._paths.get(row), RemotePath):
            self._copy(row).unlink(missing_ok=True)

    def _begin_copy(self, row: int) -> None:
        if self._pool is not None and row not in self._copies:
            self._copies[row] = self._pool.submit(self._fetch, row)

    def _fetch(self, row: int) -> None:
        path = self._paths[row]
        if isinstance(path, RemotePath):
            try:
                with disk_errors(self._copy(row)):
                    Remote(str(path.parent)).fetch(path.name, self._copy(row))
            except GoneError:
                raise VideoError("unreadable", "it was listed and is gone") from None

    def _copy(self, row: int) -> Path:
        return self._folder / f"{row:08d}{self._paths[row].suffix}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for copy in self._copies.values():
            copy.cancel()
        self._stack.close()
