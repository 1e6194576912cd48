"""Videos at URLs as files for the decoder: the next one is on its way while this one is decoded."""

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
    """Files of videos by row; those at URLs are copied to a temporary folder one ahead. A context manager.

    At most three videos are on the disk at once: one that is decoded, one whose decoder was started, one on its way.
    """

    def __init__(self, paths: Mapping[int, Path]) -> None:
        self._paths = paths
        self._next = dict(zip(paths, list(paths)[1:], strict=False))  # row -> the row after it
        self._stack = ExitStack()
        self._coming: dict[int, Future[None]] = {}
        self._pool: ThreadPoolExecutor | None = None
        if any(isinstance(path, RemotePath) for path in paths.values()):
            self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="fsar-videos-")))
            self._pool = self._stack.enter_context(ThreadPoolExecutor(1))

    def take(self, row: int) -> Path:
        """The file of a video.

        Raises:
            VideoError: it was listed and is gone.
            RemoteError: the place refuses us or does not answer.
            DiskError: the disk is full.
        """
        path = self._paths[row]
        if not isinstance(path, RemotePath):
            return path
        self._send_for(row)
        if row in self._next:
            self._send_for(self._next[row])
        self._coming.pop(row).result()
        return self._copy(row)

    def done(self, row: int) -> None:
        """Remove the copy of a video, which nobody reads any more; nothing where it has none."""
        if isinstance(self._paths.get(row), RemotePath):
            self._copy(row).unlink(missing_ok=True)

    def _send_for(self, row: int) -> None:
        if self._pool is not None and row not in self._coming:
            self._coming[row] = self._pool.submit(self._fetch, row)

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
        for coming in self._coming.values():
            coming.cancel()
        self._stack.close()
