"""Plan, decode ahead, hand over: frames on the model's device, ready while the model computes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count, islice
from typing import Protocol, Self, TypeVar

import torch

from pipelines.decoding.dali import DaliExecutor, dali_is_installed
from pipelines.decoding.jpeg import PortableExecutor
from pipelines.decoding.raw import RawExecutor
from pipelines.reads import Reads
from shards_spec import ShardSet
from shards_spec.errors import ConfigError, suggest

EXECUTORS = ("auto", "dali", "portable")
DEVICES = ("cpu", "gpu")


class Plan(Protocol):
    """Says which pixels are read: an `EpisodePlan` or a `ClipPlan`."""

    @property
    def reads(self) -> tuple[Reads, ...]:
        """Windows of stored frames."""


Made = TypeVar("Made")
Finished = TypeVar("Finished")
AnyPlan = TypeVar("AnyPlan", bound=Plan)
PlanOf_co = TypeVar("PlanOf_co", bound=Plan, covariant=True)


class Stream(Protocol[PlanOf_co]):
    """Plans steps by their numbers: episodes, or batches of clips."""

    def plan(self, n: int) -> PlanOf_co:
        """Plan step n: a pure function of n."""


class Executor(Protocol):
    """Decodes windows of stored frames; `decode` may be called from several threads."""

    def decode(self, reads: Reads) -> torch.Tensor:
        """Return uint8 [R, h, w, 3], of flow [R, 2h, w, 1].

        ShardError, naming the frame, when one cannot be decoded.
        """

    def close(self) -> None:
        """Give back threads and memory."""


class Loader:
    """Plans and decodes up to `prefetch` steps ahead in the background.

    Close it, and so its executor, when done.

    A step is an episode or a batch of clips, whichever a stream plans. The loader has no state but
    its clock: to resume, begin at the next step; rank r of k takes the episodes `frames(stream, r,
    stop, step=k)`. An error of the background reaches the consumer as it is.

    Attributes:
        executor: What decodes the frames.
        device: Where they are wanted.
        total_wait: Seconds that the consumer has waited, of all steps.

    Raises:
        ConfigError: prefetch is under 1.
    """

    def __init__(self, executor: Executor, *, device: torch.device | str, prefetch: int = 2) -> None:
        if prefetch < 1:
            raise ConfigError(f"prefetch is {prefetch}: give at least 1 episode")
        self.executor, self.device, self.total_wait = executor, torch.device(device), 0.0
        self._prefetch = prefetch
        self._pool = ThreadPoolExecutor(
            min(prefetch, 2),  # one reads payloads while the other's frames are decoded
            thread_name_prefix="fsar-episodes",
            initializer=_use_device,
            initargs=(_with_index(self.device),),
        )

    def frames(
        self, stream: Stream[AnyPlan], start: int = 0, stop: int | None = None, *, step: int = 1
    ) -> Iterator[tuple[AnyPlan, list[torch.Tensor], float]]:
        """Yield the plans of steps, their pixels on the device, and the seconds waited for each.

        The steps are start, start + step, ... below stop, or without end where stop is None. The
        pixels are uint8 [R, h, w, 3] for each of a plan's reads.
        """
        return self.steps(stream, self.decode, lambda _, frames: self.to_device(frames), start, stop, step=step)

    def steps(
        self,
        stream: Stream[AnyPlan],
        prepare: Callable[[AnyPlan], Made],
        finish: Callable[[AnyPlan, Made], Finished],
        start: int = 0,
        stop: int | None = None,
        *,
        step: int = 1,
        block: int = 1,
    ) -> Iterator[tuple[AnyPlan, Finished, float]]:
        """Yield plans in order, what becomes of each, and the seconds waited for it.

        Args:
            stream: Plans the steps.
            prepare: Called in the background, up to `prefetch` steps ahead.
            finish: Called by the consumer's thread, with the plan and what was prepared.
            start: Number of the first step.
            stop: The end of the numbers; None: there is none.
            step: Distance of the numbers.
            block: Steps that follow one another from each of these numbers, itself included.
        """
        firsts = count(start, step) if stop is None else range(start, stop, step)
        numbers = (n for first in firsts for n in range(first, first + block))

        def work(n: int) -> tuple[AnyPlan, Made]:
            plan = stream.plan(n)
            return plan, prepare(plan)

        pending = deque(self._pool.submit(work, n) for n in islice(numbers, self._prefetch))
        try:
            while pending:
                # Before the wait, so that no thread stands idle in it. No variable here keeps what
                # is yielded: its memory can be used again while the next is waited for.
                pending.extend(self._pool.submit(work, n) for n in islice(numbers, 1))
                yield self._first(pending, finish)
        finally:
            for task in pending:
                task.cancel()

    def _first(
        self, pending: deque[Future[tuple[AnyPlan, Made]]], finish: Callable[[AnyPlan, Made], Finished]
    ) -> tuple[AnyPlan, Finished, float]:
        began = time.perf_counter()
        plan, made = pending.popleft().result()
        wait = time.perf_counter() - began
        self.total_wait += wait
        return plan, finish(plan, made), wait

    def decode(self, plan: Plan) -> list[torch.Tensor]:
        """Decode a plan's pixels; they stay where the executor leaves them."""
        return [self.executor.decode(reads) for reads in plan.reads]

    def to_device(self, frames: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Move decoded pixels to the device; to be called by the consumer."""
        return [self._to_device(each) for each in frames]

    def _to_device(self, frames: torch.Tensor) -> torch.Tensor:
        if frames.is_cuda:  # decoded there, by a background thread on its own current stream
            frames.record_stream(torch.cuda.current_stream(frames.device))
        return frames.to(self.device, non_blocking=True)

    def close(self) -> None:
        """Drop what is being prepared, end the background threads and close the executor."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self.executor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _with_index(device: torch.device) -> torch.device:
    """Name the current GPU where only "cuda" was said."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _use_device(device: torch.device) -> None:
    """Make a GPU the current one of this thread: every thread begins with the first."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def executor_for(
    shards: ShardSet, device: torch.device, *, name: str = "auto", threads: int = 0, series: Sequence[str] = ("rgb",)
) -> Executor:
    """Make the executor that feeds a device.

    For a GPU, DALI decodes on it, and other executors put frames where it copies them fast.

    Args:
        shards: The opened shard set.
        device: Where frames are wanted.
        name: As of `create_executor`.
        threads: Decoding threads; 0: one a core.
        series: Names of the series that are read; the motion of a raw set is JPEG.

    Raises:
        ConfigError: as of `create_executor`.
    """
    on_gpu = device.type == "cuda"
    decoding = "gpu" if on_gpu and _takes_dali(name) else "cpu"
    made: dict[str, Executor] = {}
    for each in series:
        codec = shards.series(each).codec
        made[codec] = made.get(codec) or create_executor(
            name, shards, threads=threads or None, device=decoding, pin_memory=on_gpu, codec=codec
        )
    (first, *others) = made.values()
    return ByCodec(shards, made) if others else first


def executor_of(executor: Executor, series: str) -> Executor:
    """Return the one of an executor's parts that decodes a series; itself if it has no parts."""
    return executor.of(series) if isinstance(executor, ByCodec) else executor


def create_executor(
    name: str,
    shards: ShardSet,
    *,
    threads: int | None = None,
    device: str = "cpu",
    pin_memory: bool = False,
    codec: str | None = None,
) -> Executor:
    """Make the executor "dali", "portable" or "auto", which is DALI where it is installed.

    Raw frames have one executor, whatever name and device are asked for: nothing is to be decoded
    of them.

    Args:
        name: Of the executor.
        shards: The opened shard set.
        threads: Decoding threads; None: one a core.
        device: Where JPEG is decoded: "cpu", or "gpu" (DALI only), whose hardware decoder differs
            by a few levels.
        pin_memory: Put frames where a GPU copies them fast.
        codec: Codec of what is read; None: that of the frames.

    Raises:
        ConfigError: there is no such name or device, or DALI is asked for and not installed.
    """
    if name not in EXECUTORS:
        raise ConfigError(f'there is no executor "{name}": {suggest(name, EXECUTORS)}')
    if device not in DEVICES:
        raise ConfigError(f'there is no decoding device "{device}": {suggest(device, DEVICES)}')
    if (codec or shards.series("rgb").codec) == "raw":
        return RawExecutor(shards, threads=threads, pin_memory=pin_memory)
    if _takes_dali(name):
        return DaliExecutor(shards, threads=threads, device=device, pin_memory=pin_memory)
    if device == "gpu":
        raise ConfigError('decoding on the gpu needs DALI: pip install "fsar[dali]", or decode on the cpu')
    return PortableExecutor(shards, threads=threads, pin_memory=pin_memory)


def _takes_dali(name: str) -> bool:
    return name == "dali" or (name == "auto" and dali_is_installed())


class ByCodec:
    """Hands each read to the executor of its series' codec."""

    def __init__(self, shards: ShardSet, executors: Mapping[str, Executor]) -> None:
        self._shards, self._executors = shards, executors

    def decode(self, reads: Reads) -> torch.Tensor:
        """Return uint8 [R, h, w, 3], of flow [R, 2h, w, 1]."""
        return self.of(reads.modality).decode(reads)

    def of(self, series: str) -> Executor:
        """Return the executor of a series."""
        return self._executors[self._shards.series(series).codec]

    def close(self) -> None:
        """Give back what all of them hold."""
        for executor in self._executors.values():
            executor.close()
