"""Names of the series of motion, and how one is added to a shard set."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from shards_spec.pictures import series_kind

MOTION = {"diff": "diff1", "flow": "flow1"}  # short name in the command's --motion -> name of the series
_GRID = re.compile(r"flow([1-9]\d{0,2})g([1-9]\d{0,2})")


def flow_pairs(series: str) -> tuple[int, int] | None:
    """Displacement D and grid G of `flow1` or `flowDgG`, in source frames; None for a name that is none of these.

    Its fields go from frame i to frame i + D for i = 0, G, 2G, ...
    """
    match = _GRID.fullmatch(series)
    if match:
        return int(match[1]), int(match[2])
    return (1, 1) if series == MOTION["flow"] else None


def motion_series(names: Iterable[str]) -> list[str]:
    """The series, sorted, that the names in --motion stand for; a series may be named in full."""
    return sorted({MOTION.get(name, name) for name in names})


def is_motion(name: str) -> bool:
    """Whether --motion takes this name."""
    return name in MOTION or name in MOTION.values() or flow_pairs(name) is not None


def adding_command(series: str, folder: str | Path) -> str:
    """What to type so that the shard set in `folder` gets a series of motion too; of an unknown name, its kind."""
    kind = series_kind(series)[0]
    name = series if is_motion(series) else {"frames": "diff, flow or flow8g2"}.get(kind, kind)
    option = {held: short for short, held in MOTION.items()}.get(name, name)
    return f"the fsar-preprocess command that made {folder}, typed again with --motion {option}"
