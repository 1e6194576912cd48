"""Commands in several processes, as torchrun starts them, but forked from one that has torch already."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver, get_context
from pathlib import Path

from torch.distributed import TCPStore

# The last two are what optimisers and logs import late; the server passes over what is not there.
PRELOADED = ["fsar.cli.train", "fsar.cli.evaluate", "fsar.cli.pretrain", "torch._dynamo", "torch.utils.tensorboard"]


@dataclass
class Left:
    """How a process ended, and what it said."""

    code: int
    out: str
    err: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def stop_server() -> None:
    """End the process that others are forked from: the next one has what its users preload."""
    forkserver._forkserver._stop()


def start(work: Callable[[], None], rank: int, count: int, port: int, folder: Path, extra: dict[str, str]) -> None:
    """What each process does: its environment, its output in files, then the work."""
    for stream in (1, 2):
        os.dup2(os.open(folder / f"{rank}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", encoding="utf-8", closefd=False) for stream in (1, 2))
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | extra
    os.chdir(folder)
    work()


@dataclass
class Command:
    """A command as work: the module of its `main`, and its words."""

    module: str
    words: Sequence[str]

    def __call__(self) -> None:
        sys.argv = [self.module, *self.words]
        __import__(self.module)
        sys.modules[self.module].main()


def together(work: Callable[[], None], count: int, folder: Path, *, limit: float = 120, **extra: str) -> list[Left]:
    """Run the same in `count` processes whose current folder is `folder`; none may outlast `limit` seconds."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun has one: it outlives all
    extra |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    port = agent.port
    processes = [context.Process(target=start, args=(work, r, count, port, folder, extra)) for r in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(limit)
    late = [process for process in processes if process.exitcode is None]
    for process in late:
        process.kill()
    assert not late
    return [
        Left(process.exitcode, *((folder / f"{rank}.{stream}").read_text() for stream in (1, 2)))
        for rank, process in enumerate(processes)
    ]
