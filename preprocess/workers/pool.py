"""Run jobs in worker processes of this machine; the job of a worker that dies is tried again.

Jobs and messages go over one pipe a worker: the pipe of a killed process closes, and we notice.
Worker processes end with us, whatever happens.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess

from preprocess.decode import DecoderKilledError
from preprocess.encode.series import make_opencv_deterministic
from preprocess.workers.fork_server import CONTEXT, check_environment, start
from preprocess.workers.job import Job, Messages, ShardDone, VideoDone, run_job
from preprocess.workers.retries import AGAIN, Retries, death_cause
from shards_spec import FsarError
from shards_spec.index.layout import shard_path
from shards_spec.remote.store import RemotePath
from shards_spec.tar import unfinished

GRACE = 60.0  # seconds that a worker may be silent beyond twice the time limit of a video
# Seconds more where a video is copied from a URL first: a slow line is no dead worker.
COPYING = 3600.0
EXIT_SECONDS = 5.0  # in which a process that was told to end does
MOST_IN_A_ROW = 3  # videos left out without one stored between them: then it is not the videos


@dataclass(frozen=True)
class DecoderKilled:
    """A message of a worker that lives, but whose decoder was killed."""

    cause: str


@dataclass
class _Worker:
    """A process, its job with what is known of it, and the time of its last message."""

    process: ForkServerProcess
    retries: Retries
    last_message: float

    @property
    def silence_limit(self) -> float:
        """Seconds that it may be silent."""
        job = self.retries.job
        copied = any(isinstance(video.path, RemotePath) for video in job.videos.values())
        return 2 * job.time_limit + GRACE + (COPYING if copied else 0.0)

    @property
    def deadline(self) -> float:
        """The time at which it has been silent for too long."""
        return self.last_message + self.silence_limit


def run_in_processes(jobs: Sequence[Job], workers: int) -> Messages:
    """Run jobs in up to `workers` processes; yield each video and each shard as it is done.

    A shard whose worker dies or falls silent is tried again by a new worker. The video at which
    two workers died is left out, and its failure says so.

    Raises:
        FsarError: a worker ran out of disk, or workers die whatever the video.
    """
    pool = _Pool([Retries(job) for job in reversed(jobs)])
    try:
        for _ in range(min(workers, len(jobs))):
            pool.start_worker(pool.waiting.pop())
        while pool.workers:
            for ready in wait(pool.workers, pool.seconds_to_deadline()):
                yield from pool.receive(ready)  # type: ignore[arg-type]  # only our connections are waited for
            pool.replace_silent()
    finally:
        pool.stop()


class _Pool:
    """The workers by their connections, and the jobs that wait for one."""

    def __init__(self, waiting: list[Retries]) -> None:
        self.waiting = waiting
        self.workers: dict[Connection, _Worker] = {}
        self._processes: list[ForkServerProcess] = []
        self._left_out = 0  # videos in a row

    def start_worker(self, retries: Retries) -> None:
        """Start a worker on a job."""
        ours, theirs = CONTEXT.Pipe()
        process = CONTEXT.Process(target=_serve, args=(theirs,), daemon=True)
        start(process)
        theirs.close()  # else the pipe would stay open when the worker dies
        self._processes.append(process)
        self.workers[ours] = _Worker(process, retries, time.monotonic())
        self._send(ours, retries)

    def receive(self, connection: Connection) -> Messages:
        """Take one message of a worker, and send it a job where it has none left."""
        worker = self.workers[connection]
        worker.last_message = time.monotonic()
        try:
            message = connection.recv()
        except (EOFError, OSError):
            self._replace(connection)
            return
        if isinstance(message, FsarError):
            raise message
        if isinstance(message, DecoderKilled):
            self._count_death(worker.retries, message.cause)
            self._send(connection, worker.retries)
        elif isinstance(message, VideoDone):
            if worker.retries.count_video():  # videos of a retry are reported once
                if message.frames:
                    self._left_out = 0
                yield message
        else:
            assert isinstance(message, ShardDone)
            self._send_next(connection)  # the worker goes on while its shard is made durable
            yield message

    def seconds_to_deadline(self) -> float:
        """Seconds until a worker will have been silent for too long."""
        return max(0.0, min(worker.deadline for worker in self.workers.values()) - time.monotonic())

    def replace_silent(self) -> None:
        """Kill the workers that said nothing for too long, and start others for their jobs."""
        now = time.monotonic()
        for connection, worker in list(self.workers.items()):
            if worker.deadline <= now and not connection.poll():
                worker.process.kill()
                self._replace(connection, f"silent for more than {worker.silence_limit:g} s")

    def stop(self) -> None:
        """End all workers, whatever they do."""
        for connection in self.workers:
            connection.close()
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(EXIT_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()

    def _replace(self, connection: Connection, cause: str | None = None) -> None:
        """Clean up after a dead worker, and start another for its job."""
        worker = self.workers.pop(connection)
        connection.close()
        worker.process.join(EXIT_SECONDS)
        worker.process.kill()
        self._processes.remove(worker.process)
        job = worker.retries.job
        for series in job.series:
            unfinished(shard_path(job.out, series, job.shard), worker.process.pid or 0).unlink(missing_ok=True)
        self._count_death(worker.retries, cause or death_cause(worker.process.exitcode))
        self.start_worker(worker.retries)

    def _count_death(self, retries: Retries, cause: str) -> None:
        left_out = retries.count_death(cause)
        self._left_out += left_out is not None
        if self._left_out >= MOST_IN_A_ROW:
            raise FsarError(
                f"workers die at every video, at last at {left_out} ({cause}): it is not the videos; {AGAIN}"
            )

    def _send_next(self, connection: Connection) -> None:
        """Send a free worker its next job; where none waits, close its pipe, which ends it."""
        if self.waiting:
            self.workers[connection].retries = self.waiting.pop()
            self._send(connection, self.workers[connection].retries)
        else:
            del self.workers[connection]
            connection.close()

    @staticmethod
    def _send(connection: Connection, retries: Retries) -> None:
        with suppress(OSError):  # the worker died: `receive` will find the pipe closed
            connection.send(retries.job)


def _serve(connection: Connection) -> None:
    """Do jobs in a worker process until its parent closes the pipe or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    make_opencv_deterministic()
    try:
        if error := check_environment():
            connection.send(error)
            return
        while True:
            job = connection.recv()
            try:
                connection.send(run_job(job, lambda frames: connection.send(VideoDone(frames))))
            except DecoderKilledError:
                connection.send(DecoderKilled("the decoder was killed (out of memory?)"))
            except FsarError as refused:
                connection.send(refused)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # what was not published has a temporary name: the next run removes it
