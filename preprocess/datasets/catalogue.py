"""List the videos of a data set: their names, labels, groups and files, in one fixed order."""

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
from shards_spec.splits.lists import VIDEO_EXTENSIONS, is_video_name


class CatalogueError(FsarError):
    """Videos that cannot be found, named or told apart."""


@dataclass(frozen=True)
class Video:
    """One video file of a data set.

    Attributes:
        name: Path below the videos folder, with `/`; splits and results call the video by it.
        label: Name of its class.
        group: Name of the source video, scene or sitting that it shares with others; None where
            not known.
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
    """The content that a data set is known to have, found or not; empty where nothing is known.

    Attributes:
        splits: Number of videos of each split.
        classes: Number of videos of each class, where lists name them.
        missing: The listed videos that were not found, in the order of the lists.
    """

    splits: dict[str, int] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)
    missing: tuple[Missing, ...] = ()


@dataclass(frozen=True)
class Catalogue:
    """The videos of a data set in catalogue order, its classes and splits, and those expected."""

    dataset: Dataset
    videos: list[Video]
    expected: Expected = field(default_factory=Expected)

    def sha256(self, rows: int) -> str:
        """Hash names, labels and groups of the first `rows` videos, not their files."""
        digest = hashlib.sha256()
        for video in self.videos[:rows]:
            digest.update(json_line([video.name, video.label, video.group]) + b"\n")
        return digest.hexdigest()


def shorten(names: Sequence[str], most: int = 5) -> str:
    """Join the first few names, and say how many more there are."""
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def require_folder(folder: Path, dataset: str, tree: str) -> None:
    """Check that a place is a folder; places at URLs are not looked at.

    Args:
        folder: The place.
        dataset: Name of the data set, for the message.
        tree: Text that shows the expected tree, for the message.

    Raises:
        CatalogueError: it is no folder.
    """
    if not isinstance(folder, RemotePath) and not folder.is_dir():
        raise CatalogueError(f"{folder} is no folder; put {dataset} there or name its folder with --videos\n{tree}")


def walk(folder: Path, *, links: bool = False) -> Iterator[Path]:
    """Yield every video file below `folder`, and folders that are named like a video.

    A folder named like a video is yielded so that it counts as a failed video, not as absent.
    Hidden files and folders are left out: some systems leave `._name.avi` next to `name.avi` in
    archives. Links are followed, but no folder is entered twice.

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
    root, entered = os.path.realpath(folder), set[str]()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in entered:  # a link that leads back
            folders.clear()
            continue
        entered.add(real)
        if not links:
            _refuse_outside(place, real, root)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        named = [name for name in folders if is_video_name(name)]
        folders[:] = [name for name in folders if name not in named]
        top = Path(place)
        for name in [*named, *files]:
            if name[0] != "." and is_video_name(name):
                path = top / name
                if not links and os.path.islink(path):  # noqa: PTH114 -- a data set has 220,000 files
                    _refuse_outside(str(path), os.path.realpath(path), root)
                yield path


def _refuse_outside(place: str, real: str, root: str) -> None:
    """Refuse a path outside of the folder.

    A link in a foreign archive could name any file of this machine.
    """
    if real != root and not real.startswith(root.rstrip("/") + "/"):
        raise CatalogueError(
            f"{place} is a link that leads out of the folder of videos; replace it by what it names, or take what "
            "links lead to with --follow-links"
        )


def _walk_remote(folder: RemotePath) -> Iterator[Path]:
    for name in Remote(str(folder)).sizes():
        parts = name.split("/")
        if is_video_name(parts[-1]) and not any(part.startswith(".") for part in parts):
            if "" in parts:
                raise CatalogueError(f'{folder}: the name "{name}" has an empty part, which no path has; rename it')
            yield folder / name


def text_of(path: Path) -> str:
    """Return a path below the videos folder as text, with `/`; the same under every locale."""
    return os.fsencode(path.as_posix()).decode("utf-8", "surrogateescape")


def arrange(videos: Iterable[Video], folder: Path) -> list[Video]:
    """Sort videos by label and name, and refuse videos that cannot be told apart.

    Raises:
        CatalogueError: there is no video, or a name that no list can hold; or the names of two
            videos of one class differ only in folder or extension.
    """
    ordered = sorted(videos, key=lambda video: (video.label, video.name))
    if not ordered:
        known = ", ".join(sorted(VIDEO_EXTENSIONS))
        raise CatalogueError(f"{folder} holds no video ({known}); expected class/video files")
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
