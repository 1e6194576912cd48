"""Episodes as a file: the videos of each by their original names, so that others can run exactly these."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.plan import Chosen
from shards_spec.errors import ShardError
from shards_spec.files import json_line, write_whole

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pipelines.plan import EpisodeStream
    from shards_spec import ShardSet

HEADER = {"episodes": int, "seed": int, "groups": str, "split": str, "left_out": list}  # what is read of it
KEYS = ("classes", "support", "query", "query_classes")  # of a line, besides its number n


@dataclass(frozen=True)
class GivenEpisodes:
    """The episodes of a file, all of one shape.

    Attributes:
        way: Classes of an episode.
        shot: Support videos of each class.
        queries: Queries of an episode, of all its classes.
        chosen: [N] their videos.
        header: What the file says of itself; empty where it has no header.
        sha256: Hash of the file.
    """

    way: int
    shot: int
    queries: int
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
        "seed": stream.seed,
        "left_out": list(stream.dropped),
    }
    rows = stream.videos()
    names = dict(zip(rows.tolist(), shards.names(rows), strict=True))
    lines = [header] + [_line(n, stream.choose(n), names, shards.dataset.classes) for n in range(episodes)]
    write_whole(path, b"".join(json_line(line) + b"\n" for line in lines))


def _line(n: int, chosen: Chosen, names: dict[int, str], classes: Sequence[str]) -> dict[str, Any]:
    own = [classes[label] for label in chosen.classes]
    support = [names[row] for row in chosen.support]
    shot = len(support) // len(own)
    line = {
        "n": n,
        "classes": own,
        "support": [support[i * shot : (i + 1) * shot] for i in range(len(own))],
        "query": [names[row] for row, _ in chosen.query],
        "query_classes": [own[label] for _, label in chosen.query],
    }
    return line | ({"unlabelled": [names[row] for row in chosen.unlabelled]} if chosen.unlabelled else {})


def read_episodes(path: Path, shards: ShardSet, split: str) -> GivenEpisodes:
    """Read a file of episodes and find their videos among those stored of a split.

    Raises:
        ShardError: with file and line: a line that is broken, names what the split has not, has a video in two
            places or another shape than the first; or the file was drawn from another split or was cut short.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ShardError(f"{path} cannot be read ({error.strerror})") from error
    finder = _Finder(shards, split)
    header: dict[str, Any] = {}
    chosen: list[Chosen] = []
    for number, text in enumerate(data.splitlines(), start=1):
        try:
            line = _parse(text)
            if number == 1 and "n" not in line:
                header = _checked_header(line, split)
                continue
            chosen.append(finder.find(line, len(chosen)))
            _check_shape(chosen[-1], chosen[0])
        except ShardError as error:
            raise ShardError(f"{path}, line {number}: {error}") from None
    if not chosen or len(chosen) != header.get("episodes", len(chosen)):
        raise ShardError(f"{path} holds {len(chosen)} of {header.get('episodes', 'its')} episodes: it was cut short")
    return GivenEpisodes(*_shape(chosen[0]), tuple(chosen), header, hashlib.sha256(data).hexdigest())


def _shape(chosen: Chosen) -> tuple[int, int, int]:
    return len(chosen.classes), len(chosen.support) // len(chosen.classes), len(chosen.query)


def _check_shape(chosen: Chosen, first: Chosen) -> None:
    if _shape(chosen) != _shape(first):
        raise ShardError(f"{_shape_text(chosen)}, where the first episode has {_shape_text(first)}")


def _shape_text(chosen: Chosen) -> str:
    way, shot, queries = _shape(chosen)
    return f"{way} classes, {shot} support videos of each and {queries} queries"


def _parse(text: bytes) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except ValueError as error:
        raise ShardError(f"no JSON ({error})") from None
    if not isinstance(line, dict):
        raise ShardError("no JSON object")
    return line


def _checked_header(header: dict[str, Any], split: str) -> dict[str, Any]:
    if not header.keys() & {"split", "dataset", "episodes"}:
        raise ShardError("neither an episode (it has no n) nor a header (with dataset, split, episodes)")
    for key, kind in HEADER.items():
        if not isinstance(header.get(key, kind()), kind):
            raise ShardError(f'"{key}" of the header is {json.dumps(header[key])}')
    if header.get("split", split) != split:
        raise ShardError(
            f'these episodes are of split "{header["split"]}" and not of "{split}"; choose it with --split'
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
        self._unlabelled = {name: row for (_, name), row in self._rows.items()}

    def find(self, line: dict[str, Any], n: int) -> Chosen:
        """The episode of a line, which must be number n."""
        if line.get("n") != n:
            raise ShardError(f"n is {line.get('n')!r} and not {n}: a line is missing or stands twice")
        for key in KEYS:
            if not isinstance(line.get(key), list) or not line[key]:
                raise ShardError(f'"{key}" is no list, or it is empty')
        classes, support = line["classes"], line["support"]
        self._check_classes(classes)
        if len(support) != len(classes) or not all(isinstance(own, list) and own for own in support):
            raise ShardError('"support" must hold one list of videos for each class')
        if len({len(own) for own in support}) > 1:
            raise ShardError("the classes have unequal numbers of support videos")
        if len(line["query"]) != len(line["query_classes"]):
            raise ShardError('"query" and "query_classes" are not equally long')
        rows = [self._row(name, label) for label, own in zip(classes, support, strict=True) for name in own]
        query = [
            (self._row(name, label), _place(label, classes))
            for name, label in zip(line["query"], line["query_classes"], strict=True)
        ]
        unlabelled = [self._unlabelled_row(name) for name in line.get("unlabelled", ())]
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

    def _unlabelled_row(self, name: Any) -> int:  # noqa: ANN401 -- whatever the file holds
        row = self._unlabelled.get(name) if isinstance(name, str) else None
        if row is None:
            raise ShardError(f'split "{self._split}" of {self._shards.path} has no stored video {json.dumps(name)}')
        return row


def _place(label: str, classes: list[str]) -> int:
    if label not in classes:
        raise ShardError(f'query class "{label}" is none of the episode\'s classes')
    return classes.index(label)
