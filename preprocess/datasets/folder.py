"""The catalogue `folder`: any tree of `class/video` files; a file's folder is its class."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from preprocess.datasets.catalogue import Catalogue, CatalogueError, Expected, Video, arrange, text_of, walk
from preprocess.datasets.coverage import covered
from preprocess.datasets.match_lists import listed_catalogue
from shards_spec import Dataset, Split
from shards_spec.errors import suggest
from shards_spec.schema import check_disjoint

EVERY = "all"  # in place of class names: every class that no other split names


def folder_catalogue(
    folder: Path,
    *,
    name: str = "folder",
    classes: Mapping[str, Sequence[str]] | None = None,
    holdout: int = 0,
    splits: Path | None = None,
    group: str | None = None,
    links: bool = False,
) -> Catalogue:
    """Return the catalogue of a `class/video` tree.

    Args:
        folder: Its top.
        name: Name of the data set in results.
        classes: Class names by split; classes that no split names are stored all the same.
        holdout: Number of test classes to choose, where `classes` is None; 0: no splits.
        splits: Folder of lists that name the videos of each split.
        group: Regular expression on file names; its first bracket, else its whole match, is the
            group.
        links: Whether links may lead out of the folder.

    Raises:
        CatalogueError: no videos, videos outside a class folder, unknown classes, too few classes.
        ShardError: two splits share a class, or unreadable lists.
    """
    pattern = _compile(group)
    videos = arrange((_video(path, folder, pattern) for path in walk(folder, links=links)), folder)
    labels = sorted({video.label for video in videos})
    if splits is not None:
        return listed_catalogue(name, videos, splits, labels)
    if classes:
        chosen = choose_classes(classes, labels)
    else:
        held = hold_out(labels, holdout) if holdout else {}
        chosen = {split: Split(tuple(names)) for split, names in held.items()}
    return covered(Dataset(name, tuple(labels), chosen), videos, Expected())


def choose_classes(classes: Mapping[str, Sequence[str]], labels: Sequence[str]) -> dict[str, Split]:
    """Make splits of class names.

    Args:
        classes: Class names by split; `["all"]` stands for every class that no other split names.
        labels: The classes that have videos.

    Raises:
        CatalogueError: a class that no video has, or `all` twice.
        ShardError: two splits share a class.
    """
    rest = [split for split, names in classes.items() if list(names) == [EVERY] and EVERY not in labels]
    if len(rest) > 1:
        raise CatalogueError(
            f'"{EVERY}" stands for all other classes: give it to one split, not to {" and ".join(rest)}'
        )
    named = {split: _known(names, labels, split) for split, names in classes.items() if names and split not in rest}
    taken = {name for names in named.values() for name in names}
    others = {split: [label for label in labels if label not in taken] for split in rest}
    splits = {split: Split(tuple((named | others)[split])) for split in classes if split in named or others.get(split)}
    check_disjoint(splits, "the class lists")
    return splits


def hold_out(labels: Sequence[str], count: int) -> dict[str, Sequence[str]]:
    """Split classes into train and test, by a hash of their names.

    So the choice does not depend on their order, and is the same on every machine.

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
    """Read class names from a comma-separated list, or from a text file with one name a line.

    Raises:
        CatalogueError: the file cannot be read as UTF-8.
    """
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
