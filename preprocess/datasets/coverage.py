"""Report how much of a data set was found, by class and split; refuse one that lacks too much."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from preprocess.datasets.catalogue import Catalogue, CatalogueError, Expected, Video, shorten
from shards_spec import Dataset, Split

MIN_COVERAGE = 0.95
LONGEST_TABLE = 30  # classes; of more, only those that lack videos have a line
MOST_NAMES = 10


def covered(dataset: Dataset, videos: Sequence[Video], expected: Expected) -> Catalogue:
    """Return a catalogue whose data set says how many of the expected videos it has."""
    catalogue = Catalogue(dataset, list(videos), expected)
    counts = Counter(video.label for video in videos)
    found = {name: _found(split, counts) for name, split in dataset.splits.items()}
    coverage = {name: (found[name], expected.splits[name]) for name in found if name in expected.splits}
    return replace(catalogue, dataset=replace(dataset, coverage=coverage))


def share(catalogue: Catalogue) -> float:
    """Return the share of the expected videos that are there; 1 where nothing is expected.

    A split with more videos than expected does not make up for another split.
    """
    pairs = catalogue.dataset.coverage.values()
    expected = sum(pair[1] for pair in pairs)
    return sum(min(pair) for pair in pairs) / expected if expected else 1.0


def report(catalogue: Catalogue, threshold: float = MIN_COVERAGE) -> Iterator[str]:
    """Yield lines of text: the number of videos of each class and split, found and expected."""
    dataset, found = catalogue.dataset, found_by_class(catalogue)
    present = len({video.label for video in catalogue.videos})
    yield f"{dataset.name}: {len(catalogue.videos):,} videos in {present} of {len(dataset.classes)} classes"
    yield from _class_table(catalogue, found, threshold)
    for name, split in dataset.splits.items():
        yield f"  split {name}: {_split_line(split, found, dataset.coverage.get(name))}"
    listed = listed_names(dataset)
    if listed and len(listed) < len(catalogue.videos):
        yield f"  in no list: {len(catalogue.videos) - len(listed):,} videos (they are stored, but belong to no split)"
    if catalogue.expected.missing:
        names = [f"{video.label}/{video.name}" for video in catalogue.expected.missing]
        yield f"  listed but not found: {len(names):,} videos ({shorten(names)})"
    if dataset.coverage:
        yield f"coverage: {_total(catalogue)}"


def lacking(catalogue: Catalogue, threshold: float) -> str | None:
    """Return one sentence about a data set of which too little was found; None where enough was."""
    if share(catalogue) >= threshold:
        return None
    return (
        f"{catalogue.dataset.name} is not complete: {_total(catalogue)}, less than --min-coverage {threshold:g}; "
        f"{_lowest(catalogue)}"
    )


def check_coverage(catalogue: Catalogue, threshold: float) -> None:
    """Refuse a data set of which too little was found.

    Raises:
        CatalogueError: too little was found; the message names the classes with the smallest share.
    """
    sentence = lacking(catalogue, threshold)
    if sentence:
        raise CatalogueError(f"{sentence}; add the missing videos, or go on without them with --allow-missing")


def write_missing(catalogue: Catalogue, path: Path) -> None:
    """Write the videos that are listed but were not found: split, class and name, a video a line.

    Raises:
        CatalogueError: the file cannot be written.
    """
    lines = [f"{video.split}\t{video.label}\t{video.name}\n" for video in catalogue.expected.missing]
    try:
        path.write_text("".join(lines), encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise CatalogueError(f"--unmatched {path} cannot be written ({error.strerror})") from error


def listed_names(dataset: Dataset) -> set[str]:
    """Return the names of the videos that the splits list."""
    return {name for split in dataset.splits.values() for name in split.videos or ()}


def found_by_class(catalogue: Catalogue) -> Counter[str]:
    """Count the videos of each class; only the listed ones where lists name the videos."""
    splits = catalogue.dataset.splits.values()
    listed = listed_names(catalogue.dataset)
    bound = {label for split in splits if split.videos is not None for label in split.classes}
    return Counter(video.label for video in catalogue.videos if video.label not in bound or video.name in listed)


def empty_classes(catalogue: Catalogue) -> list[str]:
    """Return the classes of the splits that have no video: no episode can be drawn from them."""
    found = found_by_class(catalogue)
    return sorted({name for split in catalogue.dataset.splits.values() for name in split.classes if not found[name]})


def _found(split: Split, counts: Counter[str]) -> int:
    return len(split.videos) if split.videos is not None else sum(counts[name] for name in split.classes)


def _class_table(catalogue: Catalogue, found: Counter[str], threshold: float) -> Iterator[str]:
    """Yield a line a class; in a long table a class that lacks nothing has no line of its own."""
    classes, expected = catalogue.dataset.classes, catalogue.expected.classes
    low = [name for name in classes if name in expected and found[name] < threshold * expected[name]]
    known = [name for name in classes if name in expected or found[name]]
    short = len(known) <= LONGEST_TABLE
    shown = known if short else low
    width = max(map(len, shown), default=0)
    for name in shown:
        of = f" of {expected[name]:6,}" if name in expected else ""
        yield f"  {name:{width}} {found[name]:7,}{of}"
    rest = [] if short else sorted(found[name] for name in set(known) - set(low))
    if rest:
        sizes = f"{rest[0]:,}" if rest[0] == rest[-1] else f"{rest[0]:,} to {rest[-1]:,}"
        yield f"  {'the other ' if low else ''}{len(rest)} classes: {sizes} videos each"


def _split_line(split: Split, found: Counter[str], pair: tuple[int, int] | None) -> str:
    empty = [name for name in split.classes if not found[name]]
    text = f"{len(split.classes) - len(empty)} of {len(split.classes)} classes, "
    if pair is None:
        text += f"{_found(split, found):,} videos"
    else:
        text += f"{pair[0]:,} of {pair[1]:,} videos ({_percent(*pair)})"
        text += "; published lists name fewer: --splits keeps to them" if pair[0] > pair[1] else ""
    if empty:
        text += f"; without a video: {shorten(empty, MOST_NAMES)}"
    return text


def _total(catalogue: Catalogue) -> str:
    pairs = catalogue.dataset.coverage.values()
    found, expected = sum(min(pair) for pair in pairs), sum(pair[1] for pair in pairs)
    return f"{found:,} of {expected:,} expected videos ({_percent(found, expected)})"


def _percent(found: int, expected: int) -> str:
    """Return the share in percent, rounded down, so that 100% means all."""
    return f"{1000 * found // expected / 10 if expected else 100:.1f}%"


def _lowest(catalogue: Catalogue) -> str:
    """Name the classes of the splits without a video, else those with the smallest share."""
    found, expected = found_by_class(catalogue), catalogue.expected.classes
    empty = empty_classes(catalogue)
    if empty:
        return f"{len(empty)} class{'es have' if len(empty) > 1 else ' has'} no video at all ({shorten(empty)})"
    classes = {label for split in catalogue.dataset.splits.values() for label in split.classes}
    lowest = sorted(classes, key=lambda name: (found[name] / expected.get(name, 1), name))[:MOST_NAMES]
    texts = [f"{name} {found[name]:,}" + (f" of {expected[name]:,}" if name in expected else "") for name in lowest]
    return f"lowest: {', '.join(texts)}"
