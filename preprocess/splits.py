"""Splits of the field: class lists that ship with the project, and the video lists that papers publish."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from preprocess.catalogue import CatalogueError
from shards_spec import Split
from shards_spec.schema import check_disjoint

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from preprocess.catalogue import Video

NAMES = ("train", "val", "test")
# `train12//videos/Class/clip.avi` (MoLo, HyRSM, CLIP-FSAR): split, class number within it, path
NUMBERED = re.compile(r"(?:train|val|test)\d+/{1,2}(?P<path>.+)")


def class_splits(dataset: str) -> dict[str, Split]:
    """The class lists of a data set that ship with the project."""
    text = resources.files("preprocess").joinpath("splits", f"{dataset}.json").read_text(encoding="utf-8")
    lists = json.loads(text)
    return {name: Split(tuple(lists[name])) for name in NAMES}


def read_splits(folder: Path, videos: Sequence[Video]) -> tuple[dict[str, Split], list[str]]:
    """Read `{train,val,test}_few_shot.txt` or `{train,val,test}list*.txt` and match their lines to videos by stem.

    Returns:
        The splits, and the listed names that match no video.

    Raises:
        CatalogueError: no list in the folder, an unreadable line, or no line that matches a video.
        ShardError: two splits share a class or a video.
    """
    by_stem = {video.path.stem: video for video in videos}
    splits: dict[str, Split] = {}
    unmatched: list[str] = []
    for name in NAMES:
        path = _find(folder, name)
        if path is None:
            continue
        stems = [_stem(line, path) for line in _lines(path)]
        found = [by_stem[stem] for stem in stems if stem in by_stem]
        unmatched += [stem for stem in stems if stem not in by_stem]
        labels = tuple(sorted({video.label for video in found}))
        splits[name] = Split(labels, tuple(sorted(video.name for video in found)))
    if not splits:
        raise CatalogueError(f"{folder} holds none of {{train,val,test}}_few_shot.txt or {{train,val,test}}list03.txt")
    if not any(split.videos for split in splits.values()):
        raise CatalogueError(f"{folder}: none of the {len(unmatched)} listed videos is among those of --videos")
    check_disjoint(splits, folder)
    return splits, unmatched


def _find(folder: Path, name: str) -> Path | None:
    candidates = [folder / f"{name}_few_shot.txt", *sorted(folder.glob(f"{name}list*.txt"))]
    found = [path for path in candidates if path.is_file()]
    if len(found) > 1:
        raise CatalogueError(f"{folder} holds several lists of {name} ({', '.join(p.name for p in found)}): keep one")
    return found[0] if found else None


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise CatalogueError(f"{path} is no text file in UTF-8 ({error})") from error
    return [line.strip() for line in lines if line.strip()]


def _stem(line: str, path: Path) -> str:
    """The stem that a line names: `Class/stem`, `Class/stem.avi 17` (UCF101's own lists), `train0//path/stem.avi`."""
    line = re.sub(r"(\.\w+)\s+\d+$", r"\1", line)
    match = NUMBERED.fullmatch(line)
    listed = PurePosixPath(match["path"] if match else line)
    if not match and len(listed.parts) < 2:
        raise CatalogueError(f'{path}: cannot read the line "{line}"; expected Class/stem or train0//path/of/video')
    return listed.name.rsplit(".", 1)[0] if listed.suffix.lower() in {".avi", ".mp4", ".webm", ".mkv"} else listed.name
