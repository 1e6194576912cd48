"""The JSON member of a sample, checked: what it says is taken into the index, whoever wrote it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from shards_spec.names import path_fault, quoted, text_fault

MOST_FRAMES, MOST_SIDE = 99_999, 65_535  # five digits, and two bytes of a JPEG
NEEDED = frozenset({"name", "label", "group", "frames", "fps", "source_size", "size"})
LISTS = ("scale", "magnitude", "motion_score")  # a value for each picture


def check_info(info: Any, frames: Sequence[int]) -> None:  # noqa: ANN401 -- whatever the JSON holds
    """Raise ValueError where the JSON of a sample with the pictures `frames` is not what SPEC.md says."""
    if not isinstance(info, dict) or not info.keys() >= NEEDED:
        raise ValueError(f"it is no object with {', '.join(sorted(NEEDED))}")
    _check_names(info)
    count, fps = info.get("frames"), info.get("fps")
    if type(count) is not int or not 0 < count <= MOST_FRAMES:
        raise ValueError(f"frames is {str(count)[:40]!r}")
    if not isinstance(fps, int | float) or not 0 <= fps < math.inf:
        raise ValueError(f"fps is {str(fps)[:40]!r}")
    for key in ("size", "source_size"):
        sides = info.get(key)
        if not (isinstance(sides, list) and len(sides) == 2 and all(_is_side(side) for side in sides)):
            raise ValueError(f"{key} is {str(sides)[:40]!r}")
    if info.get("kept", frames) != frames or (frames and not 0 <= min(frames) <= max(frames) < count):
        raise ValueError("its pictures are not those that it names, or of frames that it has not")
    for key in LISTS:
        values = info.get(key, frames)
        if not isinstance(values, list) or len(values) != len(frames):
            raise ValueError(f"{key} has not one value for each picture")


def _check_names(info: dict[str, Any]) -> None:
    name, label, group = info.get("name"), info.get("label"), info.get("group")
    if not isinstance(name, str) or not isinstance(label, str) or not isinstance(group, str | None):
        raise ValueError("name, label or group is no text")  # noqa: TRY004
    for text, fault in ((name, path_fault(name)), (label, text_fault(label)), (group or "", text_fault(group or ""))):
        if fault:
            raise ValueError(f"{quoted(text)} {fault}")


def _is_side(side: Any) -> bool:  # noqa: ANN401
    return type(side) is int and 0 <= side <= MOST_SIDE
