"""Which videos a data set has: their names, labels, groups and files, in one fixed order."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shards_spec import Dataset
from shards_spec.errors import FsarError
from shards_spec.files import json_line
from shards_spec.remote.store import Remote, RemotePath
from shards_spec.schema import path_fault, quoted, text_fault

EXTENSIONS = frozenset(
    ".avi .mp4 .m4v .mov .mkv .webm .mpg .mpeg .ts .wmv .asf .flv .3gp".split()  # noqa: SIM905 -- a list reads longer
)


class CatalogueError(FsarError):
    """Videos that cannot be found, named or told apart."""


@dataclass(frozen=True)
class Video:
    """One video file of a data set.

    Attributes:
        name: Path below the videos folder, with `/`: the name that leaves the shard set in splits and results.
        label: Name of its class.
        group: Name of what it shares with others (source video, scene, sitting); None where not known.
        path: The file.
    """

    name: str
    label: str
    group: str | None
    path: Path = field(compare=False)


@dataclass(frozen=True)
class Missing:
    """A video that a list names and no file has."""

    split: str
    label: str
    name: str


@dataclass(frozen=True)
class Expected:
    """What a data set is known to have, whatever was found of it; empty where nothing is known.

    Attributes:
        splits: Number of videos a split.
        classes: Number of videos a class, where lists name them.
        missing: The listed videos that were not found, in the order of the lists.
    """

    splits: dict[str, int] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)
    missing: tuple[Missing, ...] = ()


@dataclass(frozen=True)
class Catalogue:
    """The videos of a data set in catalogue order, its classes and splits, and what there should be."""

    dataset: Dataset
    videos: list[Video]
    expected: Expected = field(default_factory=Expected)

    def sha256(self, rows: int) -> str:
        """Hash of the first `rows` videos: names, labels and groups, never files or their place."""
        digest = hashlib.sha256()
        for video in self.videos[:rows]:
            digest.update(json_line([video.name, video.label, video.group]) + b"\n")
        return digest.hexdigest()


def shorten(names: Sequence[str], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def require_folder(folder: Path, dataset: str, tree: str) -> None:
    """Refuse a place that is no folder, and show the tree that is expected there.

    Raises:
        CatalogueError: it is none.
    """
    if not isinstance(folder, RemotePath) and not folder.is_dir():
        raise CatalogueError(f"{folder} is no folder; put {dataset} there or name its folder with --videos\n{tree}")


def walk(folder: Path, *, links: bool = False) -> Iterator[Path]:
    """Every video file below `folder`, links followed once, and folders that are named like a video.

    Hidden files and folders are passed over: `._name.avi` beside `name.avi` is what some systems leave in archives.

    Args:
        folder: The top.
        links: Whether links may lead out of it.

    Raises:
        CatalogueError: the folder is missing or no folder, or a link leads out of it.
        RemoteError: it is at a URL, and the place refuses us or does not answer.
    """
    if isinstance(folder, RemotePath):
        yield from _walk_remote(folder)
        return
    if not folder.is_dir():
        raise CatalogueError(f"{folder} is no folder; name the folder of your videos with --videos")
    root, seen = os.path.realpath(folder), set[str]()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        if not links:
            _refuse_outside(place, real, root)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        named = [name for name in folders if _is_video(name)]
        folders[:] = [name for name in folders if name not in named]
        top = Path(place)
        for name in [*named, *files]:
            if name[0] != "." and _is_video(name):
                path = top / name
                if not links and os.path.islink(path):  # noqa: PTH114 -- a data set has 220,000 files
                    _refuse_outside(str(path), os.path.realpath(path), root)
                yield path


def _refuse_outside(place: str, real: str, root: str) -> None:
    """Refuse what a link takes from outside: a foreign archive could have it read any file of this machine."""
    if real != root and not real.startswith(root.rstrip("/") + "/"):
        raise CatalogueError(
            f"{place} is a link that leads out of the folder of videos; replace it by what it names, or take what "
            "links lead to with --follow-links"
        )


def _walk_remote(folder: RemotePath) -> Iterator[Path]:
    for name in Remote(str(folder)).sizes():
        parts = name.split("/")
        if _is_video(name) and not any(part.startswith(".") for part in parts):
            if "" in parts:
                raise CatalogueError(f'{folder}: the name "{name}" has an empty part, which no path has; rename it')
            yield folder / name


def _is_video(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS  # noqa: PTH122 -- a data set has 220,000 files


def text_of(path: Path) -> str:
    """A path below the videos folder as the same text under every locale: UTF-8, with `/`."""
    return os.fsencode(path.as_posix()).decode("utf-8", "surrogateescape")


def arrange(videos: Iterable[Video], folder: Path) -> list[Video]:
    """Sort videos by label and name, and refuse what cannot be told apart.

    Raises:
        CatalogueError: no video at all, two of one class whose names differ in folder or extension only, or a name
            that no list can hold.
    """
    ordered = sorted(videos, key=lambda video: (video.label, video.name))
    if not ordered:
        raise CatalogueError(f"{folder} holds no video ({', '.join(sorted(EXTENSIONS))}); expected class/video files")
    stems: dict[tuple[str, str], list[str]] = defaultdict(list)
    for video in ordered:
        fault = path_fault(video.name) or text_fault(video.label) or text_fault(video.group or "")
        if fault:
            raise CatalogueError(f"{folder}: the name {quoted(video.name)} or its class {fault}; rename it")
        stems[video.label, video.path.stem].append(video.name)
    for (label, stem), names in stems.items():
        if len(names) > 1:
            raise CatalogueError(
                f'{folder}: class "{label}" has {len(names)} videos of the name "{stem}" ({shorten(names)}); '
                "if they are one video keep one, else rename one"
            )
    return ordered
