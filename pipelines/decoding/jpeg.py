"""Decode with simplejpeg and threads: runs everywhere, and other executors are checked by it."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch

from pipelines.reads import Reads
from shards_spec import ShardSet
from shards_spec.errors import ShardError

Pixels = npt.NDArray[np.uint8]


def clips_of(reads: Reads) -> list[tuple[int, int]]:
    """Return the bounds [start, stop) of the runs of reads that belong to one video."""
    edges = [0, *(np.flatnonzero(np.diff(reads.rows)) + 1).tolist(), len(reads)]
    return list(pairwise(edges))


def read_payloads(shards: ShardSet, reads: Reads, start: int, stop: int) -> list[bytes]:
    """Read the encoded frames of reads [start, stop), which all belong to one video."""
    series = shards.series(reads.modality)
    return series.read(int(reads.rows[start]), reads.frames[start:stop])


def decode_jpeg(payload: bytes, scratch: Pixels, *, where: str, channels: int = 3) -> Pixels:
    """Decode one frame [H, W, channels] into scratch, exactly; 3 channels are RGB, 1 is grey.

    Raises:
        ShardError: it is damaged; `where` names it.
    """
    colours = "RGB" if channels == 3 else "GRAY"
    try:
        # the fast modes are off by up to 53 levels at colour edges
        return np.asarray(simplejpeg.decode_jpeg(payload, colours, fastdct=False, fastupsample=False, buffer=scratch))
    except ValueError as error:
        raise ShardError(f"{where} is not a whole JPEG ({error}): run fsar-shards verify") from error


def frame_name(shards: ShardSet, reads: Reads, i: int) -> str:
    """Name the frame of read i, for a message."""
    row, frame = int(reads.rows[i]), int(reads.frames[i])
    return f'stored {reads.modality} frame {frame} of video "{shards.name(row)}" in {shards.path}'


class PortableExecutor:
    """Decodes each clip as a task of `threads` threads (default: one a core).

    Pixels are those of libjpeg-turbo, bit for bit.
    """

    def __init__(self, shards: ShardSet, *, threads: int | None = None, pin_memory: bool = False) -> None:
        self._shards, self._pin_memory = shards, pin_memory
        self._pool = ThreadPoolExecutor(threads or os.cpu_count() or 1, thread_name_prefix="fsar-decode")
        self._local = threading.local()

    def decode(self, reads: Reads) -> torch.Tensor:
        """Return uint8 [R, h, w, 3], of flow [R, 2h, w, 1].

        ShardError, naming the frame, when one cannot be decoded.
        """
        frames = torch.empty(len(reads), *reads.size, reads.channels, dtype=torch.uint8, pin_memory=self._pin_memory)
        self._shards.series(reads.modality).fetch(reads.rows)
        out = frames.numpy()
        tasks = [self._pool.submit(self._decode_clip, reads, *bounds, out) for bounds in clips_of(reads)]
        try:
            for task in tasks:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
        return frames

    def _decode_clip(self, reads: Reads, start: int, stop: int, out: Pixels) -> None:
        stored = self._shards.series(reads.modality).sizes[reads.rows[start]].tolist()
        height, width = reads.size
        payloads = read_payloads(self._shards, reads, start, stop)
        for i, payload in enumerate(payloads, start):
            where = frame_name(self._shards, reads, i)
            scratch = self._scratch(stored[0] * stored[1] * 3)
            frame = decode_jpeg(payload, scratch, where=where, channels=reads.channels)
            top, left = int(reads.tops[i]), int(reads.lefts[i])
            out[i] = frame[top : top + height, left : left + width]

    def _scratch(self, count: int) -> Pixels:
        """Return memory of one frame, kept for each thread: fresh memory costs more than a copy."""
        scratch: Pixels | None = getattr(self._local, "scratch", None)
        if scratch is None or len(scratch) < count:
            scratch = self._local.scratch = np.empty(count, dtype=np.uint8)
        return scratch

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)
