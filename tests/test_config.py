"""Recipes, their styles, and what is said of a value that does not fit."""

from __future__ import annotations

import pytest

from fsar.cli.options import overrides
from fsar.cli.train import resolve
from fsar.config import TYPES, build_config, choose_recipe, read_recipe, recipe_names
from fsar.data import training_rules
from fsar.styles import STYLES, WRITTEN_DECAY, restyle
from shards_spec.errors import ConfigError


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_holds_every_value_of_a_run(name: str) -> None:
    table = read_recipe(name)
    unlabelled = {"unlabelled_per_class", "distractor_classes", "distractors_per_class", "labelled_fraction"}
    assert set(TYPES) - set(table) <= {"num_classes", "labels", "tasks"} | unlabelled
    config = build_config(table)
    for key, value in table.items():
        assert config.flat()[key] == (tuple(value) if isinstance(value, list) else value)


def test_saved_configuration_reads_back_as_itself(tmp_path) -> None:
    config = resolve("ucf101", "molo", None, "fixed", {"lr": 3e-4, "recons_weight": 0.0})
    (tmp_path / "config.toml").write_text(config.to_toml())
    again = build_config(read_recipe(str(tmp_path / "config.toml")))
    assert again == config
    assert again.options["recons_weight"] == 0.0


def test_recipe_follows_from_data_set_method_and_shot() -> None:
    assert choose_recipe("synthetic", "molo", 1) == "demo"
    for dataset in WRITTEN_DECAY.keys() - {"epic"}:
        for shot in (1, 5):
            name = choose_recipe(dataset, "molo", shot)
            assert name == f"molo-{dataset}-{shot}shot"
            table = read_recipe(name)
            assert (table["shot"], table["test_shot"], table["dataset"]) == (shot, shot, dataset)


def test_a_recipe_of_one_and_five_shots_differs_in_nothing_else() -> None:
    for dataset in WRITTEN_DECAY.keys() - {"epic"}:
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


def test_styles_undo_each_other() -> None:
    for name in recipe_names():
        table = read_recipe(name)
        other = next(style for style in STYLES if style != table["recipe_style"])
        assert restyle(restyle(table, other), table["recipe_style"]) == table


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
        ("ucf101", "no.such:Thing", "cannot be imported"),
    ],
)
def test_unknown_names_are_refused(dataset: str, method: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        resolve(dataset, method, None, None, {})


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
