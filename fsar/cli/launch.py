"""Run commands that torchrun may start as several processes: one speaks, and says errors once."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NoReturn

import click
from torch.distributed.distributed_c10d import Store

from fsar.run import ranks
from shards_spec.cli.console import BAD_INPUT, INTERRUPTED, run_command
from shards_spec.errors import FsarError


def launch(command: click.Command, *, again: str) -> NoReturn:
    """Run a click command, in each of the processes that torchrun has started, and exit.

    A process that fails leaves at once: the clean end of a group would wait for the others.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        run_command(command, again=again)
    try:
        run_command(command, again=again, within=_joined())
    except SystemExit as leave:
        if leave.code:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(leave.code if isinstance(leave.code, int) else 1)
        raise


@contextmanager
def _joined() -> Iterator[None]:
    """Join the group of processes; the first speaks, and one says an error of several."""
    store = ranks.join()
    try:
        with nullcontext() if ranks.is_first() else _silent():
            yield
            ranks.wait_for_all()
    except (KeyboardInterrupt, click.Abort):  # click makes the one the other
        if not _first_to_say(store, "interrupted"):
            raise SystemExit(INTERRUPTED) from None
        raise
    except (FsarError, click.ClickException) as error:
        lost = isinstance(error, ranks.LostProcessError)
        if not _first_to_say(store, "" if lost else str(error)):
            raise SystemExit(BAD_INPUT) from None
        raise
    ranks.leave()


@contextmanager
def _silent() -> Iterator[None]:
    """Silence all output; errors pass."""
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _first_to_say(store: Store, sentence: str) -> bool:
    """Tell whether no process has said this sentence yet; if empty, whether none spoke."""
    key = hashlib.sha256(sentence.encode("utf-8", "backslashreplace")).hexdigest()
    try:
        said = store.add("said", 1) > 1
        return not said if not sentence else store.add(key, 1) == 1
    except RuntimeError:  # the store is gone, too
        return True
