"""A page that compares runs on the same episodes: accuracies, paired differences, classes, provenance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from fsar.evaluation.accuracy import Result
from fsar.evaluation.comparison import Comparison, Difference, tell_apart
from fsar.report.run import document, table

WIDTH, HEIGHT = 220, 22  # pixels of a row of a chart
STROKES = ('stroke="#9ec5fe" stroke-width=7', 'stroke="#1f6feb" stroke-width=2')  # over episodes, over videos
STRONGEST = 0.5  # difference in a class that has the full colour
EXPLAINED = (
    "± episodes / videos: 95 % intervals in points, thick over episodes drawn from these videos, which is what "
    "papers print; thin over the videos, which is what may be claimed of new ones. Differences are paired."
)
STYLE = """
.runs td,.runs th{white-space:nowrap}.runs td:has(svg){padding:0 .6rem}.runs th:first-child,.runs td:first-child,
.classes th:first-child,.classes td:first-child{position:sticky;left:0;background:#fff}
.runs svg{vertical-align:middle}.classes td{white-space:nowrap}.sure{font-weight:650}.classes th{max-width:9rem}
.axis{display:flex;justify-content:space-between;font-size:11px;width:220px}
"""


def comparison_page(
    comparison: Comparison,
    details: Mapping[str, Mapping[str, str]],
    weights: Mapping[str, str],
    facts: Mapping[str, Any],
) -> str:
    """The whole page as text.

    Args:
        comparison: Results and paired differences.
        details: Columns that say what each run is.
        weights: Hash of each run's weights.
        facts: What the episodes are and where all of it comes from, as in the comparison's JSON.
    """
    alike, apart = tell_apart(details)
    heading = f"{facts['dataset']}, {facts['split']}: {facts['way']}-way {facts['shot']}-shot, {len(details)} runs"
    parts = [
        f"<h1>{escape(heading)}</h1>",
        f"<p class=quiet>{escape(_asked(comparison, facts))}</p>",
        *(f"<p class=note>{escape(note)}</p>" for note in _notes(facts)),
        f"<h2>Accuracy and paired difference to {escape(comparison.baseline)}</h2>",
        f"<div class=scroll>{_runs(comparison, apart)}</div>",
        f"<p class=quiet>{EXPLAINED}",
        *([f"<p class=quiet>All runs: {escape(', '.join(map(' '.join, alike.items())))}."] if alike else ()),
        f"<h2>Per class</h2><div class=scroll>{_classes(comparison)}</div>",
        f"<p class=quiet>In colour: difference to {escape(comparison.baseline)} on the same queries, in points.",
        f"<h2>Provenance</h2>{table(_provenance(weights, facts))}",
    ]
    return document(heading, parts, style=STYLE)


def _asked(comparison: Comparison, facts: Mapping[str, Any]) -> str:
    one = comparison.results[comparison.baseline]
    return (
        f"{one.episodes:,} episodes, the same for all (seed {facts['eval_seed']}): {one.queries:,} queries of "
        f"{one.videos:,} videos, chance {one.chance:.1%}"
    )


def _notes(facts: Mapping[str, Any]) -> Iterator[str]:
    if facts["shuffled"]:
        yield "The frames of each clip were shuffled: this is a control."
    if len(facts["styles"]) > 1:
        styles = ", ".join(facts["styles"])
        yield f"The runs differ in recipe style ({styles}): more than their methods sets them apart."
    if facts["left_out"]:
        yield f"Left out, having too few videos: {', '.join(facts['left_out'])}."


def _runs(comparison: Comparison, apart: Mapping[str, Mapping[str, str]]) -> str:
    """A row for each run: what sets it apart, its accuracy, and its difference from the baseline."""
    columns = list(next(iter(apart.values())))
    accuracies, differences = _Scale.of_results(comparison), _Scale.of_differences(comparison)
    around = "<span class=quiet>± episodes / videos</span>"
    head = ["run", f"accuracy {around}", accuracies.axis(), f"difference {around}", differences.axis(), "excludes 0"]
    head += map(escape, columns)
    rows = [
        f"<tr><td><div class=name>{escape(name)}</div>{_accuracy(result, accuracies)}"
        f"{_difference(comparison.differences.get(name), differences)}"
        f"{''.join(f'<td>{escape(apart[name][column])}' for column in columns)}</tr>"
        for name, result in comparison.results.items()
    ]
    return f"<table class=runs><thead><tr>{''.join(f'<th>{cell}' for cell in head)}</tr></thead>{''.join(rows)}</table>"


def _accuracy(result: Result, scale: _Scale) -> str:
    halves = (result.interval_episodes, result.interval_videos)
    return f"<td>{result.accuracy:.1%} {_halves(halves)}<td>{scale.row(result.accuracy, halves, result.chance)}"


def _difference(difference: Difference | None, scale: _Scale) -> str:
    if difference is None:
        return "<td class=quiet>baseline<td><td>"
    halves = (difference.interval_episodes, difference.interval_videos)
    mark, verdict = ("sure", "yes") if difference.excludes_zero else ("quiet", "no")
    return (
        f"<td class={mark}>{100 * difference.value:+.1f} {_halves(halves)}"
        f"<td>{scale.row(difference.value, halves, 0.0)}<td class={mark}>{verdict} ({difference.judged_over})"
    )


def _halves(halves: Sequence[float | None]) -> str:
    """Both half widths in points: over episodes, over videos."""
    texts = ["?" if half is None else f"{100 * half:.1f}" for half in halves]
    return f"<span class=quiet title='95 % intervals over episodes / over videos'>± {' / '.join(texts)}</span>"


class _Scale:
    """One axis for the rows of a column; `mark` in `row` is chance, or no difference."""

    def __init__(self, values: Sequence[float], *, signed: bool) -> None:
        room = 0.05 * (max(values) - min(values)) + 0.005
        self._low, self._high, self._signed = min(values) - room, max(values) + room, signed
        if not signed:
            self._low, self._high = max(self._low, 0.0), min(self._high, 1.0)

    @classmethod
    def of_results(cls, comparison: Comparison) -> _Scale:
        return cls([v for r in comparison.results.values() for v in _ends(r.accuracy, r)], signed=False)

    @classmethod
    def of_differences(cls, comparison: Comparison) -> _Scale:
        return cls([0.0, *(v for d in comparison.differences.values() for v in _ends(d.value, d))], signed=True)

    def axis(self) -> str:
        ends = [f"{100 * end:+.0f}" if self._signed else f"{end:.0%}" for end in (self._low, self._high)]
        return f"<div class=axis><span>{ends[0]}</span><span>{ends[1]}</span></div>"

    def row(self, value: float, halves: Sequence[float | None], mark: float) -> str:
        middle, marks = HEIGHT / 2, []
        if self._low <= mark <= self._high:
            x = self._place(mark)
            marks.append(f'<line x1={x} x2={x} y1=0 y2={HEIGHT} stroke="#8c959f" stroke-dasharray="3 2" />')
        for half, stroke in zip(halves, STROKES, strict=True):
            if half is not None:
                low, high = self._place(value - half), self._place(value + half)
                marks.append(f"<line x1={low} x2={high} y1={middle} y2={middle} {stroke} />")
        marks.append(f'<circle cx={self._place(value)} cy={middle} r=3.5 fill="#1f2328" />')
        return f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' width={WIDTH} height={HEIGHT} role=img>{''.join(marks)}</svg>"

    def _place(self, value: float) -> str:
        return f"{WIDTH * (value - self._low) / (self._high - self._low):.1f}"


def _ends(value: float, of: Result | Difference) -> Iterator[float]:
    half = max(of.interval_episodes or 0.0, of.interval_videos or 0.0)
    yield from (value - half, value + half)


def _classes(comparison: Comparison) -> str:
    names = list(comparison.results)
    head = "".join(f"<th>{escape(name)}" for name in names)
    rows = []
    for of in sorted(comparison.results[comparison.baseline].per_class):
        cells = "".join(_of_class(comparison, name, of) for name in names)
        rows.append(f"<tr><td><div class=name>{escape(of)}</div>{cells}</tr>")
    return f"<table class=classes><thead><tr><th>class{head}</tr></thead>{''.join(rows)}</table>"


def _of_class(comparison: Comparison, name: str, of: str) -> str:
    accuracy, difference = f"{comparison.results[name].per_class[of]:.1%}", comparison.differences.get(name)
    if difference is None:
        return f"<td>{accuracy}"
    value = difference.per_class[of]
    colour = "26,127,55" if value > 0 else "209,36,47"
    strength = 0.6 * min(abs(value) / STRONGEST, 1)
    return f"<td style='background:rgba({colour},{strength:.2f})'>{accuracy} ({100 * value:+.1f})"


def _provenance(weights: Mapping[str, str], facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, sha256 in weights.items():
        yield f"weights of {name}", sha256
    yield "shards", facts["shards_sha256"]
    for split, sha256 in facts["splits_sha256"].items():
        yield f"split {split}", sha256
    yield "episodes", facts["episodes_sha256"] or f"drawn with seed {facts['eval_seed']}, groups {facts['groups']}"
    for key in ("fsar", "torch"):
        yield key, facts[key]
