"""Read splits: lists that papers publish, and class lists that ship with the project."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from itertools import combinations
from pathlib import Path
from typing import Any

from shards_spec.errors import ShardError, suggest
from shards_spec.splits.lists import NAMES, Entry, Line, SplitName, read_csv, read_json_lists, read_text

__all__ = ["NAMES", "Entry", "Shipped", "class_key", "known_file", "read_lists", "shipped", "shipped_names"]

Lists = dict[SplitName, list[Line]]
NOT_FEW_SHOT = (
    "official lists such as UCF101's trainlist01.txt and HMDB51's 70/30 lists split the videos of the same classes, "
    "where a few-shot split has other classes in each part; take lists of a few-shot paper or one that ships "
    "(fsar-shards splits list)"
)


def read_lists(folder: Path) -> dict[str, tuple[Entry, ...]]:
    """Read the split lists in a folder, or one `.csv` or `.json` file that holds all splits.

    Raises:
        ShardError: no list or several of one split, an unreadable line, a video listed twice, or
            a shared class or video.
    """
    try:
        lists = _settle_labels(_read(folder))
    except OSError as error:
        raise ShardError(f"{folder} cannot be read ({error.strerror})") from error
    for name, lines in lists.items():
        if not lines:
            raise ShardError(f"{folder}: the list of {name} holds no video")
    _check_classes(lists, folder)
    _check_videos(lists)
    return {name: tuple(line.entry for line in lists[name]) for name in NAMES if name in lists}


def class_key(label: str) -> str:
    """Return a class text without case, spaces and underscores, in which lists differ."""
    return "".join(label.replace("_", " ").casefold().split()) or label


def _read(folder: Path) -> Lists:
    if folder.is_file():
        return _read_file(folder, None)
    if not folder.is_dir():
        raise ShardError(f"{folder} is no folder of split lists and no such file is there")
    found = {name: _files_of(folder, name) for name in NAMES}
    for name, paths in found.items():
        if len(paths) > 1:
            official = f"; {NOT_FEW_SHOT}" if (folder / "classInd.txt").exists() else ": keep one"
            raise ShardError(f"{folder} holds several lists of {name} ({', '.join(p.name for p in paths)}){official}")
    if any(found.values()):
        return {name: _read_file(paths[0], name)[name] for name, paths in found.items() if paths}
    return _read_file(_whole_file(folder), None)


def _files_of(folder: Path, name: str) -> list[Path]:
    names = [name, "validate", "validation"] if name == "val" else [name]
    exact = [f"{name}_few_shot.txt", *(f"{n}.{ending}" for n in names for ending in ("csv", "json"))]
    paths = [*(folder / file for file in exact), *sorted(folder.glob(f"{name}list*.txt"))]
    return [path for path in paths if path.is_file()]


def _whole_file(folder: Path) -> Path:
    if any(folder.glob("*_test_split[123].txt")):
        raise ShardError(f"{folder} holds HMDB51's official lists: {NOT_FEW_SHOT}")
    paths = sorted(path for ending in ("csv", "json") for path in folder.glob(f"*.{ending}") if path.is_file())
    if not paths or (folder / "dataset.json").exists():
        raise ShardError(
            f"{folder} holds no split lists: none of {{train,val,test}}_few_shot.txt, {{train,val,test}}list*.txt, "
            "{train,val,test}.csv or .json, and no single .csv or .json with all splits"
        )
    if len(paths) > 1:
        raise ShardError(f"{folder} holds several tables ({', '.join(p.name for p in paths)}): keep one")
    return paths[0]


def _read_file(path: Path, split: SplitName | None) -> Lists:
    ending = path.suffix.lower()
    if ending == ".csv":
        lists = read_csv(path, split)
    elif ending == ".json":
        lists = read_json_lists(path, split)
    elif split:
        lists = {split: read_text(path, split)}
    else:
        raise ShardError(f"{path} is one file: expected a .csv or .json with all splits, or a folder of lists")
    if not lists:
        raise ShardError(f"{path} lists no video")
    return lists


def _settle_labels(lists: Lists) -> Lists:
    """Drop the folder as the class where it is not one.

    `train32//clips_256/x.mp4` has one folder for many class numbers.
    """
    pairs = {
        name: {
            (line.entry.number, class_key(line.entry.label or "")) for line in lines if line.entry.number is not None
        }
        for name, lines in lists.items()
    }
    folders = {label for found in pairs.values() for _, label in found}
    one_to_one = all(len({p[i] for p in found}) == len(found) for found in pairs.values() for i in (0, 1))
    if one_to_one and (len(folders) > 1 or len(lists) == 1):
        return lists
    return {name: [_without_folder(line) for line in lines] for name, lines in lists.items()}


def _without_folder(line: Line) -> Line:
    entry = line.entry
    kept = entry.number is None or entry.label is None
    return line if kept else Line(Entry(entry.path, None, entry.number), line.where)


def _check_classes(lists: Lists, folder: Path) -> None:
    """Refuse splits that share a class; class numbers restart in each split, so names decide."""
    for a, b in combinations(lists, 2):
        ours, theirs = ({class_key(ln.entry.label): ln for ln in lists[n] if ln.entry.label} for n in (a, b))
        for key in sorted(ours.keys() & theirs.keys())[:1]:
            raise ShardError(
                f"{folder}: {len(ours.keys() & theirs.keys())} classes stand in both {a} and {b}, such as "
                f'"{ours[key].entry.label}" ({ours[key].where}; {theirs[key].where}): {NOT_FEW_SHOT}'
            )


def _check_videos(lists: Lists) -> None:
    """Refuse a video that is listed twice, by its stem within its class.

    Where a list has no classes, a stem may stand there once.
    """
    named = all(line.entry.label for lines in lists.values() for line in lines)
    listed: dict[tuple[str, str], str] = {}
    for name, lines in lists.items():
        for line in lines:
            key = (class_key(line.entry.label or "") if named else "", line.entry.stem)
            if key in listed:
                raise ShardError(
                    f'{line.where}: "{line.entry.stem}" of {name} stands in {listed[key]} already; '
                    "list a video once, in one split"
                )
            listed[key] = line.where


@dataclass(frozen=True)
class Shipped:
    """A class split that ships with the project.

    Attributes:
        name: Its name in options.
        dataset: The data set it splits.
        source: Its publication.
        splits: Class names of each split.
        videos: Known number of videos of each split.
    """

    name: str
    dataset: str
    source: str
    splits: dict[str, tuple[str, ...]]
    videos: dict[str, int]

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names of all splits, sorted."""
        return tuple(sorted(label for labels in self.splits.values() for label in labels))


def shipped_names() -> list[str]:
    """Return the names of the class splits that ship."""
    files = (entry.name for entry in resources.files("shards_spec").joinpath("known_splits").iterdir())
    return sorted(name.removesuffix(".json") for name in files if name.endswith(".json") and name != "published.json")


def shipped(name: str) -> Shipped:
    """Return the class split of this name.

    Raises:
        ShardError: no split of this name ships.
    """
    if name not in (known := shipped_names()):
        raise ShardError(f'no split "{name}" ships; {suggest(name, known)}')
    raw = known_file(name)
    splits: dict[str, tuple[str, ...]] = {split: tuple(raw[split]) for split in NAMES}
    return Shipped(name, raw["dataset"], raw["source"], splits, raw["videos"])


def known_file(name: str) -> dict[str, Any]:
    """Read a JSON file of `known_splits`."""
    text = resources.files("shards_spec").joinpath("known_splits", f"{name}.json").read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    return content
