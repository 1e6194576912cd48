"""Match published lists of videos with the files that were found."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from shards_spec.splits.stems import StemIndex

Lists = Mapping[str, Sequence[Entry]]
ListClass = tuple[str, str | int | None]  # split, and the class as its list writes it


@dataclass(frozen=True)
class Line:
    """One line of a list, its class (None: not known), and the video found for it (None: none)."""

    split: str
    entry: Entry
    label: str | None
    video: Video | None


def published_catalogue(
    name: str, videos: Sequence[Video], lists: Path | None, *, short: Callable[[str], str] = str
) -> Catalogue:
    """Return the catalogue of a data set whose class lists ship with the project.

    Args:
        name: Name of the data set and of its class lists.
        videos: The videos found.
        lists: Other lists, which take the place of those that ship.
        short: As in `match_lists`.

    Raises:
        CatalogueError: no listed video was found, or a line may mean several.
        ShardError: unreadable lists.
    """
    known = shipped(name)
    if lists is not None:
        return listed_catalogue(name, videos, lists, known.classes, short=short)
    splits = {split: Split(labels) for split, labels in known.splits.items()}
    return covered(Dataset(name, known.classes, splits), videos, Expected(dict(known.videos)))


def listed_catalogue(
    name: str, videos: Sequence[Video], lists: Path, classes: Iterable[str], *, short: Callable[[str], str] = str
) -> Catalogue:
    """Return the catalogue of videos whose classes are known, with the splits of `lists`.

    Raises:
        CatalogueError: no listed video was found, or a line may mean several.
        ShardError: unreadable lists.
    """
    splits, expected = match_lists(read_lists(lists), videos, classes, short=short)
    labels = {*classes, *(label for split in splits.values() for label in split.classes)}
    return covered(Dataset(name, tuple(sorted(labels)), splits), videos, expected)


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
    """Return the catalogue of the listed videos only, where files do not tell their classes.

    Args:
        folder: Top of the videos.
        lists: Lines by split.
        name: Name of the data set.
        class_of: Class of a line, from its split and its entry.
        group_of: Group of a video, from its stem.
        tree: Text that shows the expected tree.
        links: Whether links may lead out of the folder.

    Raises:
        CatalogueError: no listed video is there, or one is there twice.
        ShardError: two splits share a class or a video.
    """
    # From here on the lists name the classes themselves, as other lists do.
    named = {
        split: [Entry(entry.path, class_of(split, entry), None) for entry in entries]
        for split, entries in lists.items()
    }
    labels = _labels_by_stem(named)
    paths = [path for path in walk(folder, links=links) if path.stem in labels]
    if not paths:
        raise CatalogueError(f"{_none_found(len(labels), next(iter(labels)), folder)}\n{tree}")
    videos = arrange(
        (Video(text_of(path.relative_to(folder)), labels[path.stem], group_of(path.stem), path) for path in paths),
        folder,
    )
    classes = tuple(sorted(set(labels.values())))
    splits, expected = match_lists(named, videos, classes)
    return covered(Dataset(name, classes, splits), videos, expected)


def match_lists(
    lists: Lists, videos: Sequence[Video], classes: Iterable[str], *, short: Callable[[str], str] = str
) -> tuple[dict[str, Split], Expected]:
    """Find the video of each listed line by its stem, within the class that the line names.

    Args:
        lists: Lines by split.
        videos: The videos found.
        classes: Names of the data set's classes, with or without videos.
        short: Shortens a stem to the part that a list or a file may use without the rest. Lines
            that find an exact stem are served before those that need it.

    Returns:
        The splits that the lists describe, and the videos and classes that they name.

    Raises:
        CatalogueError: no line found a video, or a line may mean several.
        ShardError: two splits share a class or a video.
    """
    finder = _Finder(videos, classes, lists, short)
    lines = [(split, entry) for split, entries in lists.items() for entry in entries]
    # Two rounds: a bare name must not take the file that a later line names exactly.
    found = [finder.exact(entry) for _, entry in lines]
    taken = {video.name for video in found if video}
    for n, (_, entry) in enumerate(lines):
        if found[n] is None:
            found[n] = video = finder.shortened(entry, taken)
            taken |= {video.name} if video else set()
    labels = _labels_by_list_class(lines, found)
    settled: list[Line] = []
    for (split, entry), video in zip(lines, found, strict=True):
        label = video.label if video else finder.label(entry) or labels.get(list_class(split, entry))
        settled.append(Line(split, entry, label, video))
    return _settle(settled)


def list_class(split: str, entry: Entry) -> ListClass:
    """Return the class of a line as its list writes it; numbers start again in each split."""
    return split, entry.label if entry.number is None else entry.number


def numbered_class(split: str, entry: Entry) -> str:
    """Name a class of which a list gives only a number: `train07`."""
    return split if entry.number is None else f"{split}{entry.number:02d}"


def _labels_by_stem(lists: Lists) -> dict[str, str]:
    """Return the class of each listed stem.

    Raises:
        CatalogueError: a stem is in two classes.
    """
    labels: dict[str, str] = {}
    for entry in (entry for entries in lists.values() for entry in entries):
        label = entry.label or ""
        if labels.setdefault(entry.stem, label) != label:
            raise CatalogueError(f'the lists name "{entry.stem}" in two classes ({labels[entry.stem]}, {label})')
    return labels


def _labels_by_list_class(lines: list[tuple[str, Entry]], found: list[Video | None]) -> dict[ListClass, str]:
    """Return the name of each class of the lists whose found videos agree on it."""
    labels: dict[ListClass, set[str]] = defaultdict(set)
    for (split, entry), video in zip(lines, found, strict=True):
        if video:
            labels[list_class(split, entry)].add(video.label)
    return {key: next(iter(names)) for key, names in labels.items() if len(names) == 1}


def _settle(lines: Sequence[Line]) -> tuple[dict[str, Split], Expected]:
    """Return the splits that lines and their videos describe, and what they expect of the data set.

    Raises:
        CatalogueError: no line found a video.
        ShardError: two splits share a class or a video.
    """
    by_split: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        by_split[line.split].append(line)
    if not any(line.video for line in lines):
        raise CatalogueError(_none_found(len(lines), lines[0].entry.stem, "--videos"))
    splits = {name: _split(own) for name, own in by_split.items()}
    check_disjoint(splits, "the lists of --splits")
    missing = tuple(
        Missing(line.split, line.label or line.entry.label or "?", line.entry.stem) for line in lines if not line.video
    )
    sizes = {name: len(own) for name, own in by_split.items()}
    return splits, Expected(sizes, dict(Counter(line.label for line in lines if line.label is not None)), missing)


def _split(lines: list[Line]) -> Split:
    labels = {line.label for line in lines if line.label is not None}
    return Split(tuple(sorted(labels)), tuple(sorted({line.video.name for line in lines if line.video})))


def _none_found(count: int, example: str, where: Path | str) -> str:
    return (
        f'none of the {count:,} listed videos (such as "{example}") was found; is {where} the folder of these videos?'
    )


class _Finder:
    """Finds the video that a line means."""

    def __init__(
        self, videos: Sequence[Video], classes: Iterable[str], lists: Lists, short: Callable[[str], str]
    ) -> None:
        self._videos, self._short = videos, short
        self._by_stem = StemIndex((video.path.stem, video.label) for video in videos)
        self._by_short = StemIndex((short(video.path.stem), video.label) for video in videos)
        self._names = set(classes)
        self._by_key = {class_key(name): name for name in sorted(self._names)}
        texts = {entry.label for entries in lists.values() for entry in entries if entry.label is not None}
        # The folder in a list's path may be no class at all, such as `clips_256`. If no folder
        # is a known class, all of them are taken for such.
        self._named = any(class_key(text) in self._by_key for text in texts)

    def label(self, entry: Entry) -> str | None:
        """Return the class that a line names, spelled as ours; None where it names none."""
        if not self._named or entry.label is None:
            return None
        return entry.label if entry.label in self._names else self._by_key.get(class_key(entry.label), entry.label)

    def exact(self, entry: Entry) -> Video | None:
        """Return the video with exactly the stem of a line."""
        return next(iter(self._of_one_class(self._by_stem.find(entry.stem, self.label(entry)), entry)), None)

    def shortened(self, entry: Entry, taken: set[str]) -> Video | None:
        """Return a video whose stem is that of a line when one of the two is shortened.

        Args:
            entry: The line.
            taken: Names of videos that other lines found.
        """
        label = self.label(entry)
        found = self._by_short.find(entry.stem, label) or self._by_stem.find(self._short(entry.stem), label)
        return next((video for video in self._of_one_class(found, entry) if video.name not in taken), None)

    def _of_one_class(self, positions: Sequence[int], entry: Entry) -> list[Video]:
        """Return the videos at some positions.

        Raises:
            CatalogueError: the line names no class, and they are of several.
        """
        videos = [self._videos[position] for position in positions]
        if len({video.label for video in videos}) > 1:
            raise CatalogueError(
                f'the lists name "{entry.stem}" without a class, and several classes have a video of that name '
                f"({shorten([video.name for video in videos])}): rename the videos, or name the classes in the lists"
            )
        return videos
