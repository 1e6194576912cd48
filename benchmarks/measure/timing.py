"""Time several ways of doing the same work in turn, so that a change of the machine meets all of them."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path


def _nothing() -> None:
    """Prepare nothing before a run."""


@dataclass(frozen=True)
class Contestant:
    """One way of doing some work.

    Attributes:
        name: What the table calls it; unique.
        run: Does `count` pieces of work: nothing of them is prepared before, and none is unfinished when it returns.
        before: Called before each run, outside the clock.
    """

    name: str
    run: Callable[[int], None]
    before: Callable[[], None] = _nothing


@dataclass
class Timing:
    """Record of a contestant: pieces of work a run, wall and CPU seconds of each run."""

    count: int
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        """Pieces of work a second, one for each run."""
        return [self.count / seconds for seconds in self.wall]

    @property
    def rate(self) -> float:
        """Median pieces of work a second."""
        return statistics.median(self.rates)

    @property
    def core_seconds(self) -> float:
        """Median CPU seconds a piece of work, all processes together."""
        return statistics.median(self.cpu) / self.count


def time_in_turn(contestants: Sequence[Contestant], *, rounds: int, counts: Sequence[int]) -> dict[str, Timing]:
    """Time every contestant once in each round; odd rounds go backwards, so that no one always follows the same."""
    timings = {each.name: Timing(count) for each, count in zip(contestants, counts, strict=True)}
    for number in range(rounds):
        for each in contestants[:: -1 if number % 2 else 1]:
            timing = timings[each.name]
            each.before()
            cpu, wall = cpu_seconds(), time.perf_counter()
            each.run(timing.count)
            timing.wall.append(time.perf_counter() - wall)
            timing.cpu.append(cpu_seconds() - cpu)
    return timings


def warm_up(contestants: Iterable[Contestant], *, seconds: float, workers: int, least: int = 3) -> list[int]:
    """Run each twice, and say how many pieces of work fill about `seconds`.

    It is a multiple of `workers`, and at least `least` for each of them: else one that happens to draw short
    videos would stand idle for much of the time.
    """
    counts = []
    for each in contestants:
        each.before()
        each.run(workers)  # starts its processes, builds its pipeline
        each.before()
        began = time.perf_counter()
        each.run(workers)
        taken = time.perf_counter() - began
        counts.append(workers * max(least, round(seconds / taken)))
    return counts


def cpu_seconds() -> float:
    """CPU time of this process and of all below it, those that ended included (in ticks of 10 ms)."""
    if not Path("/proc/self/stat").exists():
        return time.process_time()
    return sum(_processes().values()) / os.sysconf("SC_CLK_TCK")


@contextmanager
def on_cores(count: int) -> Iterator[None]:
    """Let this process and all below it, those that it starts later included, run on `count` cores only."""
    allowed = os.sched_getaffinity(0)
    _allow(set(sorted(allowed)[:count]))
    try:
        yield
    finally:
        _allow(allowed)


def _allow(cores: set[int]) -> None:
    for pid in _processes():
        for thread in Path(f"/proc/{pid}/task").glob("*"):
            with suppress(OSError):  # it ended just now
                os.sched_setaffinity(int(thread.name), cores)


def _processes() -> dict[int, int]:
    """This process and all below it: number -> CPU ticks, those of ended children included."""
    parents: dict[int, int] = {}
    spent: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()  # a name may hold blanks and brackets
        except OSError:  # it ended just now
            continue
        parents[int(path.parent.name)] = int(fields[1])
        spent[int(path.parent.name)] = sum(map(int, fields[11:15]))  # user and system, own and of ended children
    ours = os.getpid()
    return {pid: ticks for pid, ticks in spent.items() if _descends(pid, ours, parents)}


def _descends(pid: int, ancestor: int, parents: dict[int, int]) -> bool:
    while pid in parents and pid != ancestor:
        pid = parents[pid]
    return pid == ancestor


def read_whole(paths: Iterable[Path]) -> int:
    """Read files once, so that all contestants find them in the page cache; returns their bytes."""
    return sum(len(path.read_bytes()) for path in paths)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [list(head), ["---"] * len(head), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
