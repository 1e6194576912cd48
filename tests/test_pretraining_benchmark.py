"""The table of what pre-training gives: its rows can be trained, its differences are paired."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.pretraining import VARIANTS, Answers, table
from fsar.cli.options import overrides
from fsar.cli.pretrain import cli
from fsar.pretrain_config import TYPES, all_option_types, build_pretrain_config, read_pretrain_recipe

ALONE = np.full(4, -1, np.int64)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_each_row_is_a_recipe_with_one_thing_changed(variant) -> None:
    given = cli.make_context("fsar-pretrain", ["--shards", ".", "--out", "run", *variant.options]).params
    own = TYPES | all_option_types()
    changed = overrides({key: value for key, value in given.items() if key in own}, own)
    recipe = read_pretrain_recipe(f"{variant.method}-tiny")
    config, plain = build_pretrain_config(recipe | changed), build_pretrain_config(recipe)
    assert len(config.differences(plain)) == bool(variant.options)
    assert {each.name for each in VARIANTS} | {""} >= {variant.less}


def test_differences_are_paired_over_the_mean_of_the_seeds() -> None:
    ours, others = Answers(), Answers()
    for seed in ("1110", "1100"):
        ours.add({"R@1": seed})
    others.add({"R@1": "1000"})
    figures = ours.figures(ALONE)["R@1"]
    assert (figures["value"], figures["seeds"]) == (0.625, [0.75, 0.5])
    # differences of the videos: 0, 1, 0.5, 0
    half = 1.959964 * np.std([0, 1, 0.5, 0], ddof=1) / 2
    assert ours.less(others, ALONE)["R@1"] == {"value": 0.375, "interval": pytest.approx(half, abs=1e-4)}
    one = {"value": 0.5, "interval": None}
    rows = [{"name": "fima", "R@1": one, "R@5": one, "knn": one, "less_moco": {"R@1": one, "knn": one}}]
    assert "| fima | 50.0 | 50.0 | 50.0 |  |  | +50.0 | +50.0 |" in table(rows)
