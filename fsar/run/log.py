"""`log.jsonl` of a run, one object a line; TensorBoard events beside it where TensorBoard is installed."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from io import FileIO
from pathlib import Path
from typing import Any, Self

from fsar.run import ranks
from shards_spec.files import disk_errors, write_whole


class RunLog:
    """Writes the records of a run, in the first of its processes; a context manager.

    Args:
        run: The run folder.
        start: Episodes that the run's checkpoint had seen: what a killed run had logged after it is dropped.
    """

    def __init__(self, run: Path, start: int) -> None:
        self._path = run / "log.jsonl"
        self._file: FileIO | None = None
        self._board = None
        if not ranks.is_first():
            return
        with disk_errors(self._path):
            run.mkdir(parents=True, exist_ok=True)
            _truncate(self._path, start)
            self._file = self._path.open("ab", buffering=0)  # what a full disk refuses must not wait in a buffer
        self._board = _open_board(run, start)

    def write(self, kind: str, n: int, **values: float | str) -> None:
        """Append one record of what was known after n episodes."""
        if self._file is None:
            return
        line = (json.dumps({"kind": kind, "n": n} | values) + "\n").encode()
        with disk_errors(self._path):
            while line:
                line = line[self._file.write(line) :]
        if self._board is not None:
            for name, value in values.items():
                if not isinstance(value, str):
                    self._board.add_scalar(f"{kind}/{name}", value, n)

    def make_durable(self) -> None:
        """Called before a checkpoint is written, which must not know more than the log does."""
        if self._file is None:
            return
        with disk_errors(self._path):
            os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def _open_board(run: Path, start: int) -> Any:  # noqa: ANN401 -- a SummaryWriter, where its package is installed
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 -- an extra

    return SummaryWriter(run / "tensorboard", purge_step=start)


def _truncate(path: Path, n: int) -> None:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if _episode(line) <= n]
    if kept != lines:
        write_whole(path, "".join(kept).encode())


def _episode(line: str) -> float:
    """Number of the episode of a record; infinite for a line that was being written when the run was killed."""
    try:
        return float(json.loads(line)["n"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return math.inf
