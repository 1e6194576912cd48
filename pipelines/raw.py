"""Raw sets: the windows are copied out of the shard files, which are mapped into memory; nothing is decoded."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch

from pipelines.buffers import ClipBuffers
from pipelines.portable import frame_name
from shards_spec.errors import ShardError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from pipelines.reads import Reads
    from shards_spec import ShardSet

    Pixels = npt.NDArray[np.uint8]

LEAST_SHARE = 4 << 20  # bytes: to hand over less costs more than to copy it


def _windows_of(reads: Reads) -> list[tuple[int, int]]:
    """Bounds [start, stop) of the runs of reads of one video and one window."""
    same = np.stack([reads.rows, reads.tops, reads.lefts])  # [3, R]
    edges = np.flatnonzero((same[:, 1:] != same[:, :-1]).any(0)) + 1
    return list(pairwise([0, *edges.tolist(), len(reads)]))


class RawExecutor:
    """Copies the windows of raw frames on `threads` threads (default: one a core), the calling ones among them."""

    def __init__(self, shards: ShardSet, *, threads: int | None = None, pin_memory: bool = False) -> None:
        self._shards, self._pin_memory = shards, pin_memory
        # half of them for a call: the loader prepares two episodes at a time
        self._threads = max(1, (threads or os.cpu_count() or 1) // 2)
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="fsar-raw")
        self._buffers = ClipBuffers(np.uint8)

    def decode(self, reads: Reads) -> torch.Tensor:
        """Return uint8 [R, h, w, 3]; ShardError, naming the frame, when one is not there."""
        self._check_windows(reads)
        self._shards.series(reads.modality).fetch(reads.rows)
        shape = (len(reads), *reads.size, 3)
        if self._pin_memory:  # torch keeps pinned memory itself
            frames = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        else:
            frames = self._buffers.take(*shape)
        out, clips = frames.numpy(), _windows_of(reads)
        shares = max(1, min(self._threads, out.nbytes // LEAST_SHARE))
        tasks = [self._pool.submit(self._copy, reads, clips[share::shares], out) for share in range(1, shares)]
        try:
            self._copy(reads, clips[::shares], out)
        finally:
            for task in tasks:  # all of them: none may write into memory that is given again
                task.exception()
        for task in tasks:
            task.result()
        return frames

    def windows(self, reads: Reads) -> list[Pixels]:
        """The R windows [h, w, 3] where they lie in the files, read-only; ShardError as `decode`."""
        self._check_windows(reads)
        self._shards.series(reads.modality).fetch(reads.rows)
        found = [window for clip in _windows_of(reads) for window in self._views(reads, *clip)]
        for window in found:  # touched, so that what is not in memory is read here, not where it is waited for
            window.item(0), window.item(-1)
        return found

    def _copy(self, reads: Reads, clips: list[tuple[int, int]], out: Pixels) -> None:
        for start, stop in clips:
            # one call a clip: other threads wait for Python less often, and rows are copied faster than numpy does
            cv2.vconcat(list(self._views(reads, start, stop)), out[start:stop].reshape(-1, *out.shape[2:]))

    def _views(self, reads: Reads, start: int, stop: int) -> Iterator[Pixels]:
        """Windows of reads [start, stop), which are all of one place in one video."""
        top, left, (height, width) = int(reads.tops[start]), int(reads.lefts[start]), reads.size
        series, row = self._shards.series(reads.modality), int(reads.rows[start])
        video = series.pixels(row)
        stored = video[:, top : top + height, left : left + width]  # [n, h, w, 3]
        for i, frame in enumerate(reads.frames[start:stop].tolist(), start):
            if not 0 <= frame < len(stored):
                raise ShardError(f"{frame_name(self._shards, reads, i)}: it has {len(stored)} frames, not {frame}")
            series.check_pixels(row, [frame])
            yield stored[frame]

    def _check_windows(self, reads: Reads) -> None:
        """Refuse a window that is not all inside its frame: a slice would be cut short in silence."""
        room = self._shards.series(reads.modality).sizes[reads.rows] - np.array(reads.size)  # [R, 2]
        corners = np.stack([reads.tops, reads.lefts], axis=1)  # [R, 2]
        outside = np.flatnonzero(((corners < 0) | (corners > room)).any(1))
        if len(outside):
            where = frame_name(self._shards, reads, int(outside[0]))
            raise ShardError(f"{where} does not hold the window {reads.size} at {tuple(corners[outside[0]].tolist())}")

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)
