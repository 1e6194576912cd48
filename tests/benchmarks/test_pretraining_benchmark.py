"""The table of what pre-training gives: its rows can be trained, its differences are paired."""

from __future__ import annotations

import json
from types import SimpleNamespace

import click
import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.models.pretraining import VARIANTS, Answers, asked_of, config_of, main, table, train
from fsar.cli.options import overrides
from fsar.cli.pretrain import cli
from fsar.pretraining.config import all_keys, build_pretrain_config, read_pretrain_recipe

ALONE = np.full(4, -1, np.int64)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_each_row_is_a_recipe_with_one_thing_changed(variant) -> None:
    given = cli.make_context("fsar-pretrain", ["--shards", ".", "--out", "run", *variant.options]).params
    own = all_keys()
    changed = overrides({key: value for key, value in given.items() if key in own}, own)
    recipe = read_pretrain_recipe(f"{variant.method}-tiny")
    config, plain = build_pretrain_config(recipe | changed), build_pretrain_config(recipe)
    assert len(config.differences(plain)) == bool(variant.options)
    assert {each.name for each in VARIANTS} | {""} >= {variant.less}


def test_a_run_is_kept_only_where_it_is_what_is_asked(tmp_path) -> None:
    shards = SimpleNamespace(path=tmp_path, sha256="a", dataset=SimpleNamespace(name="synthetic"))
    asked, variant = ["--seed", "1", "--epochs", "2"], VARIANTS[2]
    (tmp_path / "config.toml").write_text(config_of("synthetic", asked_of(variant, asked)).to_toml())
    (tmp_path / "result.json").write_text(json.dumps({"shards_sha256": "a"}))
    train(shards, tmp_path, variant, asked)
    train(shards, tmp_path, variant, [*asked, "--threads", "1"])  # no result depends on it
    with pytest.raises(click.ClickException, match=r"epochs was 2, asked for 3.*name another --out"):
        train(shards, tmp_path, variant, ["--seed", "1", "--epochs", "3"])
    with pytest.raises(click.ClickException, match="dense_weight was 0"):
        train(shards, tmp_path, VARIANTS[1], asked)
    shards.sha256 = "b"
    with pytest.raises(click.ClickException, match="other shards"):
        train(shards, tmp_path, variant, asked)


def test_a_variant_that_is_none_is_refused_before_anything_is_written(tmp_path) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(main, ["--shards", str(tmp_path), "--out", str(out), "--variant", "fimma"])
    assert done.exit_code == 2
    assert "'fimma' is not one of" in done.output
    assert not out.exists()


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
