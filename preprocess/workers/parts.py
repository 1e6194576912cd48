"""Divide a run into parts for array jobs: part I of N makes every N-th shard, --join ends it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shards_spec.errors import ConfigError, FsarError, ShardError
from shards_spec.files import OURS, TEMPORARY, NoLocksError, disk_errors, lock

FAILURES = "failures.jsonl"
PART = re.compile(r"part-(?P<index>\d{4,})-of-(?P<count>\d{4,})\.jsonl")
NUMBERED = re.compile(r"[a-z0-9]+-(?P<shard>\d{6})\.")


@dataclass(frozen=True)
class Part:
    """A part of a run: the shards index - 1, index - 1 + count, index - 1 + 2 * count, ...

    Attributes:
        index: From 1 to `count`; 0 for the whole run (`WHOLE`).
        count: Number of parts.
    """

    index: int
    count: int

    @staticmethod
    def parse(text: str) -> Part:
        """Read the text I/N.

        Raises:
            ConfigError: it is of another form, or I is not from 1 to N.
        """
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip(), re.ASCII)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise ConfigError(f'--part "{text}": expected I/N with I from 1 to N, such as 3/100')
        return Part(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        """Return the text for people, such as "3 of 100"."""
        return f"{self.index} of {self.count}"

    def numbers(self, total: int) -> range:
        """Return the numbers of the shards that it makes, of `total` shards."""
        return range(max(0, self.index - 1), total, self.count)

    def failures(self, out: Path) -> Path:
        """Return the file of its videos that failed; a part that has begun has this file."""
        return out / f"part-{self.index:04d}-of-{self.count:04d}.jsonl" if self.index else out / FAILURES

    def lock(self, out: Path) -> Path:
        """Return the lock file that a run of this part holds."""
        return self.failures(out).with_suffix(TEMPORARY)

    def check_alone(self, out: Path) -> None:
        """Refuse a folder that is made in another number of parts: two parts would write one shard.

        Raises:
            ConfigError: the folder has parts of another number, or has parts and this is the whole.
        """
        others = {part.count for part in begun(out)} - {self.count if self.index else 0}
        if others and not self.index:
            raise ConfigError(
                f"{out} is being made in {others.pop()} parts: run those that are missing with --part, then add --join"
            )
        if others:
            raise ConfigError(f"{out} is being made in {others.pop()} parts, not in {self.count}: keep to their number")

    def sweep(self, out: Path) -> None:
        """Remove what an interrupted run of this part left unfinished, and nothing of others."""
        with disk_errors(out):
            for path in out.glob(f"*{TEMPORARY}"):
                match = NUMBERED.match(path.name) if OURS.fullmatch(path.name) else None
                if match and int(match["shard"]) % self.count == self.index - 1:
                    path.unlink(missing_ok=True)


WHOLE = Part(0, 1)


def begun(out: Path) -> list[Part]:
    """Return the parts of a folder that were begun, in order."""
    matches = (PART.fullmatch(path.name) for path in out.glob("part-*.jsonl"))
    return sorted((Part(int(m["index"]), int(m["count"])) for m in matches if m), key=lambda part: part.index)


@contextmanager
def holding(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock file, on a network file system too.

    The file stays afterwards. If it were removed, a process that waited for it would hold a file
    without a name. A third process could then hold a new file of that name at the same time.

    Raises:
        FsarError: another process holds it (unless we wait), or the file system has no locks.
    """
    with disk_errors(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(handle, path, wait=wait)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, path: Path, *, wait: bool) -> None:
    try:
        lock(handle, wait=wait)
    except BlockingIOError:
        raise FsarError(f"{path.stem} of {path.parent} is being made by another process; wait for it") from None
    except NoLocksError as error:
        raise FsarError(
            f"the file system of {path.parent} locks no files ({error}), so that parts cannot be made side "
            "by side; choose another --out folder, or make all in one run without --part"
        ) from error


def check_whole(out: Path, lacking: list[int]) -> None:
    """Check that the parts of a folder are all whole.

    Args:
        out: The folder.
        lacking: Numbers of the shards that are still to be made.

    Raises:
        ShardError: no part was begun, or some are not whole; the message names them.
    """
    parts = begun(out)
    if not parts:
        raise ShardError(f"{out} has no parts to join: make them with --part I/N, for I from 1 to N")
    count = parts[0].count
    missing = set(range(1, count + 1)) - {part.index for part in parts}
    unfinished = {number % count + 1 for number in lacking} - missing
    parts_by_fault = {"not begun": missing, "not whole": unfinished}
    faults = [f"{fault}: {_ranges(found)}" for fault, found in parts_by_fault.items() if found]
    if faults:
        raise ShardError(
            f"{out}: of {count} parts {len(missing | unfinished)} are still to be made ({'; '.join(faults)}; "
            f"{len(lacking)} shards in all); run these with --part I/{count}, then --join again"
        )


def _ranges(numbers: set[int]) -> str:
    """Write numbers as schedulers take them: 1-3,7."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)
