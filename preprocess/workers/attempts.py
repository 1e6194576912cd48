"""A shard whose worker died is tried again; the video at which a second worker dies is left out, and said."""

from __future__ import annotations

import signal
from collections import Counter
from contextlib import suppress
from dataclasses import replace

from preprocess.workers.job import Job
from shards_spec import FsarError

MOST_DEATHS = 2  # of workers at one video; the first may have been another program's doing
AGAIN = "type the same command again: finished shards are kept"


class Attempts:
    """One job, from its first attempt to the one that ends; `job` is what the next attempt is to do.

    A job reports its videos in order, which tells at which of them a worker died.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self._rows = list(job.videos)
        self._done = self._most_done = 0
        self._deaths: Counter[int | None] = Counter()

    def video_done(self) -> bool:
        """Count one more video of this attempt; whether no attempt before came so far."""
        self._done += 1
        first = self._done > self._most_done
        self._most_done = max(self._most_done, self._done)
        return first

    def died(self, how: str) -> str | None:
        """Note that the worker died; returns the name of the video that is left out from now on, if any.

        Raises:
            FsarError: workers die although all videos of the shard are done.
        """
        row = self._rows[self._done] if self._done < len(self._rows) else None
        self._done = 0
        self._deaths[row] += 1
        if self._deaths[row] < MOST_DEATHS:
            return None
        if row is None:
            raise FsarError(f"{MOST_DEATHS} workers were lost at the end of shard {self.job.shard} ({how}); {AGAIN}")
        self.job = replace(self.job, fatal={**self.job.fatal, row: f"{MOST_DEATHS} workers were lost at it: {how}"})
        return self.job.videos[row].name


def death_text(exit_code: int | None) -> str:
    """What ended a process."""
    if exit_code is not None and exit_code < 0:
        name = f"signal {-exit_code}"
        with suppress(ValueError):  # a real-time signal has no name
            name = signal.Signals(-exit_code).name
        return f"killed by {name}" + (" (out of memory?)" if exit_code == -signal.SIGKILL else "")
    return f"ended with exit code {exit_code}"
