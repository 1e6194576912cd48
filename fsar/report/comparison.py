"""A page that compares runs on the same episodes: accuracies, paired differences, classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from fsar.evaluation.accuracy import Result
from fsar.evaluation.comparison import Comparison, Difference, tell_apart
from fsar.report.drawings import Axis
from fsar.report.html import render

WIDTH = 220  # pixels of an axis
STRONGEST = 0.5  # difference in a class that has the full colour


class Run(NamedTuple):
    """A row of the page: a run, and the details that set it apart from the others.

    The baseline has no difference.
    """

    name: str
    result: Result
    difference: Difference | None
    details: Mapping[str, str]


def comparison_page(
    comparison: Comparison,
    details: Mapping[str, Mapping[str, str]],
    weights: Mapping[str, str],
    facts: Mapping[str, Any],
) -> str:
    """Write the whole page.

    Args:
        comparison: Results and paired differences.
        details: Run -> column -> text that describes the run.
        weights: Run -> hash of its weights.
        facts: The episodes and the provenance, as in the comparison's JSON.
    """
    alike, apart = tell_apart(details)
    differences = comparison.differences
    runs = [Run(name, result, differences.get(name), apart[name]) for name, result in comparison.results.items()]
    return render(
        "comparison.html",
        heading=f"{facts['dataset']}, {facts['split']}: {facts['way']}-way {facts['shot']}-shot, {len(details)} runs",
        summary=_summary(comparison.results[comparison.baseline], facts),
        notes=list(_notes(facts)),
        baseline=comparison.baseline,
        runs=runs,
        columns=list(runs[0].details),
        alike=alike,
        accuracies=_accuracy_axis(comparison),
        differences=_axis([0.0, *(end for one in differences.values() for end in _ends(one.value, one))]),
        classes=sorted(comparison.results[comparison.baseline].per_class),
        strongest=STRONGEST,
        provenance=list(_provenance(weights, facts)),
    )


def _summary(result: Result, facts: Mapping[str, Any]) -> str:
    return (
        f"{result.episodes:,} episodes, the same for all (seed {facts['eval_seed']}): {result.queries:,} queries of "
        f"{result.videos:,} videos, chance {result.chance:.1%}"
    )


def _notes(facts: Mapping[str, Any]) -> Iterator[str]:
    """Say all that a reader must know before the accuracies."""
    if facts["shuffled"]:
        yield "The frames of each clip were shuffled: this is a control."
    if len(facts["styles"]) > 1:
        styles = ", ".join(facts["styles"])
        yield f"The runs differ in recipe style ({styles}): more than their methods sets them apart."
    if facts["left_out"]:
        yield f"Left out, having too few videos: {', '.join(facts['left_out'])}."


def _accuracy_axis(comparison: Comparison) -> Axis:
    axis = _axis([end for one in comparison.results.values() for end in _ends(one.accuracy, one)])
    return Axis(max(axis.low, 0.0), min(axis.high, 1.0), WIDTH)


def _axis(values: list[float]) -> Axis:
    """Choose an axis that holds all values, with some room at both ends."""
    room = 0.05 * (max(values) - min(values)) + 0.005
    return Axis(min(values) - room, max(values) + room, WIDTH)


def _ends(value: float, of: Result | Difference) -> tuple[float, float]:
    """Give both ends of the wider interval."""
    half = max(of.interval_episodes or 0.0, of.interval_videos or 0.0)
    return value - half, value + half


def _provenance(weights: Mapping[str, str], facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """List the names and values that say where the comparison comes from."""
    for name, sha256 in weights.items():
        yield f"weights of {name}", sha256
    yield "shards", facts["shards_sha256"]
    for split, sha256 in facts["splits_sha256"].items():
        yield f"split {split}", sha256
    yield "episodes", facts["episodes_sha256"] or f"drawn with seed {facts['eval_seed']}, groups {facts['groups']}"
    for key in ("fsar", "torch"):
        yield key, facts[key]
