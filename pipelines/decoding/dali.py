"""Decode with NVIDIA DALI: with its threads on a CPU, or the hardware decoder of a GPU."""

from __future__ import annotations

import importlib
import importlib.util
import os
import threading
from typing import Any

import numpy as np
import torch

from pipelines.decoding.jpeg import clips_of, decode_jpeg, frame_name, read_payloads
from pipelines.reads import Reads
from shards_spec import ShardSet
from shards_spec.errors import ConfigError, ShardError


def dali_is_installed() -> bool:
    """Tell whether DALI can be imported, without importing it."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # not even the package `nvidia` is there
        return False


class DaliExecutor:
    """Decodes only the windows asked for, on `threads` threads or on torch's current GPU.

    One pipeline takes every window size, since the shape is an input of it; colours and grey have
    one each. It is built at the first call, and again when a call brings more frames than any
    before. Calls may come from several threads: one reads payloads while another's are decoded. On
    a CPU the pixels equal the portable executor's.

    Raises:
        ConfigError: DALI is not installed, or there is no GPU to decode on.
    """

    def __init__(
        self, shards: ShardSet, *, threads: int | None = None, device: str = "cpu", pin_memory: bool = False
    ) -> None:
        if not dali_is_installed():
            raise ConfigError(
                'NVIDIA DALI is not installed: pip install "fsar[dali]" (CUDA 12: "fsar[dali-cuda12]"), '
                "or use the portable executor"
            )
        if device == "gpu" and not torch.cuda.is_available():
            raise ConfigError("decoding on the gpu needs a CUDA device and torch sees none: decode on the cpu")
        self._shards, self._pin_memory = shards, pin_memory
        # asked for here, since each thread has its own current device; None: no GPU is looked for
        self._device_id = torch.cuda.current_device() if device == "gpu" else None
        self._threads = threads or os.cpu_count() or 1
        # channels -> most frames, pipeline; DALI has no type hints that mypy could follow
        self._pipelines: dict[int, tuple[int, Any]] = {}
        self._lock = threading.Lock()

    def decode(self, reads: Reads) -> torch.Tensor:
        """Return uint8 [R, h, w, 3], of flow [R, 2h, w, 1].

        ShardError, naming the frame, when one cannot be decoded.
        """
        self._shards.series(reads.modality).fetch(reads.rows)
        payloads: list[bytes] = []
        for start, stop in clips_of(reads):
            payloads += read_payloads(self._shards, reads, start, stop)
        corners = np.stack([reads.tops, reads.lefts], axis=1).astype(np.int32)  # [R, 2]
        shapes = np.tile(np.array(reads.size, dtype=np.int32), (len(reads), 1))  # [R, 2]
        encoded = [np.frombuffer(payload, dtype=np.uint8) for payload in payloads]
        with self._lock:
            pipeline = self._with_room(len(encoded), reads.channels)
            try:
                frames = self._run(pipeline, encoded, corners, shapes)
            except RuntimeError as error:
                del self._pipelines[reads.channels]  # what is left in its queues belongs to nobody
                raise self._damage(reads, payloads, error) from error
        pin = self._pin_memory and frames.device.type == "cpu"
        return frames.pin_memory() if pin else frames

    def _run(self, pipeline: Any, encoded: list[Any], corners: Any, shapes: Any) -> torch.Tensor:  # noqa: ANN401
        (output,) = pipeline.run(encoded=encoded, corner=corners, shape=shapes)
        frames = torch.utils.dlpack.from_dlpack(output.as_tensor())  # [R, h, w, 3]
        if frames.device.type == "cpu":
            return frames  # no copy: the dynamic executor leaves an output alone while a tensor holds it
        frames = frames.clone()  # into torch's own memory, which knows torch's streams
        torch.cuda.current_stream(frames.device).synchronize()
        return frames

    def _with_room(self, count: int, channels: int) -> Any:  # noqa: ANN401
        """Return a pipeline for that many frames or more."""
        capacity, pipeline = self._pipelines.get(channels, (0, None))
        if count > capacity:
            pipeline = self._build(count, channels)
            self._pipelines[channels] = count, pipeline
        return pipeline

    def _build(self, capacity: int, channels: int) -> Any:  # noqa: ANN401
        dali = importlib.import_module("nvidia.dali")
        fn = importlib.import_module("nvidia.dali.fn")
        types = importlib.import_module("nvidia.dali.types")
        pipeline = dali.Pipeline(
            batch_size=capacity,  # the most; shorter batches are accepted
            num_threads=self._threads,
            device_id=self._device_id,
            prefetch_queue_depth=1,  # a call at a time; the loader is what works ahead
            exec_dynamic=True,
        )
        with pipeline:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            corner = fn.external_source(name="corner", dtype=types.INT32, ndim=1)
            shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)
            # named start and shape are in pixels; positional ones would be read as fractions
            windows = fn.decoders.image_slice(
                encoded,
                start=corner,
                shape=shape,
                axis_names="HW",
                output_type=types.RGB if channels == 3 else types.GRAY,
                device="cpu" if self._device_id is None else "mixed",
            )
            pipeline.set_outputs(windows)
        pipeline.build()
        return pipeline

    def _damage(self, reads: Reads, payloads: list[bytes], error: RuntimeError) -> ShardError:
        """Find the frame that cannot be decoded, which DALI's message does not name."""
        stored = self._shards.series(reads.modality).sizes[reads.rows]  # [R, 2]
        scratch = np.empty(int(stored.prod(axis=1).max()) * 3, dtype=np.uint8)
        for i, payload in enumerate(payloads):
            try:
                decode_jpeg(payload, scratch, where=frame_name(self._shards, reads, i))
            except ShardError as damage:
                return damage
        first = str(error).strip().splitlines()[0]
        return ShardError(f"DALI cannot decode frames of {self._shards.path} ({first}): run fsar-shards verify")

    def close(self) -> None:
        """End DALI's threads and give back its memory."""
        with self._lock:
            self._pipelines.clear()
