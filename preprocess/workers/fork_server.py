"""Start worker processes from a fork server: one small process that imports once and then forks."""

from __future__ import annotations

import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from multiprocessing import forkserver
from types import ModuleType

from preprocess.workers.retries import AGAIN
from shards_spec import FsarError

# Why a fork server: "fork" would copy our threads' locks in whatever state they are, and tqdm,
# OpenCV and Ray have threads. "spawn" would import NumPy and OpenCV again in every worker.
CONTEXT = multiprocessing.get_context("forkserver")
STARTS = 50  # of a worker, 0.2 s apart: a fork server that was killed takes its time to end
NO_SERVER = "the process that starts workers was killed"

# OpenCV's faster code for newer CPUs rounds otherwise, so optical flow would depend on the CPU.
# Measured cost: none.
STEADY = {"OPENCV_CPU_DISABLE": "AVX512-SKX,AVX2,FP16,AVX,SSE4.2,SSE4.1"} if platform.machine() == "x86_64" else {}


def start(process: multiprocessing.context.ForkServerProcess) -> None:
    """Start a worker; start the fork server before it where that has ended.

    Raises:
        FsarError: the fork server dies again and again, or cannot be started.
    """
    for _ in range(STARTS):
        start_server()
        try:
            with _without_main():
                process.start()
        except (ConnectionError, EOFError):
            time.sleep(0.2)
        else:
            return
    raise FsarError(f"{NO_SERVER}; {AGAIN}")


def start_server() -> None:
    """Start the fork server, unless it runs.

    OpenCV reads `STEADY` when it is loaded, which is in the server. Our own environment stays.

    Raises:
        FsarError: it cannot be started.
    """
    before = dict(os.environ)
    os.environ.update(STEADY)
    try:
        # A module of its own is preloaded, since it must hide PyTorch while it imports.
        forkserver.set_forkserver_preload(["preprocess.workers.preload"])
        forkserver.ensure_running()
    except OSError as error:  # its socket lies in $TMPDIR, whose name may be too long for one
        raise FsarError(
            f"no worker can be started ({error}); $TMPDIR must be a short path to a place with room"
        ) from error
    finally:
        os.environ.clear()
        os.environ.update(before)


def check_environment() -> FsarError | None:
    """Return an error where another library started the fork server first, without `STEADY`."""
    if any(os.environ.get(name) != value for name, value in STEADY.items()):
        return FsarError(f"a fork server ran before fsar set {', '.join(STEADY)}; use a fresh process")
    return None


@contextmanager
def _without_main() -> Generator[None]:
    """Keep a starting worker from importing the program that we run as.

    The worker uses nothing of it, and a script without `if __name__ == "__main__"` would run again.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
