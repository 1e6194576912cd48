"""Recipes, their styles, and what is said of a value that does not fit."""

from __future__ import annotations

import json

import pytest

from fsar.cli.options import overrides
from fsar.cli.train import resolve
from fsar.run.build import training_rules
from fsar.run.config import all_keys, build_config
from fsar.run.method_keys import EXPLAINED
from fsar.run.recipes import STYLES, paper_rows, read_recipe
from shards_spec.errors import ConfigError


def test_saved_configuration_reads_back_as_itself(tmp_path) -> None:
    config = resolve("ucf101", "molo", None, "fixed", {"lr": 3e-4, "recons_weight": 0.0})
    (tmp_path / "config.toml").write_text(config.to_toml())
    again = build_config(read_recipe(str(tmp_path / "config.toml")))
    assert again == config
    assert again.options["recons_weight"] == 0.0


def test_a_recipe_of_one_and_five_shots_differs_in_nothing_else() -> None:
    for dataset in {dataset for method, dataset, _ in paper_rows() if method == "molo"}:
        one, five = (read_recipe(f"molo-{dataset}-{shot}shot") for shot in (1, 5))
        assert {key for key in one if one[key] != five[key]} == {"shot", "test_shot"}


@pytest.mark.parametrize(
    ("dataset", "style", "values"),
    [
        ("ucf101", None, ("reference", "reference", "random", "reference", 1e-3, True)),
        ("ucf101", "fixed", ("single", "none", "centre", "whole", 5e-4, True)),
        ("kinetics100", None, ("reference", "reference", "centre", "reference", 1e-3, True)),
        ("ssv2-small", None, ("reference", "reference", "random", "reference", 1e-3, True)),
        ("ssv2-small", "fixed", ("single", "none", "centre", "whole", 5e-5, False)),
    ],
)
def test_a_style_sets_every_loop_option(dataset: str, style: str | None, values: tuple) -> None:
    config = resolve(dataset, "molo", None, style, {})
    keys = ("lr_clock", "decay_norms", "test_frames", "kinetics_window", "weight_decay", "query_flip")
    assert tuple(getattr(config, key) for key in keys) == values
    assert resolve(dataset, "molo", None, style, {"weight_decay": 0.25}).weight_decay == 0.25


def test_the_kinetics_window_reaches_the_frames() -> None:
    rules = [training_rules(resolve("kinetics100", "molo", None, style, {})) for style in STYLES]
    assert [rule.frame_rule for rule in rules] == ["kinetics", "kinetics-whole"]


def test_recipe_for_another_method_leaves_its_own_options_out(capsys: pytest.CaptureFixture[str]) -> None:
    config = resolve("synthetic", "prototype", "demo", None, {"metric": "euclidean"})
    assert config.method == "prototype"
    weight = read_recipe("demo")["classification_weight"]
    assert config.options == {"classification_weight": weight, "metric": "euclidean"}
    assert "recons_weight" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"lr_clock": "single"}, "a run follows one style throughout"),
        ({"epsodes": 4}, 'did you mean "episodes"'),
        ({"episodes": "4"}, "expected a whole number"),
        ({"lr_steps": [0, "x"]}, "expected a list of numbers"),
        ({"precision": "fp16"}, "bf16"),
        ({"val_every": 3}, "no multiple of episodes_per_step"),
        ({"log_every": 0}, "at least 1"),
        ({"test_episodes": 0}, "at least 1"),
        ({"lr": -1.0}, "above 0"),
        ({"lr": float("inf")}, "finite"),
        ({"seed": -1}, "at least 0"),
        ({"lr_factors": [1.0]}, "equally long"),
        ({"position_scale": [1.0]}, "two numbers"),
        ({"tasks": "augment", "distractor_classes": 1}, "no unlabelled videos"),
        ({"tasks": "augment", "class_text": "file"}, "leave class_text out"),
        ({"labels": "clusters.csv", "class_text": "file"}, "leave class_text out"),
    ],
)
def test_bad_values_are_named(given: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        resolve("ucf101", "molo", None, None, given)


@pytest.mark.parametrize(
    ("dataset", "method", "sentence"),
    [
        ("ucf101", "mola", 'did you mean "molo"'),
        ("nowhere", "molo", "no recipe ships for data set"),
        ("ucf11", "trx", 'did you mean "trx-ucf101-1shot" or '),
        ("epic", "molo", "molo, 1-shot; choose one with --recipe"),
        ("ucf101", "no.such:Thing", "cannot be imported"),
    ],
)
def test_unknown_names_are_refused(dataset: str, method: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        resolve(dataset, method, None, None, {})


def test_the_number_of_shots_chooses_a_recipe_or_changes_one() -> None:
    config = resolve("ucf101", "hyrsm++", None, None, {"shot": 3})
    assert (config.shot, config.test_shot, config.queries) == (3, 3, 5)
    config = resolve("ucf101", "hyrsm++", "hyrsm++-ucf101-1shot", None, {"shot": 3})
    assert (config.shot, config.test_shot, config.queries) == (3, 1, 7)


def test_a_recipe_may_train_with_other_shots_than_it_tests(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    table = read_recipe("otam-ucf101-5shot") | {"shot": 1}
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items()))
    assert resolve("ucf101", "otam", str(recipe), None, {"shot": 5}).shot == 1
    sentence = "trained 1-shot and tested 5-shot, as the recipe says; give --test-shot too to change it"
    assert sentence in capsys.readouterr().err.splitlines()
    assert resolve("ucf101", "otam", str(recipe), None, {"shot": 5, "test_shot": 5}).shot == 5
    assert resolve("ucf101", "otam", str(recipe), None, {"shot": 2}).shot == 2
    assert resolve("ucf101", "otam", "otam-ucf101-5shot", None, {"shot": 5}).shot == 5
    assert "trained" not in capsys.readouterr().err


def test_option_texts_become_values() -> None:
    given = {"lr": "1e-3", "episodes": "8", "random_crop": "false", "lr_steps": "0,2", "way": None, "temperature": "2"}
    assert overrides(given) == {
        "lr": 1e-3,
        "episodes": 8,
        "random_crop": False,
        "lr_steps": [0.0, 2.0],
        "temperature": 2.0,
    }
    assert overrides({"temperature": "1e-3"}) == {"temperature": 1e-3}
    with pytest.raises(ConfigError, match="--lr fast: expected a number"):
        overrides({"lr": "fast"})


def test_the_help_explains_every_key_of_the_loop() -> None:
    assert [key.name for key in all_keys().values() if not (key.own_option or (key.help and key.group))] == []
    assert EXPLAINED.keys() <= all_keys().keys()
