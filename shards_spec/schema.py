"""Define the names, keys, sizes and small JSON files of a shard set.

`SPEC.md` is the authority.  `index/layout.py` defines the columns of the index.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from shards_spec.errors import ShardError
from shards_spec.files import json_line, parse_json, read_json
from shards_spec.pictures import series_kind

FORMAT = 1
KEY_DIGITS = 8
BLOCK = 512  # bytes; headers and payloads of a tar begin at multiples of it
SERIES_NAME = re.compile(r"[a-z0-9]{1,40}")
CODECS = {"jpeg": "jpg", "raw": "raw"}  # how pictures are stored -> the end of their members' names

Reason = Literal[
    "unreadable",  # missing, no permission, a folder
    "not-a-video",  # no container that we open
    "no-video-stream",  # sound only
    "no-frames",  # a video stream without pictures
    "one-frame",  # a still: nothing moves in it
    "truncated",  # the container says that bytes are missing
    "damaged",  # the decoder met errors
    "too-long",  # more frames than the limit
    "too-large",  # larger pictures than the limit
    "timeout",  # the decoder did not end in time
    "crash",  # two workers were lost at it
]
REASONS: tuple[str, ...] = get_args(Reason)
MOST_FRAMES, MOST_SIDE = 99_999, 65_535  # five digits, and two bytes of a JPEG
PER_PICTURE = ("scale", "magnitude", "motion_score")  # a number a picture, in the samples of some series
MOTION = {"diff": "diff1", "flow": "flow1"}  # short name in the command's --motion -> name of the series
_GRID = re.compile(r"flow([1-9]\d{0,2})g([1-9]\d{0,2})")

# A terminal obeys control characters, and lists hold one name a line.
# Halves of characters (surrogates) have no encoding, but U+DC80 to U+DCFF stand for bytes that are
# no UTF-8 (Python's `surrogateescape`), so names may hold those.
UNPRINTABLE = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\ud800-\\udc7f\\udd00-\\udfff]")
CLIMBS = re.compile(r"/|(?:.*/)?\.\.(?:/|$)", re.DOTALL)  # for `match`: from the start


def text_fault(text: str) -> str | None:
    """Say why a name of a class or group is refused; None where it is fine."""
    return "holds a control character" if UNPRINTABLE.search(text) else None


def path_fault(name: str) -> str | None:
    """Say why a name of a video is refused; None where it is fine.

    The name is the path of the video below the videos folder, with `/`.
    """
    if CLIMBS.match(name):
        return "leads out of the folder"
    return "is empty" if not name else text_fault(name)


def printable(text: str) -> str:
    """Replace by `?` each character that `text_fault` refuses."""
    return UNPRINTABLE.sub("?", text)


def quoted(name: str) -> str:
    """Quote a name for a message: one line of at most 80 characters, control characters escaped."""
    short = name if len(name) <= 80 else f"{name[:77]}..."
    return '"' + UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), short) + '"'


def padded(size: int) -> int:
    """Round a size in bytes up to whole tar blocks."""
    return -(-size // BLOCK) * BLOCK


def archive_size(end: int) -> int:
    """Return the size of a tar whose last member ends (padding included) at `end`.

    Two empty blocks end an archive, and it is padded to whole records.
    """
    return -(-(end + 2 * BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def sample_key(row: int) -> str:
    """Return the key of a catalogue row: `c` and eight digits.

    Original names hold what ustar and DALI's index cannot.
    """
    return f"c{row:0{KEY_DIGITS}d}"


def row_of_key(key: str) -> int:
    """Return the catalogue row of a sample key.

    Raises:
        ShardError: it is no key of ours.
    """
    if len(key) != KEY_DIGITS + 1 or key[0] != "c" or not (key[1:].isascii() and key[1:].isdigit()):
        raise ShardError(f'"{key}" is no sample key: expected c and {KEY_DIGITS} digits')
    return int(key[1:])


def picture_name(number: int, codec: str) -> str:
    """Return the extension of the picture that begins at source frame `number`."""
    return f"{number:05d}.{CODECS[codec]}"


@dataclass(frozen=True)
class Split:
    """The classes of a split, and the names of its videos where a published split lists them."""

    classes: tuple[str, ...]
    videos: tuple[str, ...] | None = None

    @cached_property
    def sha256(self) -> str:
        """Hash of the content of the split, independent of the order in which it was written."""
        videos = None if self.videos is None else sorted(self.videos)
        return hashlib.sha256(json_line([sorted(self.classes), videos])).hexdigest()


@dataclass(frozen=True)
class Dataset:
    """Content of `dataset.json`: it describes the videos, not how they were stored.

    Attributes:
        name: Name in results.
        classes: Sorted class names, including classes without videos.
        splits: Splits by name.
        coverage: Split -> (videos in the catalogue, videos in the published split).
            Empty where not known.
    """

    name: str
    classes: tuple[str, ...]
    splits: dict[str, Split] = field(default_factory=dict)
    coverage: dict[str, tuple[int, int]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the content of `dataset.json`."""
        splits = {
            name: {"classes": list(split.classes)}
            | ({} if split.videos is None else {"videos": list(split.videos)})
            | {"sha256": split.sha256}
            for name, split in self.splits.items()
        }
        content = {"format": FORMAT, "name": self.name, "classes": list(self.classes), "splits": splits}
        return content | ({"coverage": {k: list(pair) for k, pair in self.coverage.items()}} if self.coverage else {})

    @staticmethod
    def load(path: Path) -> Dataset:
        """Read `dataset.json`.

        Raises:
            ShardError: it is missing, damaged, of a later format, or its splits overlap.
        """
        raw = read_json(path)
        check_format(raw, path)
        try:
            splits = {
                name: Split(_names(s["classes"]), _names(s["videos"], path_fault) if "videos" in s else None)
                for name, s in raw["splits"].items()
            }
            coverage = {name: (_count(found), _count(of)) for name, (found, of) in raw.get("coverage", {}).items()}
            dataset = Dataset(_names([raw["name"]])[0], _names(raw["classes"]), splits, coverage)
            _names(list(splits))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ShardError(f"{path} is damaged or not ours: {_reason(error)}") from error
        check_disjoint(dataset.splits, path)
        return dataset


def _names(values: Any, fault: Callable[[str], str | None] = text_fault) -> tuple[str, ...]:  # noqa: ANN401
    """Check a list of names from JSON; raise ValueError where one repeats or could do harm."""
    if not isinstance(values, list) or not all(isinstance(name, str) for name in values):
        raise ValueError("expected a list of names")
    for name in values:
        if found := fault(name):
            raise ValueError(f"{quoted(name)} {found}")
    if len(set(values)) < len(values):
        raise ValueError("a name stands in a list twice")
    return tuple(values)


def _count(value: Any) -> int:  # noqa: ANN401
    if type(value) is not int or value < 0:
        raise ValueError(f"{str(value)[:40]!r} is no count")
    return value


def _reason(error: Exception) -> str:
    """Return the text of an error, for a sentence."""
    return str(error) if type(error) is ValueError else repr(error)


def check_disjoint(splits: Mapping[str, Split], where: Path | str) -> None:
    """Refuse splits that share a class or a video.

    Raises:
        ShardError: naming both splits and what they share.
    """
    names = sorted(splits)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            shared = set(splits[a].classes) & set(splits[b].classes)
            shared |= set(splits[a].videos or ()) & set(splits[b].videos or ())
            if shared:
                raise ShardError(
                    f'{where}: the splits "{a}" and "{b}" share {len(shared)} classes or videos '
                    f'(such as "{min(shared)}"): a test on them would say nothing'
                )


def check_format(raw: Any, path: Path) -> None:  # noqa: ANN401
    """Refuse a file of another format version.

    Raises:
        ShardError: it is no object or its `format` is not ours.
    """
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise ShardError(f"{path}: not of format {FORMAT}; make the shards again or use the fsar that made them")


@dataclass(frozen=True)
class Plan:
    """Content of `plan.json`: everything that decides the bytes of the shards.

    `series` maps the name of a series to a flat table of its settings and tool versions.
    """

    dataset: str
    rows_per_shard: int
    catalogue_rows: int
    catalogue_sha256: str
    series: dict[str, dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Return the content of `plan.json`."""
        catalogue = {"rows": self.catalogue_rows, "sha256": self.catalogue_sha256}
        return {
            "format": FORMAT,
            "dataset": self.dataset,
            "rows_per_shard": self.rows_per_shard,
            "catalogue": catalogue,
            "series": self.series,
        }

    @staticmethod
    def load(path: Path) -> Plan:
        """Read `plan.json`.

        Raises:
            ShardError: it is missing, damaged or of another format.
        """
        raw = read_json(path)
        check_format(raw, path)
        try:
            catalogue, series = raw["catalogue"], raw["series"]
            if not all(SERIES_NAME.fullmatch(name) and isinstance(table, dict) for name, table in series.items()):
                raise ValueError("expected a table of settings for each series")  # noqa: TRY301 -- as the errors below
            name, sha256 = _names([raw["dataset"]])[0], str(catalogue["sha256"])
            return Plan(name, _count(raw["rows_per_shard"]), _count(catalogue["rows"]), sha256, series)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ShardError(f"{path} is damaged or not ours: {_reason(error)}") from error

    def check_same(self, wanted: Plan, where: Path) -> None:
        """Refuse to mix shards of two plans in one folder.

        Series that only one of the plans has are fine.

        Raises:
            ShardError: naming each setting that differs, with both values.
        """
        here, there = self._settings(), wanted._settings()
        shared = [key for key in here if key in there and here[key] != there[key]]
        for name in set(self.series) & set(wanted.series):
            shared += [f"{name}.{key}" for key in set(self.series[name]) ^ set(wanted.series[name])]
        if shared:
            changes = "; ".join(f"{key} is {here.get(key)!r}, asked for {there.get(key)!r}" for key in sorted(shared))
            raise ShardError(
                f"{where} holds shards of another plan ({changes}); "
                "use another --out folder, or the options and tools that made this one"
            )

    def _settings(self) -> dict[str, Any]:
        flat: dict[str, Any] = {"dataset": self.dataset, "rows_per_shard": self.rows_per_shard}
        for name, settings in self.series.items():
            flat |= {f"{name}.{key}": value for key, value in settings.items()}
        return flat


@dataclass(frozen=True, order=True)
class Failure:
    """One line of `failures.jsonl`: a video that could not be stored, and why."""

    row: int
    name: str
    label: str
    group: str | None
    reason: str
    detail: str

    @staticmethod
    def load_all(path: Path) -> dict[int, Failure]:
        """Read the failures, by catalogue row; return {} where the file is missing.

        Raises:
            ShardError: a line has another form than ours.
        """
        if not path.exists():
            return {}
        try:
            rows = [Failure(**parse_json(line)) for line in path.read_text(encoding="utf-8").splitlines()]
            for failure in rows:
                failure.check()
        except OSError as error:
            raise ShardError(f"{path} cannot be read ({error.strerror})") from error
        except (ValueError, TypeError) as error:
            raise ShardError(f"{path} is damaged: {error}") from error
        return {failure.row: failure for failure in rows}

    def check(self) -> None:
        """Raise ValueError where a value has another type or a name can do harm."""
        texts = [self.name, self.label, self.reason, self.detail, self.group or ""]
        _names([text for text in {*texts, ""} if text])
        if (fault := path_fault(self.name)) or _count(self.row) >= 10**KEY_DIGITS:
            raise ValueError(f"{quoted(self.name)} {fault or 'is of an impossible row'}")

    @staticmethod
    def dump_all(failures: Iterable[Failure]) -> bytes:
        """Return the content of `failures.jsonl`, sorted by row."""
        return b"".join(json_line(vars(failure)) + b"\n" for failure in sorted(failures))


def flow_pairs(series: str) -> tuple[int, int] | None:
    """Return displacement D and grid G of `flow1` or `flowDgG`, in source frames.

    Its fields go from frame i to frame i + D, for i = 0, G, 2G, ...  None for other names.
    """
    match = _GRID.fullmatch(series)
    if match:
        return int(match[1]), int(match[2])
    return (1, 1) if series == MOTION["flow"] else None


def motion_series(names: Iterable[str]) -> list[str]:
    """Return the series, sorted, for names in --motion; full names stand for themselves."""
    return sorted({MOTION.get(name, name) for name in names})


def is_motion(name: str) -> bool:
    """Tell whether --motion takes this name."""
    return name in MOTION or name in MOTION.values() or flow_pairs(name) is not None


def adding_command(series: str, folder: str | Path) -> str:
    """Return the command that adds a series of motion to the shard set in `folder`.

    For a series that --motion does not take, the command names its kind.
    """
    kind = series_kind(series)[0]
    name = series if is_motion(series) else {"frames": "diff, flow or flow8g2"}.get(kind, kind)
    option = {held: short for short, held in MOTION.items()}.get(name, name)
    return f"the fsar-preprocess command that made {folder}, typed again with --motion {option}"
