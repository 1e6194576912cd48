"""Read the split lists of the field line by line: split, class, video."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shards_spec.errors import ShardError
from shards_spec.schema import path_fault, quoted, text_fault

SplitName = Literal["train", "val", "test"]
NAMES: tuple[SplitName, ...] = ("train", "val", "test")
VIDEO_EXTENSIONS = frozenset(
    ".avi .mp4 .m4v .mov .mkv .webm .mpg .mpeg .ts .wmv .asf .flv .3gp".split()  # noqa: SIM905 -- a list reads longer
)
# `train12//videos/Class/clip.avi`, `test18/195025`: split, class number within it, path
NUMBERED = re.compile(r"(?P<split>train|val|test)?(?P<number>[0-9]{1,9})?/{1,2}(?P<path>[^/].*)")
# `Class/clip.avi 17`: UCF101's own lists have a label behind the file name
LABELLED = re.compile(r"(?P<path>.*\.\w+)\s+[0-9]+")
COLUMN_NAMES: dict[str, SplitName] = {
    "train": "train",
    "val": "val",
    "validate": "val",
    "validation": "val",
    "test": "test",
}


@dataclass(frozen=True)
class Entry:
    """One line of a split list.

    Attributes:
        path: As listed, without a prefix of split and class, and without a label behind it.
        label: Class text, where the line or its folder has one.
        number: Class number within the split, where the form has one.
    """

    path: str
    label: str | None
    number: int | None

    @property
    def stem(self) -> str:
        """Last part of the path without a known video extension.

        Stems hold dots, spaces and brackets, so other endings stay.
        """
        name = self.path.rpartition("/")[2]
        return name.rpartition(".")[0] if is_video_name(name) else name


def is_video_name(name: str) -> bool:
    """Tell whether a name ends with a known video extension."""
    stem, dot, ending = name.rpartition(".")
    return bool(stem) and dot + ending.lower() in VIDEO_EXTENSIONS


@dataclass(frozen=True)
class Line:
    """An entry and its place: file and line, for messages."""

    entry: Entry
    where: str


def parse_line(line: str, where: str, split: str) -> Entry:
    """Read one line of a list of `split`.

    Forms: `train0//videos/Class/x.avi`, `train0/51958`, `Class/x`, `Class/x.avi 1`.

    Raises:
        ShardError: it has another form or names another split; `where` tells file and line.
    """
    labelled = LABELLED.fullmatch(line)
    if labelled and is_video_name(labelled["path"].rpartition("/")[2]):
        line = labelled["path"]
    prefix = NUMBERED.fullmatch(line)
    if prefix and not prefix["number"] and "/" not in prefix["path"]:
        prefix = None  # `train/x`: a class of that name, else the line would tell no class at all
    path = prefix["path"] if prefix else line
    folder, _, name = path.rpartition("/")
    label = folder.rpartition("/")[2] or None
    if not name or (label is None and not (prefix and prefix["number"])):
        raise ShardError(f'{where}: cannot read "{line[:80]}"; expected Class/stem or {split}0//path/of/video')
    if prefix and prefix["split"] not in {None, split}:
        raise ShardError(f'{where}: "{line[:80]}" is of {prefix["split"]}, but stands in a list of {split}; move it')
    return _checked(Entry(path, label, int(prefix["number"]) if prefix and prefix["number"] else None), where)


def _checked(entry: Entry, where: str) -> Entry:
    """Refuse a name that leads out of the folder of videos or holds control characters."""
    if fault := path_fault(entry.path) or text_fault(entry.label or ""):
        raise ShardError(f"{where}: the name {quoted(entry.path)} or its class {fault}")
    return entry


def read_text(path: Path, split: SplitName) -> list[Line]:
    """Read a list of one video a line; blank lines are skipped.

    Raises:
        ShardError: it is no text in UTF-8, or has a line that cannot be read.
    """
    lines = ((f"{path}, line {n}", line.strip()) for n, line in enumerate(_text(path).split("\n"), start=1))
    return [Line(parse_line(line, where, split), where) for where, line in lines if line]


def read_csv(path: Path, split: SplitName | None) -> dict[SplitName, list[Line]]:
    """Read a table in the form of Kinetics: `label,youtube_id,time_start,time_end,split`.

    The column `split` sorts the rows; a table of one `split` may do without it.

    Raises:
        ShardError: a column or a value is missing or cannot be read.
    """
    table = csv.DictReader(_text(path).split("\n"), strict=True)
    lists: dict[SplitName, list[Line]] = {}
    try:
        columns = set(table.fieldnames or ())
        if missing := {"label", "youtube_id", *(() if split else ("split",))} - columns:
            raise ShardError(f"{path} lacks the columns {', '.join(sorted(missing))}; expected Kinetics' form")
        for row in table:
            where = f"{path}, line {table.line_num}"
            entry = _row_entry(row, where)
            part = _split_of(row["split"], where) if row.get("split") or split is None else split
            if split not in {None, part}:
                raise ShardError(f"{where}: a row of {part} in a list of {split}; move it")
            lists.setdefault(part, []).append(Line(entry, where))
    except csv.Error as error:
        raise ShardError(f"{path}, line {table.line_num}: no line of a table with commas ({error})") from error
    return lists


def read_json_lists(path: Path, split: SplitName | None) -> dict[SplitName, list[Line]]:
    """Read `{split: {class: [names]}}` or `{split: [names]}`; with `split`, the value of its key.

    A name in a list without classes is a line of a text list, or a bare file name.

    Raises:
        ShardError: it is no JSON, or of another form.
    """
    try:
        content = json.loads(_text(path), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{path} is no JSON that can be read ({error})") from error
    if split:
        return {split: list(_json_lines(content, split, str(path)))}
    if not isinstance(content, dict) or not content:
        raise ShardError(f"{path}: expected an object with the keys train, val and test")
    lists: dict[SplitName, list[Line]] = {}
    for key, names in content.items():
        where = f"{path}, {key}"
        lists.setdefault(_split_of(key, where), []).extend(_json_lines(names, _split_of(key, where), where))
    return lists


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ShardError(f"{path} is no text file in UTF-8 ({error})") from error
    except OSError as error:
        raise ShardError(f"{path} cannot be read ({error.strerror})") from error


def _row_entry(row: dict[str, Any], where: str) -> Entry:
    """Make the entry of a row of Kinetics' table.

    Its file is called `id_start_end`, with times in seconds of six digits.
    """
    label, stem = (row[column] or "" for column in ("label", "youtube_id"))
    times = [row.get(column) or "" for column in ("time_start", "time_end")]
    if not label or not stem or "/" in stem or None in row:
        raise ShardError(f"{where}: expected a label, a youtube_id and as many values as the first line has")
    if any(times):
        try:
            stem = "_".join([stem, *(f"{int(float(time)):06d}" for time in times)])
        except (ValueError, OverflowError) as error:
            raise ShardError(f'{where}: time_start "{times[0]}" or time_end "{times[1]}" is no number') from error
    return _checked(Entry(stem, label, None), where)


def _split_of(text: str | None, where: str) -> SplitName:
    if text not in COLUMN_NAMES:
        raise ShardError(f'{where}: "{text}" is no split; expected train, val or test')
    return COLUMN_NAMES[text]


def _json_lines(names: Any, split: SplitName, where: str) -> Iterator[Line]:  # noqa: ANN401 -- JSON is what it is
    groups = names.items() if isinstance(names, dict) else [(None, names)]
    for label, listed in groups:
        if not isinstance(listed, list) or label == "":
            raise ShardError(f'{where}, "{label}": expected a list of names' if label else f"{where}: expected lists")
        for n, name in enumerate(listed, start=1):
            place = f"{where}, {label or 'entry'} {n}"
            if not isinstance(name, str) or not name.rpartition("/")[2]:
                raise ShardError(f"{place}: expected the name of a video, found {str(name)[:80]!r}")
            bare = label or "/" not in name
            yield Line(_checked(Entry(name, label, None), place) if bare else parse_line(name, place, split), place)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key stands there twice")
    return content
