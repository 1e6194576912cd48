"""Keep the folder and the log of a run.

It is begun once, and resumed only with the same configuration and data.

`log.jsonl` holds one object a line; TensorBoard events lie in the same folder if TensorBoard is
installed.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
from io import FileIO
from pathlib import Path
from typing import Any, Self

from fsar.run import ranks
from fsar.run.flat_config import FlatConfig
from shards_spec.errors import ConfigError, FsarError
from shards_spec.files import disk_errors, json_bytes, read_json, write_whole


def last_checkpoint(run: Path) -> Path:
    """Path of the checkpoint to resume from."""
    return run / "checkpoints" / "last.safetensors"


def begin_run(run: Path, config: FlatConfig, data: dict[str, Any], *, option: str = "--run") -> None:
    """Make the folder with `config.toml` and `data.json`, what the run reads.

    Raises:
        ConfigError: it holds a run already, or is a file; `option` is how a command names it.
        DiskError: the disk is full.
    """
    if last_checkpoint(run).exists():
        raise ConfigError(f"{run} holds a run already; go on with --resume, or choose another folder with {option}")
    if run.exists() and not run.is_dir():
        raise ConfigError(f"{option} {run} is a file; name a folder")
    with disk_errors(run):
        run.mkdir(parents=True, exist_ok=True)
    write_whole(run / "data.json", json_bytes(data))
    write_whole(run / "config.toml", config.to_toml().encode())


def check_is_run(run: Path) -> None:
    """ConfigError where there is nothing to resume."""
    if not (run / "config.toml").exists():
        raise ConfigError(f"--resume: {run} holds no run; start it without --resume")


def check_resumable(run: Path, config: FlatConfig, saved: FlatConfig) -> None:
    """Refuse to resume a run with another configuration.

    Raises:
        ConfigError: naming what differs, or that there is nothing to resume.
    """
    different = config.differences(saved)
    if different:
        raise ConfigError(
            f"--resume: {run} was trained with another configuration ({'; '.join(different)}); "
            "give the options that it was started with, or start a new run"
        )
    if not last_checkpoint(run).exists():
        raise ConfigError(f"--resume: {run} has no checkpoint yet; start it again without --resume")


def check_same_data(run: Path, data: dict[str, Any], shards: Path) -> None:
    """Refuse to resume a run on other data than it was begun with: ConfigError."""
    if read_json(run / "data.json") != data:
        raise ConfigError(
            f"--resume: {run} was trained on other shards, splits or labels than {shards}, or other texts"
        )


def read_log(run: Path) -> list[dict[str, Any]]:
    """Read the records of a run's log; a run without a log has none.

    Raises:
        FsarError: it is damaged.
    """
    path = run / "log.jsonl"
    try:
        records = [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []
    except (OSError, ValueError, RecursionError) as error:
        raise FsarError(f"{path} is damaged ({error}): remove the lines that are no records") from error
    return [record for record in records if isinstance(record, dict) and "kind" in record]


class RunLog:
    """Writer of the records of a run, in the first of its processes; a context manager.

    Args:
        run: The run folder; None to write nothing.
        start: Episodes of the run's checkpoint; records that a killed run wrote after it are
            dropped.
    """

    def __init__(self, run: Path | None, start: int) -> None:
        self._file: FileIO | None = None
        self._board = None
        if run is None or not ranks.is_first():
            return
        self._path = run / "log.jsonl"
        with disk_errors(self._path):
            run.mkdir(parents=True, exist_ok=True)
            _truncate(self._path, start)
            self._file = self._path.open("ab", buffering=0)  # what a full disk refuses must not wait in a buffer
        self._board = _open_board(run, start)

    def write(self, kind: str, n: int, **values: float | str) -> None:
        """Append one record of the state after n episodes."""
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
        """Write the log to disk, before a checkpoint is written.

        A checkpoint must not be ahead of the log.
        """
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
    """Number of the episode of a record.

    It is infinite for a line that was being written when the run was killed.
    """
    try:
        return float(json.loads(line)["n"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return math.inf
