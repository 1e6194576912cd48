"""Retry a job whose worker died, and leave out the video at which two workers died."""

from __future__ import annotations

import signal
from collections import Counter
from contextlib import suppress
from dataclasses import replace

from preprocess.workers.job import Job
from shards_spec import FsarError

MOST_DEATHS = 2  # of workers at one video; the first may have been another program's doing
AGAIN = "type the same command again: finished shards are kept"


class Retries:
    """A job, how far its workers came, and the videos at which they died.

    A worker reports its videos in order, so their count tells at which video it died.

    Attributes:
        job: The job for the next worker; `fatal` of it names the videos that are left out.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self._rows = list(job.videos)
        self._done = self._most_done = 0  # videos of this worker, and of the one that came farthest
        self._deaths: Counter[int | None] = Counter()  # by row; None: after the last video

    def count_video(self) -> bool:
        """Count one more video of this worker; tell whether no worker before it came so far."""
        self._done += 1
        first = self._done > self._most_done
        self._most_done = max(self._most_done, self._done)
        return first

    def count_death(self, cause: str) -> str | None:
        """Note that the worker died, and start counting videos anew.

        Returns:
            The name of the video that is left out from now on, if any.

        Raises:
            FsarError: workers die although all videos of the shard are done.
        """
        row = self._rows[self._done] if self._done < len(self._rows) else None
        self._done = 0
        self._deaths[row] += 1
        if self._deaths[row] < MOST_DEATHS:
            return None
        if row is None:
            raise FsarError(f"{MOST_DEATHS} workers were lost at the end of shard {self.job.shard} ({cause}); {AGAIN}")
        self.job = replace(self.job, fatal={**self.job.fatal, row: f"{MOST_DEATHS} workers were lost at it: {cause}"})
        return self.job.videos[row].name


def death_cause(exit_code: int | None) -> str:
    """Say how a process ended."""
    if exit_code is not None and exit_code < 0:
        name = f"signal {-exit_code}"
        with suppress(ValueError):  # a real-time signal has no name
            name = signal.Signals(-exit_code).name
        return f"killed by {name}" + (" (out of memory?)" if exit_code == -signal.SIGKILL else "")
    return f"ended with exit code {exit_code}"
