"""Paired differences: narrower than unpaired ones where models agree, zero where they are equal, honest elsewhere."""

from __future__ import annotations

import csv
import io
import math

import numpy as np
import pytest

from fsar.evaluation.accuracy import Answers
from fsar.evaluation.comparison import compare, subtract
from shards_spec.errors import FsarError

CLASSES = [f"class {c}" for c in range(5)]
DETAILS = {"a": {"method": "molo", "style": "fixed"}, "b": {"method": "otam|x", "style": "fixed"}}


def two_models(
    rng: np.random.Generator, episodes: int, ease: np.ndarray, gain: np.ndarray, *, videos: int = 20
) -> tuple[Answers, Answers]:
    """Answers of two models to the same 5-way 1-shot episodes; a query that is easy for one is for the other.

    Video v of class v % 5 is answered right by the first with probability ease[v], by the second with ease + gain.
    """
    classes = rng.random((episodes, 5)).argsort(axis=1)  # [N, way]
    places = rng.random((episodes, 5, videos)).argsort(axis=2)
    support, query = places[..., 0] * 5 + classes, places[..., 1] * 5 + classes  # [N, way], queries in class order
    luck = rng.random((episodes, 5))  # shared by both models: what makes their answers correlate
    wrong = np.roll(classes, 1, axis=1)
    first, second = (np.where(luck < p[query], classes, wrong) for p in (ease, ease + gain))
    return tuple(Answers(classes, support, query, classes, said) for said in (first, second))


def test_the_paired_interval_is_narrower_and_that_of_equal_runs_is_zero() -> None:
    rng = np.random.default_rng(0)
    a, b = two_models(rng, 2000, rng.choice([0.2, 0.9], 100), np.full(100, 0.05))
    comparison = compare({"a": a, "b": b, "again": a}, CLASSES, baseline="a")
    results, paired, none = comparison.results, comparison.differences["b"], comparison.differences["again"]
    assert paired.value == pytest.approx(results["b"].accuracy - results["a"].accuracy)
    for kind in ("interval_episodes", "interval_videos"):
        unpaired = math.hypot(getattr(results["a"], kind), getattr(results["b"], kind))
        assert 0 < getattr(paired, kind) < unpaired / 2
        assert getattr(none, kind) == 0
    assert paired.excludes_zero
    assert not none.excludes_zero
    assert (paired.judged_over, none.value, set(none.per_class.values())) == ("videos", 0, {0})


def test_the_difference_of_a_small_case_by_hand() -> None:
    classes, support = np.array([[0, 1], [1, 0], [0, 1]]), np.array([[0, 2], [3, 1], [1, 2]])
    query = np.array([[1, 3], [2, 0], [0, 3]])
    a = Answers(classes, support, query, classes, np.array([[0, 1], [1, 1], [1, 1]]))  # right: 2, 1, 1
    b = Answers(classes, support, query, classes, np.array([[0, 1], [1, 0], [0, 0]]))  # right: 2, 2, 1
    difference = subtract(b, a, CLASSES)
    assert difference.value == pytest.approx(1 / 6)
    assert difference.interval_episodes == pytest.approx(1.96 * np.std([0, 0.5, 0], ddof=1) / math.sqrt(3))
    assert difference.per_class == {"class 0": pytest.approx(2 / 3), "class 1": pytest.approx(-1 / 3)}
    assert (difference.interval_videos, difference.judged_over) == (None, "episodes")  # no spare videos


def test_the_interval_over_videos_covers_the_true_difference() -> None:
    """Draw the videos anew many times: about 95 intervals in 100 must hold the difference over all videos."""
    rng = np.random.default_rng(1)
    hits, short = [], []
    for _ in range(60):
        hard = rng.random(100) < 0.5
        gain = np.where(rng.random(100) < 0.5, 0.3, -0.1)  # 0.1 over all videos
        difference = subtract(*reversed(two_models(rng, 1000, np.where(hard, 0.2, 0.6), gain)), CLASSES)
        hits.append(abs(difference.value - 0.1) <= difference.interval_videos)
        short.append(abs(difference.value - 0.1) <= difference.interval_episodes)
    assert np.mean(hits) >= 0.9
    assert np.mean(short) < np.mean(hits)  # the interval over episodes does not know that other videos exist


def test_answers_to_other_episodes_are_refused() -> None:
    rng = np.random.default_rng(2)
    a, b = two_models(rng, 4, np.full(100, 0.5), np.zeros(100))
    for column in ("classes", "support", "query", "truth"):
        other = getattr(b, column).copy()
        other[2, 0] += 5
        with pytest.raises(FsarError, match="not asked the same: episode 2"):
            compare({"a": a, "b": Answers(**{**vars(b), column: other})}, CLASSES, baseline="a")
    with pytest.raises(FsarError, match="different numbers"):
        compare({"a": a, "b": Answers(*(column[:3] for column in vars(b).values()))}, CLASSES, baseline="a")


def test_tables_say_what_the_comparison_says() -> None:
    rng = np.random.default_rng(3)
    a, b = two_models(rng, 300, np.full(100, 0.4), np.full(100, 0.3))
    comparison = compare({"a": a, "b": b}, CLASSES, baseline="a")
    rows = list(csv.DictReader(io.StringIO(comparison.to_csv(DETAILS))))
    assert len(rows) == 2 * (1 + len(CLASSES))
    overall = {row["run"]: row for row in rows if row["scope"] == "overall"}
    assert float(overall["b"]["difference"]) == comparison.differences["b"].value
    assert float(overall["b"]["difference_interval_videos"]) == comparison.differences["b"].interval_videos
    assert (overall["b"]["excludes_zero"], overall["b"]["method"]) == ("true", "otam|x")
    assert overall["a"]["difference"] == overall["a"]["excludes_zero"] == ""
    by_class = {(row["run"], row["class"]): row for row in rows if row["scope"] == "class"}
    assert float(by_class["a", "class 3"]["accuracy"]) == comparison.results["a"].per_class["class 3"]
    text = comparison.to_markdown(DETAILS)
    lines = [line.replace("\\|", "") for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines[:4]}) == 1  # a name with a bar in it splits no cell
    assert "style fixed" in text.split("\n\n")[0]  # alike in all, said once
    assert "yes (videos)" in lines[3]
    assert f"{100 * comparison.differences['b'].value:+.1f}" in lines[3]
