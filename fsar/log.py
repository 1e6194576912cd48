"""`log.jsonl` of a run, one object a line; TensorBoard events beside it where TensorBoard is installed."""

from __future__ import annotations

import importlib.util
import json
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from pathlib import Path


class RunLog:
    """Writes the records of a run; a context manager.

    Args:
        run: The run folder.
        start: Episodes that the run's checkpoint had seen: what a killed run had logged after it is dropped.
    """

    def __init__(self, run: Path, start: int) -> None:
        run.mkdir(parents=True, exist_ok=True)
        path = run / "log.jsonl"
        _truncate(path, start)
        self._file = path.open("a", encoding="utf-8")
        self._board = _open_board(run, start)

    def write(self, kind: str, n: int, **values: float | str) -> None:
        """Append one record of what was known after n episodes."""
        self._file.write(json.dumps({"kind": kind, "n": n} | values) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if not isinstance(value, str):
                    self._board.add_scalar(f"{kind}/{name}", value, n)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _open_board(run: Path, start: int) -> Any:  # noqa: ANN401 -- a SummaryWriter, where its package is installed
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 -- an extra

    return SummaryWriter(run / "tensorboard", purge_step=start)


def _truncate(path: Path, n: int) -> None:
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:  # the line that was being written
            continue
        if record["n"] <= n:
            kept.append(line + "\n")
    path.write_text("".join(kept), encoding="utf-8")
