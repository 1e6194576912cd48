"""Copy windows of raw sets out of the shard files, which are mapped into memory.

Nothing is decoded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import cv2
import numpy as np
import numpy.typing as npt
import torch

from pipelines.augment.on_cpu import ClipBuffers
from pipelines.decoding.jpeg import frame_name
from pipelines.reads import Reads
from shards_spec import ShardSet
from shards_spec.errors import ShardError

Pixels = npt.NDArray[np.uint8]

LEAST_SHARE = 4 << 20  # bytes a thread: to hand over less costs more than to copy it


def _clips_of(reads: Reads, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Return the bounds of runs of reads of one video and one window, within [start, stop)."""
    same = np.stack([reads.rows, reads.tops, reads.lefts])[:, start:stop]  # [3, n]
    edges = np.flatnonzero((same[:, 1:] != same[:, :-1]).any(0)) + start + 1
    return pairwise([start, *edges.tolist(), stop])


class RawExecutor:
    """Copies windows of raw frames on `threads` threads (default: one a core).

    The calling threads are among them.
    """

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
        out = frames.numpy()
        shares = max(1, min(self._threads, out.nbytes // LEAST_SHARE))
        edges = [len(reads) * share // shares for share in range(shares + 1)]
        tasks = [self._pool.submit(self._copy, reads, *bounds, out) for bounds in pairwise(edges[1:])]
        try:
            self._copy(reads, 0, edges[1], out)
        finally:
            for task in tasks:  # all of them: none may write into memory that is given again
                task.exception()
        for task in tasks:
            task.result()
        return frames

    def windows(self, reads: Reads) -> list[Pixels]:
        """Return the R windows [h, w, 3] where they lie in the files, read-only.

        Raises:
            ShardError: as of `decode`.
        """
        self._check_windows(reads)
        self._shards.series(reads.modality).fetch(reads.rows)
        found = self._views(reads, 0, len(reads))
        for window in found:  # touched, so that what is not in memory is read here, not where it is waited for
            window.item(0), window.item(-1)
        return found

    def _copy(self, reads: Reads, start: int, stop: int, out: Pixels) -> None:
        # one call for all: no other thread has to wait for Python, and rows are copied faster than
        # numpy does
        cv2.vconcat(self._views(reads, start, stop), out[start:stop].reshape(-1, *out.shape[2:]))

    def _views(self, reads: Reads, start: int, stop: int) -> list[Pixels]:
        """Windows of reads [start, stop)."""
        series, (height, width) = self._shards.series(reads.modality), reads.size
        views: list[Pixels] = []
        for first, last in _clips_of(reads, start, stop):
            row, top, left = int(reads.rows[first]), int(reads.tops[first]), int(reads.lefts[first])
            frames, stored = reads.frames[first:last].tolist(), series.pixels(row)  # [n, H, W, 3]
            if min(frames) < 0 or max(frames) >= len(stored):
                wrong = next(i for i, frame in enumerate(frames) if not 0 <= frame < len(stored))
                name = frame_name(self._shards, reads, first + wrong)
                raise ShardError(f"{name}: it has {len(stored)} frames, not {frames[wrong]}")
            series.check_pixels(row, frames)
            window = stored[:, top : top + height, left : left + width]
            views += [window[frame] for frame in frames]
        return views

    def _check_windows(self, reads: Reads) -> None:
        """Refuse a window that leaves its frame: a slice would be cut short in silence."""
        room = self._shards.series(reads.modality).sizes[reads.rows] - np.array(reads.size)  # [R, 2]
        corners = np.stack([reads.tops, reads.lefts], axis=1)  # [R, 2]
        outside = np.flatnonzero(((corners < 0) | (corners > room)).any(1))
        if len(outside):
            where = frame_name(self._shards, reads, int(outside[0]))
            raise ShardError(f"{where} does not hold the window {reads.size} at {tuple(corners[outside[0]].tolist())}")

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)
