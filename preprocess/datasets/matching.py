"""Published lists of videos, matched with the files that were found."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from preprocess.datasets.catalogue import (
    Catalogue,
    CatalogueError,
    Expected,
    Missing,
    Video,
    arrange,
    shorten,
    text_of,
    walk,
)
from preprocess.datasets.coverage import covered
from shards_spec import Dataset, Split
from shards_spec.schema import check_disjoint
from shards_spec.splits.shipped import Entry, class_key, read_lists, shipped

Lists = Mapping[str, Sequence[Entry]]


@dataclass(frozen=True)
class Line:
    """One line of a list and what was found for it; `label` is None where nothing tells its class."""

    split: str
    entry: Entry
    label: str | None
    video: Video | None


def published_catalogue(
    name: str, videos: Sequence[Video], lists: Path | None, *, short: Callable[[str], str] = str
) -> Catalogue:
    """Catalogue of a data set whose class lists ship with the project; other lists take their place.

    Raises:
        CatalogueError: no listed video was found, or one that may be several.
        ShardError: unreadable lists.
    """
    known = shipped(name)
    classes = tuple(sorted(label for labels in known.splits.values() for label in labels))
    if lists is None:
        splits = {split: Split(labels) for split, labels in known.splits.items()}
        return covered(Dataset(name, classes, splits), videos, Expected(dict(known.videos)))
    return listed_catalogue(name, videos, lists, classes, short=short)


def listed_catalogue(
    name: str, videos: Sequence[Video], lists: Path, classes: Iterable[str], *, short: Callable[[str], str] = str
) -> Catalogue:
    """Catalogue of videos whose classes are known, with the splits that `lists` describes.

    Raises:
        CatalogueError: no listed video was found, or one that may be several.
        ShardError: unreadable lists.
    """
    splits, expected = match_lists(read_lists(lists), videos, classes, short=short)
    labels = {*classes, *(label for split in splits.values() for label in split.classes)}
    return covered(Dataset(name, tuple(sorted(labels)), splits), videos, expected)


def match_lists(
    lists: Lists, videos: Sequence[Video], classes: Iterable[str], *, short: Callable[[str], str] = str
) -> tuple[dict[str, Split], Expected]:
    """Find the video of each listed line by its stem, within the class that the line names where it names one.

    Args:
        lists: Lines by split.
        videos: The videos found.
        classes: Names of the data set's classes, with or without videos.
        short: Shortens a stem to what a list or a file may carry alone; an exact stem goes first.

    Raises:
        CatalogueError: no line that matches a video, or one that matches several.
        ShardError: two splits share a class or a video.
    """
    index = _Index(videos, classes, lists, short)
    lines = [(split, entry) for split, entries in lists.items() for entry in entries]
    found = [index.exact(entry) for _, entry in lines]
    taken = {video.name for video in found if video}
    for n, (_, entry) in enumerate(lines):
        if found[n] is None:
            found[n] = video = index.shortened(entry, taken)
            taken |= {video.name} if video else set()
    labels = _labels_by_list_class(lines, found)
    return settle(
        Line(split, entry, video.label if video else index.label(entry) or labels.get(_list_class(split, entry)), video)
        for (split, entry), video in zip(lines, found, strict=True)
    )


def catalogue_of_lists(
    folder: Path,
    lists: Lists,
    *,
    name: str,
    class_of: Callable[[str, Entry], str],
    group_of: Callable[[str], str | None] = lambda _: None,
    tree: str,
    links: bool = False,
) -> Catalogue:
    """Catalogue of the listed videos alone; their classes come from the lists, their groups from their stems.

    Raises:
        CatalogueError: none of the listed videos is there (with the tree that is expected), or one is there twice.
        ShardError: two splits share a class or a video.
    """
    labels: dict[str, str] = {}
    for split, entries in lists.items():
        for entry in entries:
            label = class_of(split, entry)
            if labels.setdefault(entry.stem, label) != label:
                raise CatalogueError(f'the lists name "{entry.stem}" in two classes ({labels[entry.stem]}, {label})')
    paths = [path for path in walk(folder, links=links) if path.stem in labels]
    if not paths:
        raise CatalogueError(f"{_none_found(len(labels), next(iter(labels)), folder)}\n{tree}")
    videos = arrange(
        (Video(text_of(path.relative_to(folder)), labels[path.stem], group_of(path.stem), path) for path in paths),
        folder,
    )
    by_stem = {video.path.stem: video for video in videos}
    splits, expected = settle(
        Line(split, entry, labels[entry.stem], by_stem.get(entry.stem))
        for split, entries in lists.items()
        for entry in entries
    )
    return covered(Dataset(name, tuple(sorted(set(labels.values()))), splits), videos, expected)


def settle(lines: Iterable[Line]) -> tuple[dict[str, Split], Expected]:
    """The splits that lists describe, and what they expect.

    Raises:
        CatalogueError: nothing that is listed was found.
        ShardError: two splits share a class or a video.
    """
    by_split: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        by_split[line.split].append(line)
    every = [line for split in by_split.values() for line in split]
    if not any(line.video for line in every):
        raise CatalogueError(_none_found(len(every), every[0].entry.stem, "--videos"))
    splits = {name: _split(own) for name, own in by_split.items()}
    check_disjoint(splits, "the lists of --splits")
    missing = tuple(
        Missing(line.split, line.label or line.entry.label or "?", line.entry.stem) for line in every if not line.video
    )
    sizes = {name: len(own) for name, own in by_split.items()}
    return splits, Expected(sizes, dict(Counter(line.label for line in every if line.label is not None)), missing)


def numbered_class(split: str, entry: Entry) -> str:
    """Name of a class that a list gives a number only: `train07`; numbers start again in each split."""
    return split if entry.number is None else f"{split}{entry.number:02d}"


def _split(lines: list[Line]) -> Split:
    labels = {line.label for line in lines if line.label is not None}
    return Split(tuple(sorted(labels)), tuple(sorted({line.video.name for line in lines if line.video})))


def _list_class(split: str, entry: Entry) -> tuple[str, str | int | None]:
    return split, entry.label if entry.number is None else entry.number


def _labels_by_list_class(
    lines: list[tuple[str, Entry]], found: list[Video | None]
) -> dict[tuple[str, str | int | None], str]:
    """What the classes of the lists are called, as far as all videos found of one agree."""
    labels: dict[tuple[str, str | int | None], set[str]] = defaultdict(set)
    for (split, entry), video in zip(lines, found, strict=True):
        if video:
            labels[_list_class(split, entry)].add(video.label)
    return {key: next(iter(names)) for key, names in labels.items() if len(names) == 1}


def _none_found(count: int, example: str, where: Path | str) -> str:
    return (
        f'none of the {count:,} listed videos (such as "{example}") was found; is {where} the folder of these videos?'
    )


class _Index:
    """The videos by stem, and which of them a line may mean."""

    def __init__(
        self, videos: Sequence[Video], classes: Iterable[str], lists: Lists, short: Callable[[str], str]
    ) -> None:
        self.short = short
        self.by_stem: dict[str, list[Video]] = defaultdict(list)
        self.by_short: dict[str, list[Video]] = defaultdict(list)
        for video in videos:
            self.by_stem[video.path.stem].append(video)
            self.by_short[short(video.path.stem)].append(video)
        self.classes = {class_key(name): name for name in classes}
        texts = {entry.label for entries in lists.values() for entry in entries if entry.label is not None}
        # A folder in a list's path may be no class at all; texts of which none is known tell nothing.
        self.named = any(class_key(text) in self.classes for text in texts)

    def label(self, entry: Entry) -> str | None:
        """The class that a line names; None where it names none."""
        if not self.named or entry.label is None:
            return None
        return self.classes.get(class_key(entry.label), entry.label)

    def exact(self, entry: Entry) -> Video | None:
        return next(self._of_class(self.by_stem.get(entry.stem, []), entry), None)

    def shortened(self, entry: Entry, taken: set[str]) -> Video | None:
        videos = self.by_short.get(entry.stem) or self.by_stem.get(self.short(entry.stem)) or []
        return next((video for video in self._of_class(videos, entry) if video.name not in taken), None)

    def _of_class(self, videos: Sequence[Video], entry: Entry) -> Iterator[Video]:
        label = self.label(entry)
        if label is not None:
            return (video for video in videos if video.label == label)
        labels = {video.label for video in videos}
        if len(labels) > 1:
            raise CatalogueError(
                f'the lists name "{entry.stem}" without a class, and several classes have a video of that name '
                f"({shorten([video.name for video in videos])}): rename the videos, or name the classes in the lists"
            )
        return iter(videos)
