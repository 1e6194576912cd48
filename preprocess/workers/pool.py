"""Run jobs in worker processes that end with us; a shard whose worker died is tried again.

Jobs go over pipes, so that a killed process is noticed at the next word. The video at which a second worker dies is
left out, and said.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import signal
import sys
import time
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from types import ModuleType

from preprocess.decode import DecoderKilledError
from preprocess.encode.series import steady
from preprocess.workers.job import Finished, Job, run
from shards_spec import FsarError
from shards_spec.index.build import shard_path
from shards_spec.remote.store import RemotePath
from shards_spec.tar import unfinished

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


GRACE = 60.0  # seconds that a worker may be silent beyond twice the time limit of a video
COPYING = 3600.0  # seconds more where a video is copied from a URL first: a slow line is no dead worker
LAST_WORDS = 5.0  # seconds in which a process that was told to end does
STARTS = 50  # of a worker, 0.2 s apart: a fork server that was hit takes its time to die
NO_SERVER = "the process that starts workers was killed"
MOST_IN_A_ROW = 3  # videos left out without one stored between them: then it is not the videos


# OpenCV's faster code for newer CPUs rounds otherwise: optical flow would depend on the CPU. Measured cost: none.
STEADY = {"OPENCV_CPU_DISABLE": "AVX512-SKX,AVX2,FP16,AVX,SSE4.2,SSE4.1"} if platform.machine() == "x86_64" else {}


@dataclass(frozen=True)
class Progress:
    """One video is done; `frames` is 0 where it failed."""

    frames: int


@dataclass(frozen=True)
class Lost:
    """The worker lives, but its decoder was killed."""

    how: str


@dataclass
class _Worker:
    """A process, what it is trying, and when it was heard last."""

    process: ForkServerProcess
    attempts: Attempts
    heard: float

    @property
    def patience(self) -> float:
        """Seconds that it may be silent."""
        job = self.attempts.job
        copied = any(isinstance(video.path, RemotePath) for video in job.videos.values())
        return 2 * job.time_limit + GRACE + (COPYING if copied else 0.0)

    @property
    def silent_from(self) -> float:
        """When it has been silent for too long."""
        return self.heard + self.patience


def work(jobs: Sequence[Job], workers: int) -> Generator[Progress | Finished]:
    """Run jobs in up to `workers` processes; yields progress as it comes and each shard as it is finished.

    A shard whose worker dies or falls silent is tried again by a new one, without the video at which two did.

    Raises:
        FsarError: a worker ran out of disk, or workers die whatever the video.
    """
    crew = _Crew([Attempts(job) for job in reversed(jobs)])
    try:
        for _ in range(min(workers, len(jobs))):
            crew.hire(crew.waiting.pop())
        while crew.workers:
            for ready in wait(crew.workers, crew.patience()):
                yield from crew.hear(ready)  # type: ignore[arg-type]  # only our connections are waited for
            crew.end_silent()
    finally:
        crew.dismiss()


class _Crew:
    """The workers by their connections, and the jobs that wait for one."""

    def __init__(self, waiting: list[Attempts]) -> None:
        # A fork server: the parent's threads and locks are never copied, and the imports are paid once.
        self._context = multiprocessing.get_context("forkserver")
        self.waiting = waiting
        self.workers: dict[Connection, _Worker] = {}
        self._processes: list[ForkServerProcess] = []
        self._left_out = 0  # videos in a row

    def hire(self, attempts: Attempts) -> None:
        """Start a worker on a job."""
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
        _start(process)
        theirs.close()
        self._processes.append(process)
        self.workers[ours] = _Worker(process, attempts, time.monotonic())
        self._send(ours, attempts)

    def hear(self, connection: Connection) -> Generator[Progress | Finished]:
        """Take one message of a worker, and give it work where it has none left."""
        worker = self.workers[connection]
        worker.heard = time.monotonic()
        try:
            message = connection.recv()
        except (EOFError, OSError):
            self._bury(connection)
            return
        if isinstance(message, FsarError):
            raise message
        if isinstance(message, Lost):
            self._note(worker.attempts, message.how)
            self._send(connection, worker.attempts)
        elif isinstance(message, Progress):
            if worker.attempts.video_done():
                if message.frames:
                    self._left_out = 0
                yield message
        else:
            assert isinstance(message, Finished)
            self._next(connection)  # the worker goes on while its shard is made durable
            yield message

    def patience(self) -> float:
        """Seconds until a worker will have been silent for too long."""
        return max(0.0, min(worker.silent_from for worker in self.workers.values()) - time.monotonic())

    def end_silent(self) -> None:
        """Kill the workers that said nothing for too long; their jobs are tried again."""
        now = time.monotonic()
        for connection, worker in list(self.workers.items()):
            if worker.silent_from <= now and not connection.poll():
                worker.process.kill()
                self._bury(connection, f"silent for more than {worker.patience:g} s")

    def dismiss(self) -> None:
        """End all workers, whatever they do."""
        for connection in self.workers:
            connection.close()
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(LAST_WORDS)
            if process.is_alive():
                process.kill()
                process.join()

    def _bury(self, connection: Connection, how: str | None = None) -> None:
        """Clean up after a dead worker, and hire another for its job."""
        worker = self.workers.pop(connection)
        connection.close()
        worker.process.join(LAST_WORDS)
        worker.process.kill()
        self._processes.remove(worker.process)
        job = worker.attempts.job
        for series in job.series:
            unfinished(shard_path(job.out, series, job.shard), worker.process.pid or 0).unlink(missing_ok=True)
        self._note(worker.attempts, how or death_text(worker.process.exitcode))
        self.hire(worker.attempts)

    def _note(self, attempts: Attempts, how: str) -> None:
        left_out = attempts.died(how)
        self._left_out += left_out is not None
        if self._left_out >= MOST_IN_A_ROW:
            raise FsarError(f"workers die at every video, at last at {left_out} ({how}): it is not the videos; {AGAIN}")

    def _next(self, connection: Connection) -> None:
        """Give a free worker its next job, or let it go."""
        if self.waiting:
            self.workers[connection].attempts = self.waiting.pop()
            self._send(connection, self.workers[connection].attempts)
        else:
            del self.workers[connection]
            connection.close()

    @staticmethod
    def _send(connection: Connection, attempts: Attempts) -> None:
        with suppress(OSError):  # it died: the next look at the connection will tell
            connection.send(attempts.job)


def _start(process: ForkServerProcess) -> None:
    """Start a worker, and before it the process that forks it, which may just have been killed itself.

    Raises:
        FsarError: that process dies again and again.
    """
    for _ in range(STARTS):
        _start_server()
        try:
            with _without_main():
                process.start()
        except (ConnectionError, EOFError):
            time.sleep(0.2)
        else:
            return
    raise FsarError(f"{NO_SERVER}; {AGAIN}")


def _start_server() -> None:
    """Start the process from which workers fork, in an environment that OpenCV reads when it is loaded there."""
    before = dict(os.environ)
    os.environ.update(STEADY)
    try:
        forkserver.set_forkserver_preload(["preprocess.workers.preload"])
        forkserver.ensure_running()
    except OSError as error:  # its socket lies in $TMPDIR, whose name may be too long for one
        raise FsarError(
            f"no worker can be started ({error}); $TMPDIR must be a short path to a place with room"
        ) from error
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _without_main() -> Generator[None]:
    """Keep a starting worker from importing the program that we run as: it needs nothing of it, and may pay seconds."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _serve(connection: Connection) -> None:
    """Do jobs until the parent closes the pipe or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    steady()
    try:
        if any(os.environ.get(name) != value for name, value in STEADY.items()):
            connection.send(FsarError(f"a fork server ran before fsar set {', '.join(STEADY)}; use a fresh process"))
            return
        while True:
            job = connection.recv()
            try:
                connection.send(run(job, lambda frames: connection.send(Progress(frames))))
            except DecoderKilledError:
                connection.send(Lost("the decoder was killed (out of memory?)"))
            except FsarError as error:
                connection.send(error)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # what was not published is temporary: the next run sweeps it away
