"""Decoded frames of episodes or clips on the model's device, prepared while the model computes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, islice, starmap
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

import torch

from pipelines.decoding.choose import Executor
from pipelines.reads import Reads
from shards_spec.errors import ConfigError


class Plan(Protocol):
    """What says which pixels are read: an `EpisodePlan` or a `ClipPlan`."""

    @property
    def reads(self) -> tuple[Reads, ...]:
        """Windows of stored frames."""


Made = TypeVar("Made")
AnyPlan = TypeVar("AnyPlan", bound=Plan)
PlanOf_co = TypeVar("PlanOf_co", bound=Plan, covariant=True)


class Stream(Protocol[PlanOf_co]):
    """What plans episodes, or steps of clips, by their numbers."""

    def plan(self, n: int) -> PlanOf_co:
        """Plan number n: a pure function of n."""


@dataclass(frozen=True)
class Decoded(Generic[AnyPlan]):
    """The pixels of one plan, uint8 [R, h, w, 3] on the device for each of its reads.

    wait: seconds that the consumer waited for them.
    """

    plan: AnyPlan
    frames: list[torch.Tensor]
    wait: float


class Prefetcher(Generic[AnyPlan]):
    """Plans and decodes up to `prefetch` episodes ahead in the background; stateless but for its clock.

    Steps of clips are episodes here. Two background threads, so that one reads payloads while the other's frames are
    decoded. Resuming is `frames(n, ...)`; rank r of k takes `frames(r, stop, step=k)` of episodes. total_wait is the
    sum of the consumer's waits in seconds.
    Raises ConfigError when prefetch is under 1. An error of the background reaches the consumer as it is.
    """

    def __init__(
        self, stream: Stream[AnyPlan], executor: Executor, *, device: torch.device | str, prefetch: int = 2
    ) -> None:
        if prefetch < 1:
            raise ConfigError(f"prefetch is {prefetch}: give at least 1 episode")
        self._stream, self._executor = stream, executor
        self._device, self._prefetch = torch.device(device), prefetch
        self._pool = ThreadPoolExecutor(
            min(prefetch, 2),
            thread_name_prefix="fsar-episodes",
            initializer=_use_device,
            initargs=(_with_index(self._device),),
        )
        self.total_wait = 0.0

    def frames(self, start: int = 0, stop: int | None = None, *, step: int = 1) -> Iterator[Decoded[AnyPlan]]:
        """Episodes start, start + step, ... below stop (without end when None), in order."""
        return starmap(self._decoded, self.prepared(self.decode, start, stop, step=step))

    def _decoded(self, plan: AnyPlan, frames: list[torch.Tensor], wait: float) -> Decoded[AnyPlan]:
        return Decoded(plan, self.to_device(frames), wait)

    def prepared(
        self,
        work: Callable[[AnyPlan], Made],
        start: int = 0,
        stop: int | None = None,
        *,
        step: int = 1,
        block: int = 1,
    ) -> Iterator[tuple[AnyPlan, Made, float]]:
        """Yield the same episodes' plans, what `work` made of each in the background, and the seconds waited.

        Each of the episodes is followed by the next ones in number, a `block` of them together.
        """
        firsts = count(start, step) if stop is None else range(start, stop, step)
        numbers = (n for first in firsts for n in range(first, first + block))
        pending: deque[Future[tuple[AnyPlan, Made]]]
        pending = deque(self._pool.submit(self._prepare, n, work) for n in islice(numbers, self._prefetch))
        try:
            while pending:
                # Before the wait, so that no thread stands idle in it. No variable here keeps what is yielded: its
                # memory can be used again while the next is waited for.
                pending.extend(self._pool.submit(self._prepare, n, work) for n in islice(numbers, 1))
                yield self._first(pending)
        finally:
            for task in pending:
                task.cancel()

    def _first(self, pending: deque[Future[tuple[AnyPlan, Made]]]) -> tuple[AnyPlan, Made, float]:
        began = time.perf_counter()
        plan, made = pending.popleft().result()
        wait = time.perf_counter() - began
        self.total_wait += wait
        return plan, made, wait

    def _prepare(self, n: int, work: Callable[[AnyPlan], Made]) -> tuple[AnyPlan, Made]:
        plan = self._stream.plan(n)
        return plan, work(plan)

    def decode(self, plan: AnyPlan) -> list[torch.Tensor]:
        """The pixels of an episode where the executor leaves them."""
        return [self._executor.decode(reads) for reads in plan.reads]

    def to_device(self, frames: list[torch.Tensor]) -> list[torch.Tensor]:
        """The same on the device; to be called by the consumer."""
        return [self._to_device(each) for each in frames]

    def _to_device(self, frames: torch.Tensor) -> torch.Tensor:
        if frames.is_cuda:  # decoded there, by a background thread on its own current stream
            frames.record_stream(torch.cuda.current_stream(frames.device))
        return frames.to(self._device, non_blocking=True)

    def close(self) -> None:
        """Drop what is being prepared and end the background threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
