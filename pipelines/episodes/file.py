"""Read and write files of episodes: the videos of each by name, for others to run exactly these."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.episodes.stream import Chosen, EpisodeStream
from shards_spec import ShardSet
from shards_spec.errors import ShardError
from shards_spec.files import json_line, parse_json, write_whole

# Keys that are read of the header, and their types
HEADER: dict[str, tuple[type, ...]] = {
    "episodes": (int,),
    "seed": (int,),
    "groups": (str,),
    "small_classes": (str,),
    "labelled_fraction": (float, int),
    "split": (str,),
    "split_sha256": (str,),
    "left_out": (list,),
}
KEYS = ("classes", "support", "query", "query_classes")  # of every line, with its number n
MORE = ("unlabelled", "unlabelled_classes")  # of a line with unlabelled videos


@dataclass(frozen=True)
class Shape:
    """The numbers that are the same in all episodes of a file.

    Attributes:
        way: Classes of an episode.
        shot: Support videos of each class.
        queries: Queries of an episode, of all its classes.
        unlabelled_per_class: Unlabelled videos of each class.
        distractor_classes: Other classes, which have only unlabelled videos in it.
        distractors_per_class: Videos of each of them.
    """

    way: int
    shot: int
    queries: int
    unlabelled_per_class: int = 0
    distractor_classes: int = 0
    distractors_per_class: int = 0

    def __str__(self) -> str:
        text = f"{self.way} classes, {self.shot} support videos of each and {self.queries} queries"
        if self.unlabelled_per_class or self.distractor_classes:
            text += (
                f" ({self.unlabelled_per_class} unlabelled videos of each class, {self.distractors_per_class} of each "
                f"of {self.distractor_classes} others)"
            )
        return text


@dataclass(frozen=True)
class EpisodeFile:
    """The episodes of a file, all of one shape.

    Attributes:
        shape: Their numbers of classes and videos.
        chosen: [N] their videos.
        header: The file's first line, which says how they were drawn; empty where the file has no
            header.
        sha256: Hash of the file.
    """

    shape: Shape
    chosen: tuple[Chosen, ...]
    header: dict[str, Any]
    sha256: str


def write_episodes(path: Path, shards: ShardSet, stream: EpisodeStream, episodes: int) -> None:
    """Write episodes 0 to `episodes` of a stream: a header, then one line of JSON each.

    Raises:
        DiskError: the file cannot be written.
    """
    rules = stream.rules
    header = {
        "episodes": episodes,
        "dataset": shards.dataset.name,
        "split": stream.split,
        "split_sha256": shards.dataset.splits[stream.split].sha256,
        "way": rules.way,
        "shot": rules.shot,
        "queries": rules.queries,
        "groups": rules.groups,
        "small_classes": rules.small_classes,
        "unlabelled_per_class": rules.unlabelled_per_class,
        "distractor_classes": rules.distractor_classes,
        "distractors_per_class": rules.distractors if rules.distractor_classes else 0,
        "labelled_fraction": rules.labelled_fraction,
        "seed": stream.seed,
        "left_out": list(stream.dropped),
    }
    rows = stream.videos()
    names = dict(zip(rows.tolist(), shards.names(rows), strict=True))
    classes = {row: shards.dataset.classes[shards.labels[row]] for row in names}
    lines = [header] + [_line(n, stream.choose(n), names, classes) for n in range(episodes)]
    write_whole(path, b"".join(json_line(line) + b"\n" for line in lines))


def _line(n: int, chosen: Chosen, names: dict[int, str], classes: dict[int, str]) -> dict[str, Any]:
    support = [names[row] for row in chosen.support]
    shot = len(support) // len(chosen.classes)
    own = [classes[row] for row in chosen.support[::shot]]
    line = {
        "n": n,
        "classes": own,
        "support": [support[i * shot : (i + 1) * shot] for i in range(len(own))],
        "query": [names[row] for row, _ in chosen.query],
        "query_classes": [own[label] for _, label in chosen.query],
    }
    if chosen.unlabelled:
        line["unlabelled"] = [names[row] for row in chosen.unlabelled]
        line["unlabelled_classes"] = [classes[row] for row in chosen.unlabelled]
    return line


def read_episodes(path: Path, shards: ShardSet, split: str) -> EpisodeFile:
    """Read a file of episodes and find their videos among those stored of a split.

    Raises:
        ShardError: a line is broken, names a video or class that the split does not have, holds a
            video twice, or differs in shape from the first; the file was drawn from another split,
            contradicts its header, or was cut short. File and line are named.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ShardError(f"{path} cannot be read ({error.strerror})") from error
    finder = _Finder(shards, split)
    header: dict[str, Any] = {}
    chosen: list[Chosen] = []
    shape: Shape | None = None
    for number, text in enumerate(data.splitlines(), start=1):
        try:
            line = _parse(text)
            if number == 1 and "n" not in line:
                header = _checked_header(line, split, shards.dataset.splits[split].sha256)
                continue
            chosen.append(finder.find(line, len(chosen)))
            shape = _checked_shape(chosen[-1], shards, shape)
        except ShardError as error:
            raise ShardError(f"{path}, line {number}: {error}") from None
    if shape is None or len(chosen) != header.get("episodes", len(chosen)):
        raise ShardError(f"{path} holds {len(chosen)} of {header.get('episodes', 'its')} episodes: it was cut short")
    for key, value in vars(shape).items():
        if key != "queries" and header.get(key, value) != value:  # of a class there, of an episode here
            raise ShardError(f"{path}, line 1: the header says {key} = {header[key]}, and its episodes have {value}")
    return EpisodeFile(shape, tuple(chosen), header, hashlib.sha256(data).hexdigest())


def _checked_shape(chosen: Chosen, shards: ShardSet, first: Shape | None) -> Shape:
    """Return the shape of an episode; ShardError unless it is that of the first."""
    way = len(chosen.classes)
    counts = Counter(shards.labels[list(chosen.unlabelled)].tolist())
    own = {counts.pop(label, 0) for label in chosen.classes}
    others = set(counts.values())
    if len(own) > 1 or len(others) > 1:
        raise ShardError("the classes have unequal numbers of unlabelled videos")
    shape = Shape(way, len(chosen.support) // way, len(chosen.query), own.pop(), len(counts), max(others, default=0))
    if shape != (first or shape):
        raise ShardError(f"{shape}, where the first episode has {first}")
    return shape


def _parse(text: bytes) -> dict[str, Any]:
    try:
        line = parse_json(text)
    except ValueError as error:
        raise ShardError(f"no JSON ({error})") from None
    if not isinstance(line, dict):
        raise ShardError("no JSON object")
    return line


def _checked_header(header: dict[str, Any], split: str, sha256: str) -> dict[str, Any]:
    if not header.keys() & {"split", "dataset", "episodes"}:
        raise ShardError("neither an episode (it has no n) nor a header (with dataset, split, episodes)")
    for key, kinds in HEADER.items():
        if key in header and type(header[key]) not in kinds:  # true is no number
            raise ShardError(f'"{key}" of the header is {json.dumps(header[key])}')
    if not all(isinstance(name, str) for name in header.get("left_out", ())):
        raise ShardError(f'"left_out" of the header is {json.dumps(header["left_out"])}: expected names of classes')
    if header.get("split", split) != split:
        raise ShardError(
            f'these episodes are of split "{header["split"]}" and not of "{split}"; choose it with --split'
        )
    if header.get("split_sha256", sha256) != sha256:
        raise ShardError(
            f'these episodes are of another split "{split}" (SHA-256 {header["split_sha256"][:12]}..., here '
            f"{sha256[:12]}...): use the shards that they were drawn from, or ones of the same split"
        )
    return header


class _Finder:
    """Finds the rows of named videos of a split."""

    def __init__(self, shards: ShardSet, split: str) -> None:
        self._shards, self._split = shards, split
        rows = shards.split_rows(split).tolist()
        self._labels = {name: label for label, name in enumerate(shards.dataset.classes)}
        self._own = set(shards.dataset.splits[split].classes)
        self._rows: dict[tuple[int, str], int] = {(int(shards.labels[row]), shards.name(row)): row for row in rows}

    def find(self, line: dict[str, Any], n: int) -> Chosen:
        """Return the episode of a line, which must be number n."""
        if type(line.get("n")) is not int or line["n"] != n:
            raise ShardError(f"n is {line.get('n')!r} and not {n}: a line is missing or stands twice")
        line = {key: [] for key in MORE} | line
        for key in KEYS + MORE:
            if not isinstance(line.get(key), list) or not (line[key] or key in MORE):
                raise ShardError(f'"{key}" is no list, or it is empty')
        classes, support = line["classes"], line["support"]
        self._check_classes(classes)
        if len(support) != len(classes) or not all(isinstance(own, list) and own for own in support):
            raise ShardError('"support" must hold one list of videos for each class')
        if len({len(own) for own in support}) > 1:
            raise ShardError("the classes have unequal numbers of support videos")
        for names, labels in (("query", "query_classes"), MORE):
            if len(line[names]) != len(line[labels]):
                raise ShardError(f'"{names}" and "{labels}" are not equally long')
        rows = [self._row(name, label) for label, own in zip(classes, support, strict=True) for name in own]
        query = [
            (self._row(name, label), _place(label, classes))
            for name, label in zip(line["query"], line["query_classes"], strict=True)
        ]
        unlabelled = [self._row(name, label) for name, label in zip(*(line[key] for key in MORE), strict=True)]
        taken = rows + [row for row, _ in query] + unlabelled
        if len(set(taken)) < len(taken):
            twice = next(row for row in taken if taken.count(row) > 1)
            raise ShardError(f'video "{self._shards.name(twice)}" stands in two places of the episode')
        return Chosen(tuple(self._labels[label] for label in classes), tuple(rows), tuple(query), tuple(unlabelled))

    def _check_classes(self, classes: list[Any]) -> None:
        for label in classes:
            if not isinstance(label, str) or label not in self._own:
                raise ShardError(f'split "{self._split}" has no class {json.dumps(label)}')
        if len(set(classes)) < len(classes) or len(classes) < 2:
            raise ShardError("an episode needs two classes or more, each once")

    def _row(self, name: Any, label: Any) -> int:  # noqa: ANN401 -- whatever the file holds
        known = isinstance(name, str) and isinstance(label, str) and label in self._labels
        row = self._rows.get((self._labels[label], name)) if known else None
        if row is None:
            raise ShardError(
                f'split "{self._split}" of {self._shards.path} has no stored video {json.dumps(name)} of class '
                f"{json.dumps(label)}"
            )
        return row


def _place(label: str, classes: list[str]) -> int:
    if label not in classes:
        raise ShardError(f'query class "{label}" is not a class of the episode')
    return classes.index(label)
