"""The catalogue `folder`: any tree of `class/video` files, the class being the folder that the file lies in."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from preprocess.catalogue import Catalogue, CatalogueError, Video, arrange, text_of, walk
from shards_spec import Dataset, Split
from shards_spec.errors import suggest
from shards_spec.schema import check_disjoint

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def folder_catalogue(
    folder: Path,
    *,
    name: str = "folder",
    classes: Mapping[str, Sequence[str]] | None = None,
    holdout: int = 0,
    group: str | None = None,
) -> Catalogue:
    """Catalogue of a `class/video` tree.

    Args:
        folder: Its top.
        name: Name of the data set in results.
        classes: Class names by split; classes that no split names are stored all the same.
        holdout: Number of test classes to choose when `classes` is not given.
        group: Regular expression on the file's name whose first bracket (or whole match) is its group.

    Raises:
        CatalogueError: no videos, videos outside a class folder, unknown classes, too few classes.
        ShardError: two splits share a class.
    """
    pattern = _compile(group)
    videos = arrange((_video(path, folder, pattern) for path in walk(folder)), folder)
    labels = sorted({video.label for video in videos})
    if classes:
        splits = {split: _known(names, labels, split) for split, names in classes.items() if names}
    else:
        splits = hold_out(labels, holdout) if holdout else {}
    dataset = Dataset(name, tuple(labels), {split: Split(tuple(names)) for split, names in splits.items()})
    check_disjoint(dataset.splits, "the class lists")
    return Catalogue(dataset, videos)


def hold_out(labels: Sequence[str], count: int) -> dict[str, Sequence[str]]:
    """Split classes into train and test; which are held out depends on their names alone, not on their order.

    Raises:
        CatalogueError: fewer than two classes would be left on either side.
    """
    if not 2 <= count <= len(labels) - 2:
        raise CatalogueError(
            f"--holdout {count}: of {len(labels)} classes at least 2 must be held out and 2 must be left to train on"
        )
    shuffled = sorted(labels, key=lambda label: hashlib.sha256(label.encode("utf-8", "surrogateescape")).digest())
    return {"train": sorted(shuffled[count:]), "test": sorted(shuffled[:count])}


def read_class_list(text: str) -> list[str]:
    """Class names from a comma-separated list, or from a text file with one name a line."""
    try:
        # os.path: Path.is_file raises where a list is longer than a file name may be
        parts = Path(text).read_text(encoding="utf-8").splitlines() if os.path.isfile(text) else text.split(",")  # noqa: PTH113
    except (OSError, UnicodeDecodeError) as error:
        raise CatalogueError(f"{text} cannot be read as a list of class names ({error})") from error
    return list(dict.fromkeys(part.strip() for part in parts if part.strip()))


def _compile(group: str | None) -> re.Pattern[str] | None:
    try:
        return re.compile(group) if group is not None else None
    except re.error as error:
        raise CatalogueError(f'--group "{group}" is no regular expression: {error}') from error


def _video(path: Path, folder: Path, group: re.Pattern[str] | None) -> Video:
    name = text_of(path.relative_to(folder))
    if path.parent == folder:
        raise CatalogueError(
            f"{path} lies in no class folder: expected {folder}/CLASS/{path.name} (the folder's name is the class)"
        )
    *_, label, file = name.split("/")
    match = group.search(file) if group else None
    return Video(name, label, match.group(match.re.groups and 1) if match else None, path)


def _known(names: Sequence[str], labels: Sequence[str], split: str) -> Sequence[str]:
    for name in names:
        if name not in labels:
            raise CatalogueError(f'--{split}-classes: no class "{name}" among the videos; {suggest(name, labels)}')
    return names
