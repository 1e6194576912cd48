"""Compare models on the same episodes: their differences in accuracy, with paired intervals."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fsar.evaluation.accuracy import Result, summarise
from fsar.evaluation.intervals import Answers, episode_interval, spare_videos, video_interval
from shards_spec.errors import FsarError

CSV_FIGURES = (
    "accuracy",
    "interval_episodes",
    "interval_videos",
    "difference",
    "difference_interval_episodes",
    "difference_interval_videos",
    "excludes_zero",
    "judged_over",
)


@dataclass(frozen=True)
class Difference:
    """Accuracy less that of the baseline on the same queries, as a share of 1.

    Intervals are half widths, 95 %.

    Attributes:
        interval_episodes: Over episodes drawn from these videos; None for a single episode.
        interval_videos: Over the test videos; None where it cannot be known, as in `Result`.
        per_class: Difference in the queries of each class.
    """

    value: float
    interval_episodes: float | None
    interval_videos: float | None
    per_class: dict[str, float]

    @property
    def judged_over(self) -> str:
        """Name the interval that counts: over videos, or over episodes where that is unknown."""
        return "episodes" if self.interval_videos is None else "videos"

    @property
    def excludes_zero(self) -> bool:
        """Tell whether the interval that counts leaves out 0; False where neither is known."""
        half = self.interval_episodes if self.interval_videos is None else self.interval_videos
        return half is not None and abs(self.value) > half

    def to_json(self) -> dict[str, Any]:
        """Return all of it."""
        return vars(self) | {"judged_over": self.judged_over, "excludes_zero": self.excludes_zero}


@dataclass(frozen=True)
class Comparison:
    """Results by name, and the difference of each from the baseline's; the baseline has none."""

    baseline: str
    results: dict[str, Result]
    differences: dict[str, Difference]

    def to_json(self) -> dict[str, Any]:
        """Map each name to its result and difference (null for the baseline)."""
        return {
            name: {"test": result.to_json(), "difference": self.differences[name].to_json()}
            if name in self.differences
            else {"test": result.to_json(), "difference": None}
            for name, result in self.results.items()
        }

    def to_markdown(self, details: Mapping[str, Mapping[str, str]]) -> str:
        """Write a table of the runs and one of their classes; of `details`, columns that differ."""
        alike, told_apart = tell_apart(details)
        shared = f"All runs: {', '.join(f'{c} {_plain(value)}' for c, value in alike.items())}.\n\n" if alike else ""
        return f"{shared}{self._overall(told_apart)}\n{_footnote(self)}\n\n{self._classes()}"

    def _overall(self, details: Mapping[str, Mapping[str, str]]) -> str:
        columns = list(details[self.baseline])
        head = ["run", *columns, "accuracy", "± episodes", "± videos", f"difference to {self.baseline}", "± episodes"]
        rows = [[name, *(details[name][c] for c in columns), *self._figures(name)] for name in self.results]
        return _table([*head, "± videos", "excludes 0"], rows, text=1 + len(columns))

    def _figures(self, name: str) -> list[str]:
        result, difference = self.results[name], self.differences.get(name)
        own = [f"{result.accuracy:.1%}", _points(result.interval_episodes), _points(result.interval_videos)]
        if difference is None:
            return [*own, "", "", "", ""]
        verdict = f"{'yes' if difference.excludes_zero else 'no'} ({difference.judged_over})"
        intervals = [_points(difference.interval_episodes), _points(difference.interval_videos)]
        return [*own, f"{100 * difference.value:+.1f}", *intervals, verdict]

    def _classes(self) -> str:
        head = ["class", *self.results]
        rows = [[c, *(self._of_class(name, c) for name in self.results)] for c in self._class_names()]
        return _table(head, rows, text=1)

    def _of_class(self, name: str, of: str) -> str:
        accuracy, difference = f"{self.results[name].per_class[of]:.1%}", self.differences.get(name)
        return accuracy if difference is None else f"{accuracy} ({100 * difference.per_class[of]:+.1f})"

    def _class_names(self) -> list[str]:
        return sorted(self.results[self.baseline].per_class)

    def to_csv(self, details: Mapping[str, Mapping[str, str]]) -> str:
        """Write a line for each run (scope `overall`) and each class of a run (scope `class`)."""
        columns = list(details[self.baseline])
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["run", *columns, "scope", "class", *CSV_FIGURES])
        for name, result in self.results.items():
            own, difference = [name, *(details[name][c] for c in columns)], self.differences.get(name)
            figures: list[Any] = [result.accuracy, result.interval_episodes, result.interval_videos]
            if difference is not None:
                figures += [difference.value, difference.interval_episodes, difference.interval_videos]
                figures += [str(difference.excludes_zero).lower(), difference.judged_over]
            writer.writerow([*own, "overall", "", *_filled(figures)])
            for of in self._class_names():
                by_class = "" if difference is None else difference.per_class[of]
                writer.writerow([*own, "class", of, *_filled([result.per_class[of], "", "", by_class])])
        return text.getvalue()


def tell_apart(details: Mapping[str, Mapping[str, str]]) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Separate the columns that have one value in all rows; return these, and each row's others."""
    first = next(iter(details.values()))
    alike = {c: value for c, value in first.items() if all(d[c] == value for d in details.values())}
    return alike, {name: {c: d[c] for c in d if c not in alike} for name, d in details.items()}


def compare(answers: Mapping[str, Answers], classes: Sequence[str], *, baseline: str) -> Comparison:
    """Compare the answers of several models to the same queries.

    Args:
        answers: Their answers, by name.
        classes: The data set's class names.
        baseline: Name of the model that the others are compared with.

    Raises:
        FsarError: they were not asked the same.
    """
    base = answers[baseline]
    for name, own in answers.items():
        check_same(own, base, f"{name} and {baseline}")
    return Comparison(
        baseline,
        {name: summarise(own, classes) for name, own in answers.items()},
        {name: subtract(own, base, classes) for name, own in answers.items() if name != baseline},
    )


def check_same(a: Answers, b: Answers, who: str) -> None:
    """Refuse answers to different queries, or to the same ones with other support videos.

    Raises:
        FsarError: naming the first episode that differs.
    """
    if a.query.shape != b.query.shape or a.support.shape != b.support.shape:
        raise FsarError(f"{who} were asked episodes of different numbers or shapes: their answers cannot be compared")
    same = np.ones(len(a.query), bool)  # [N]
    for ours, theirs in ((a.classes, b.classes), (a.support, b.support), (a.query, b.query), (a.truth, b.truth)):
        same &= (ours == theirs).all(axis=1)
    if not same.all():
        raise FsarError(f"{who} were not asked the same: episode {int(same.argmin())} has other videos")


def subtract(own: Answers, base: Answers, classes: Sequence[str]) -> Difference:
    """Compute the paired difference of two models' accuracies on the same queries."""
    values = _right(own) - _right(base)  # [N, Q] in -1, 0, 1
    return Difference(
        value=float(values.mean()),
        interval_episodes=episode_interval(values),
        interval_videos=video_interval(own, values) if spare_videos(own) else None,
        per_class={classes[c]: float(values[own.truth == c].mean()) for c in np.unique(own.truth)},
    )


def _right(answers: Answers) -> NDArray[np.int64]:
    right: NDArray[np.bool_] = answers.truth == answers.said
    return right.astype(np.int64)


def _points(share: float | None) -> str:
    return "unknown" if share is None else f"{100 * share:.1f}"


def _filled(figures: list[Any]) -> list[Any]:
    """Fill one line's figures up with empty ones."""
    return [*("" if value is None else value for value in figures), *[""] * (len(CSV_FIGURES) - len(figures))]


def _footnote(comparison: Comparison) -> str:
    one = comparison.results[comparison.baseline]
    return (
        f"{one.episodes:,} episodes, the same for all: {one.queries:,} queries of {one.videos:,} videos, chance "
        f"{one.chance:.1%}. Intervals are 95 %, in points of accuracy; those of differences are paired. The one over "
        "videos is what may be claimed of new videos; over episodes is what papers print."
    )


def _plain(text: str) -> str:
    """Escape text for Markdown, where a bar ends a cell and viewers take tags as they are."""
    return text.translate({ord(letter): f"\\{letter}" for letter in "\\|<"} | {ord("\n"): " "})


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, text: int) -> str:
    """Write a Markdown table with aligned columns, the first `text` of them to the left."""
    cells = [[_plain(cell) for cell in row] for row in (head, *rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(head))]
    rule = ["-" * width if i < text else "-" * (width - 1) + ":" for i, width in enumerate(widths)]

    def line(row: Sequence[str]) -> str:
        sides = [f"{c:<{w}}" if i < text else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        return f"| {' | '.join(sides)} |"

    return "".join(line(row) + "\n" for row in (cells[0], rule, *cells[1:]))
