"""Measure what nobody can beat: decoding or copying from memory, and writing the float32 output."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure.timing import Contestant, time_in_turn
from pipelines.augment.on_cpu import ClipBuffers
from pipelines.episodes.stream import EpisodePlan
from pipelines.reads import Reads
from shards_spec import ShardSet

Pixels = npt.NDArray[np.uint8]

TOGETHER = 8  # windows copied by one call
COLOURS = {1: "GRAY", 3: "RGB"}  # channels -> what simplejpeg decodes to


def payloads_of(episode: Sequence[Reads], shards: ShardSet) -> list[bytes]:
    """The encoded frames or fields of an episode, in the order of its reads."""
    payloads: list[bytes] = []
    for reads in episode:
        for row, frame in zip(reads.rows.tolist(), reads.frames.tolist(), strict=True):
            payloads += shards.series(reads.modality).read(row, [frame])
    return payloads


class PortableBound:
    """simplejpeg on `threads` threads: whole pictures, exact, into one buffer a thread, no crop, nothing kept."""

    def __init__(self, episodes: Sequence[Sequence[Reads]], shards: ShardSet, *, threads: int) -> None:
        self._episodes = [payloads_of(reads, shards) for reads in episodes]
        self._colours = COLOURS[episodes[0][0].channels]
        self._bytes = int(shards.series("rgb").sizes.prod(axis=1).max()) * 3
        self._pool = ThreadPoolExecutor(threads)
        self._local = threading.local()
        self._threads = threads

    def run(self, count: int) -> None:
        """Decode `count` episodes, going round in those held; no thread waits for another between episodes."""
        # every thread takes each k-th frame of all: no queue between them
        payloads = [payload for number in range(count) for payload in self._episodes[number % len(self._episodes)]]
        list(self._pool.map(self._decode, [payloads[start :: self._threads] for start in range(self._threads)]))

    def _decode(self, payloads: Sequence[bytes]) -> None:
        scratch = getattr(self._local, "scratch", None)
        if scratch is None:
            scratch = self._local.scratch = np.empty(self._bytes, dtype=np.uint8)
        for payload in payloads:
            simplejpeg.decode_jpeg(payload, self._colours, fastdct=False, fastupsample=False, buffer=scratch)

    def close(self) -> None:
        """End its threads."""
        self._pool.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class DaliBound:
    """A bare DALI pipeline: `image_slice` with the episodes' windows on `threads` threads, two episodes ahead."""

    def __init__(
        self, episodes: Sequence[Sequence[Reads]], shards: ShardSet, *, threads: int, device: torch.device
    ) -> None:
        self._batches = [_batch(reads, shards) for reads in episodes]
        self._number = self._left = 0
        dali, fn = importlib.import_module("nvidia.dali"), importlib.import_module("nvidia.dali.fn")
        types = importlib.import_module("nvidia.dali.types")
        self._pipeline: Any = dali.Pipeline(
            batch_size=max(len(batch[0]) for batch in self._batches),
            num_threads=threads,
            device_id=torch.cuda.current_device() if device.type == "cuda" else None,
            prefetch_queue_depth=2,
            exec_dynamic=True,
        )
        with self._pipeline:
            encoded, corner, shape = fn.external_source(
                source=self._next,
                num_outputs=3,
                dtype=[types.UINT8, types.INT32, types.INT32],
                ndim=[1, 1, 1],
                no_copy=True,
            )
            decoder = "mixed" if device.type == "cuda" else "cpu"
            colours = types.GRAY if episodes[0][0].channels == 1 else types.RGB
            how: dict[str, Any] = {"axis_names": "HW", "device": decoder, "output_type": colours}
            windows = fn.decoders.image_slice(encoded, start=corner, shape=shape, **how)
            self._pipeline.set_outputs(windows)
        self._pipeline.build()

    def run(self, count: int) -> None:
        """Decode `count` episodes, going round in those held."""
        self._left = count
        while True:
            try:
                self._pipeline.run()
            except StopIteration:  # all are delivered: nothing is decoded ahead for the next run
                self._pipeline.reset()
                return

    def _next(self) -> tuple[list[Any], Any, Any]:
        if not self._left:
            raise StopIteration
        self._left -= 1
        self._number = (self._number + 1) % len(self._batches)
        return self._batches[self._number]


def _batch(episode: Sequence[Reads], shards: ShardSet) -> tuple[list[Any], Any, Any]:
    """Encoded pictures, corners [R, 2] and shapes [R, 2] of an episode."""
    corners = np.concatenate([np.stack([reads.tops, reads.lefts], axis=1) for reads in episode])
    shapes = np.concatenate([np.tile(np.array(reads.size), (len(reads), 1)) for reads in episode])
    encoded = [np.frombuffer(payload, dtype=np.uint8) for payload in payloads_of(episode, shards)]
    return encoded, corners.astype(np.int32), shapes.astype(np.int32)


class CopyBound:
    """Copies windows of raw frames from memory of this process to memory that is warm, on `threads` threads."""

    def __init__(self, plans: Sequence[EpisodePlan], shards: ShardSet, *, threads: int) -> None:
        self._held: dict[tuple[int, int], Pixels] = {}
        self._episodes = [[self._windows(reads, shards) for reads in plan.reads] for plan in plans]
        most = max(sum(window.size for windows in each for window in windows) for each in self._episodes)
        self._out = [np.zeros(most, np.uint8) for _ in range(threads)]
        self._pool = ThreadPoolExecutor(threads)

    def _windows(self, reads: Reads, shards: ShardSet) -> list[Pixels]:
        """Views [h, w, 3] of copies of the stored frames, each frame held once."""
        height, width = reads.size
        columns = (column.tolist() for column in (reads.rows, reads.frames, reads.tops, reads.lefts))
        windows = []
        for row, frame, top, left in zip(*columns, strict=True):
            if (row, frame) not in self._held:
                self._held[row, frame] = shards.series(reads.modality).pixels(row)[frame].copy()
            windows.append(self._held[row, frame][top : top + height, left : left + width])
        return windows

    def run(self, count: int) -> None:
        """Copy `count` episodes, going round in those held; each thread takes whole ones."""
        list(self._pool.map(lambda thread: self._copy(thread, count), range(len(self._out))))

    def _copy(self, thread: int, count: int) -> None:
        for number in range(thread, count, len(self._out)):
            done = 0
            for windows in self._episodes[number % len(self._episodes)]:
                height, width, _ = windows[0].shape
                size = height * width * 3
                for start in range(0, len(windows), TOGETHER):  # faster than frame by frame with numpy
                    part = windows[start : start + TOGETHER]
                    out = self._out[thread][done : done + len(part) * size]
                    cv2.vconcat(part, out.reshape(len(part) * height, width, 3))
                    done += len(part) * size

    def close(self) -> None:
        """End its threads."""
        self._pool.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class WriteBound:
    """Fills two float32 tensors of an episode's size in turn: memory that is warm, from where ours is taken.

    In turn, since a consumer holds an episode while the next is made.
    """

    def __init__(self, shape: tuple[int, ...], *, device: torch.device) -> None:
        buffers = ClipBuffers()
        on_cpu = device.type == "cpu"
        self._out = [buffers.take(*shape) if on_cpu else torch.empty(shape, device=device) for _ in range(2)]

    def run(self, count: int) -> None:
        """Write `count` episodes."""
        for number in range(count):
            self._out[number % 2].fill_(0.5)
        synchronise(self._out[0].device)


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def frames_of(reads: Sequence[Reads]) -> int:
    """Number of frames that an episode reads."""
    return sum(len(each) for each in reads)


def gflop(function: Callable[[], object]) -> float:
    """Floating-point operations of its matrix products and convolutions, in 1e9."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 1e9


def matmul_rate(
    device: torch.device, *, size: int = 2048, times: int = 10, dtype: torch.dtype = torch.float32
) -> float:
    """GFLOP a second of this machine: the best of several products of square matrices."""
    a, b = torch.randn(2, size, size, device=device).to(dtype)

    def multiply(count: int) -> None:
        for _ in range(count):
            a @ b
        synchronise(device)

    multiply(1)
    timings = time_in_turn([Contestant("product", multiply)], rounds=times, counts=[1])
    return 2 * size**3 / min(timings["product"].wall) / 1e9
