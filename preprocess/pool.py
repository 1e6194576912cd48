"""Worker processes that end with us: jobs over pipes, so that a killed parent is noticed at the next word."""

from __future__ import annotations

import multiprocessing
import os
import platform
import signal
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import wait
from types import ModuleType
from typing import TYPE_CHECKING

from preprocess.job import Finished, run
from shards_spec import FsarError

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from multiprocessing.connection import Connection
    from multiprocessing.context import ForkServerProcess

    from preprocess.job import Job


DIED = "a worker died (out of memory, or killed); type the same command again: finished shards are kept"


# OpenCV's faster code for newer CPUs rounds otherwise: optical flow would depend on the CPU. Measured cost: none.
STEADY = {"OPENCV_CPU_DISABLE": "AVX512-SKX,AVX2,FP16,AVX,SSE4.2,SSE4.1"} if platform.machine() == "x86_64" else {}


@dataclass(frozen=True)
class Progress:
    """One video is done; `frames` is 0 where it failed."""

    frames: int


def work(jobs: Sequence[Job], workers: int) -> Generator[Progress | Finished]:
    """Run jobs in up to `workers` processes; yields progress as it comes and each shard as it is finished.

    Raises:
        FsarError: a worker ran out of disk, or died.
    """
    # A fork server: the parent's threads and locks are never copied, and the imports are paid once.
    context = multiprocessing.get_context("forkserver")
    _start_server()
    waiting = list(reversed(jobs))
    pool: list[Connection] = []
    processes: list[ForkServerProcess] = []
    try:
        for _ in range(min(workers, len(jobs))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            with _without_main():
                process.start()
            theirs.close()
            pool.append(ours)
            processes.append(process)
            _send(ours, waiting.pop())
        while pool:
            for ready in wait(pool):
                message = _receive(ready)  # type: ignore[arg-type]  # only our connections are waited for
                if isinstance(message, Finished):  # the worker goes on while its shard is made durable
                    _next(ready, waiting, pool)  # type: ignore[arg-type]
                yield message
    finally:
        for connection in pool:
            connection.close()
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _start_server() -> None:
    """Start the process from which workers fork, in an environment that OpenCV reads when it is loaded there."""
    before = dict(os.environ)
    os.environ.update(STEADY)
    try:
        forkserver.set_forkserver_preload(["preprocess.pool"])
        forkserver.ensure_running()
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


def _next(connection: Connection, waiting: list[Job], pool: list[Connection]) -> None:
    """Give a free worker its next job, or let it go."""
    if waiting:
        _send(connection, waiting.pop())
        return
    pool.remove(connection)
    connection.close()


def _send(connection: Connection, job: Job) -> None:
    try:
        connection.send(job)
    except OSError:
        raise FsarError(DIED) from None


def _receive(connection: Connection) -> Progress | Finished:
    try:
        message = connection.recv()
    except (EOFError, OSError):
        raise FsarError(DIED) from None
    if isinstance(message, FsarError):
        raise message
    assert isinstance(message, Progress | Finished)
    return message


def _serve(connection: Connection) -> None:
    """Do jobs until the parent closes the pipe or is gone."""
    import cv2  # noqa: PLC0415 -- the thread count belongs to this process alone

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    cv2.setNumThreads(1)  # DIS cuts a picture into as many stripes as there are threads: its result depends on it
    cv2.ipp.setUseIPP(False)  # Intel's library chooses its code by the CPU, too
    try:
        if any(os.environ.get(name) != value for name, value in STEADY.items()):
            connection.send(FsarError(f"a fork server ran before fsar set {', '.join(STEADY)}; use a fresh process"))
            return
        while True:
            job = connection.recv()
            try:
                connection.send(run(job, lambda frames: connection.send(Progress(frames))))
            except FsarError as error:
                connection.send(error)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # what was not published is temporary: the next run sweeps it away
