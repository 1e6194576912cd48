"""`report.html` of a run or an evaluation: result, curves, classes, examples, provenance."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fsar.report.drawings import Axis, Chart, chart
from fsar.report.examples import Examples
from fsar.report.html import render
from fsar.report.result import CONTROL_TEXTS
from fsar.run.folder import read_log
from shards_spec.peek.html import write_html

MOST_CLASSES = 40  # rows of the confusion matrix
MOST_NAMED, LONGEST_NAMED = 14, 26  # columns with names, letters of a name; beyond: numbers
CARD_WIDTH = 200  # pixels of the axis in a card


def write_report(
    run: Path, result: dict[str, Any], config: dict[str, Any], *, examples: Examples | None = None
) -> Path:
    """Write the page of a finished run from its result, configuration, log and examples.

    Raises:
        DiskError: the disk is full.
    """
    path = run / "report.html"
    write_html(path, page(run.name, result, config, read_log(run), examples=examples))
    return path


def page(
    title: str,
    result: dict[str, Any],
    config: dict[str, Any],
    log: list[dict[str, Any]],
    *,
    examples: Examples | None = None,
) -> str:
    """Write the whole page; with an empty log it is that of an evaluation."""
    test = result["test"]
    return render(
        "run.html",
        heading=f"{result['method']} on {result['dataset']}: {config['test_way']}-way {config['test_shot']}-shot",
        title=title,
        selection=_selection(result),
        notes=list(_notes(result)),
        cards=list(_cards(result)),
        axis=Axis(0.0, 1.0, CARD_WIDTH),
        charts=list(_charts(log)),
        test=test,
        classes=_class_rows(test),
        matrix=_matrix(test["confusion"]),
        examples=examples,
        provenance=list(provenance_rows(result)),
        config=config_rows(config),
    )


def _selection(result: dict[str, Any]) -> str:
    """Say which checkpoint or weights were tested."""
    if "selected_after" not in result:
        weights = result.get("weights_file") or f"checkpoint {result.get('checkpoint', 'of the trunk alone')}"
        chosen = result.get("selected_on", "last")
        return f"split {result['split']}, {weights}" + (f" chosen on {chosen}" if chosen != "last" else "")
    if result["selected_on"] == "last":
        return f"last checkpoint, after {result['selected_after']} episodes"
    return f"checkpoint chosen on {result['selected_on']}, after {result['selected_after']} episodes"


def _notes(result: dict[str, Any]) -> Iterator[str]:
    """Say all that a reader must know before the accuracy."""
    if result.get("shuffled"):
        yield "The frames of each clip were shuffled: this is a control."
    overlap = result.get("overlap") or {}
    if overlap.get("classes") or overlap.get("videos"):
        yield (
            f"Training saw {overlap['classes']} of these classes and {overlap['videos']} of these videos: "
            "this is no figure of novel classes."
        )
    if result.get("left_out"):
        yield f"Left out, having too few videos: {', '.join(result['left_out'])}."
    for split, (have, of) in result.get("coverage", {}).items():
        if have < of:
            yield f"Incomplete data set: {have:,} of {of:,} videos of split {split}."


class Card(NamedTuple):
    """An accuracy in a frame: of the test, or of one of its controls."""

    name: str
    test: dict[str, Any]
    over: list[str]


def _cards(result: dict[str, Any]) -> Iterator[Card]:
    names = {
        "test": "accuracy on novel classes",
        "shuffled_frames": "the same, each clip's frames shuffled",
    } | {name: f"the same, {text}" for name, text in CONTROL_TEXTS.items()}
    tests = {name: result[key] for key, name in names.items() if key in result}
    tests |= {f"the same, {stream} alone": test for stream, test in result.get("of_streams", {}).items()}
    for name, test in tests.items():
        yield Card(name, test, [_over_episodes(test), _over_videos(test)])


def _over_episodes(test: dict[str, Any]) -> str:
    if test["interval_episodes"] is None:
        return "over 1 episode: unknown"
    return f"± {test['interval_episodes']:.1%} over {test['episodes']} episodes"


def _over_videos(test: dict[str, Any]) -> str:
    if test["interval_videos"] is None:
        return f"over {test['videos']} videos: unknown, too few a class"
    return f"± {test['interval_videos']:.1%} over {test['videos']} videos (bootstrap)"


def _charts(log: list[dict[str, Any]]) -> Iterator[Chart]:
    training = [record for record in log if record["kind"] == "train" and "loss" in record]
    validation = [(record["n"], record["accuracy"]) for record in log if record["kind"] == "val"]
    if not training:
        return

    def curve(key: str) -> list[tuple[float, float]]:
        return [(record["n"], record[key]) for record in training]

    accuracy = {"training": curve("accuracy")} | ({"validation": validation} if validation else {})
    yield chart("accuracy", accuracy, low=0.0, high=1.0)
    yield chart("loss", {"loss": curve("loss")})
    yield chart("episodes per second", {"episodes/s": curve("episodes_per_s")}, low=0.0)
    yield chart("share of time waiting for data", {"wait": curve("data_wait")}, low=0.0, high=1.0)


class ClassRow(NamedTuple):
    """Accuracy of a class, and the wrong class that the largest `share` of it was taken for."""

    name: str
    accuracy: float
    taken_for: str
    share: float


def _class_rows(test: dict[str, Any]) -> list[ClassRow]:
    """List the classes, the best first."""
    ranked = sorted(test["per_class"].items(), key=lambda item: -item[1])
    return [ClassRow(name, accuracy, *_taken_for(name, test["confusion"].get(name, {}))) for name, accuracy in ranked]


def _taken_for(name: str, said: dict[str, int]) -> tuple[str, float]:
    """Find the wrong class that was said most often, and its share; without errors "" and 0."""
    wrong = [(count, other) for other, count in said.items() if other != name]
    count, other = max(wrong, default=(0, ""))
    return other, count / sum(said.values()) if wrong else 0.0


class MatrixRow(NamedTuple):
    """A class and the share of its queries that was taken for each class of the matrix."""

    name: str
    shares: list[float]


class Matrix(NamedTuple):
    """The confusion matrix, or that of the classes with the most errors.

    Attributes:
        classes: Number of all classes, also those that are not shown.
        numbered: Columns have numbers in place of names.
    """

    rows: list[MatrixRow]
    classes: int
    numbered: bool


def _matrix(confusion: dict[str, dict[str, int]]) -> Matrix:
    names = sorted(set(confusion) | {said for row in confusion.values() for said in row})
    shown = sorted(sorted(names, key=lambda name: -_share_wrong(name, confusion))[:MOST_CLASSES])
    rows = []
    for truth in shown:
        row = confusion.get(truth, {})
        total = max(sum(row.values()), 1)
        rows.append(MatrixRow(truth, [row.get(said, 0) / total for said in shown]))
    return Matrix(rows, len(names), len(shown) > MOST_NAMED or max(map(len, shown)) > LONGEST_NAMED)


def _share_wrong(name: str, confusion: dict[str, dict[str, int]]) -> float:
    """Compute the share of a class's queries that were taken for another."""
    row = confusion.get(name, {})
    return 1 - row.get(name, 0) / max(sum(row.values()), 1)


def provenance_rows(result: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """List the names and values that say where a result comes from."""
    for key in ("fsar", "torch", "device", "precision", "weights_sha256", "shards_sha256"):
        yield key, str(result[key])
    for split, sha256 in result["splits_sha256"].items():
        have = result["coverage"].get(split)
        yield f"split {split}", sha256 + (f" ({have[0]:,} of {have[1]:,} videos)" if have else "")


def config_rows(config: dict[str, Any]) -> list[tuple[str, str]]:
    """List the keys and values of a configuration."""
    return [(key, json.dumps(value)) for key, value in config.items()]
