"""The help of the commands: short by default, complete on demand, and an answer to a wrong option."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from fsar.cli import evaluate, pretrain, probe, train
from fsar.pretraining import config as pretraining
from fsar.run import config
from fsar.run.names import MEANINGS, suggest_key
from shards_spec.cli.console import run_command
from shards_spec.errors import ConfigError

COMMANDS = {"fsar-train": train.cli, "fsar-pretrain": pretrain.cli, "fsar-eval": evaluate.cli, "fsar-probe": probe.cli}


def help_of(command: click.Command, option: str, width: int = 100) -> str:
    done = CliRunner(env={"COLUMNS": str(width)}).invoke(command, [option], prog_name="fsar", terminal_width=width)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_the_short_help_shows_some_twenty_options_and_says_how_to_see_all(command: click.Command) -> None:
    short, every = help_of(command, "--help"), help_of(command, "--help-all")
    shown = [line for line in short.splitlines() if line.startswith(("  --", "  -h"))]
    assert 18 <= len(shown) <= 28
    assert "fsar --help-all lists" in " ".join(short.split())
    names = {name for param in command.params for name in param.opts if name.startswith("--")}
    assert {name for name in names if name not in every} == set()
    assert "\n  fsar-" in short, "an example"


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_the_help_fits_the_terminal(command: click.Command, width: int) -> None:
    for option in ("--help", "--help-all"):
        lines = help_of(command, option, width).splitlines()
        assert max(len(line) for line in lines if not line.startswith("  fsar-")) <= width  # examples are not wrapped


WRONG = {
    "--shard": "--shards",
    "--epochs": "--episodes",
    "--batch-size": "--episodes-per-step",
    "--learning-rate": "--lr",
    "--lerning-rate": "--lr",
    "--gpus": "--device",
    "--backbone": "--trunk",
    "--n-way": "--way",
    "--k-shot": "--shot",
    "--workers": "--threads",
    "--output-dir": "--run",
    "--dataset": "--shards",
    "--test_shot": "--test-shot",
    "--pretrained": "--trunk-weights",
    "--wd=1e-3": "--weight-decay",
}


@pytest.mark.parametrize(("given", "meant"), WRONG.items())
def test_a_wrong_option_is_answered_in_one_sentence(
    given: str, meant: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["fsar-train", "--shards", "shards", given])
    with pytest.raises(SystemExit) as left:
        run_command(train.cli)
    assert left.value.code == 2
    name = given.partition("=")[0]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"fsar-train has no option {name}; did you mean {meant}?")


def test_a_command_is_offered_only_what_it_has() -> None:
    for given, meant in {"--batch-size": "--batch", "--output-dir": "--out", "--pretrained": "--weights"}.items():
        with pytest.raises(ConfigError, match=f"fsar-pretrain has no option {given}; did you mean {meant}\\?"):
            pretrain.cli.make_context("fsar-pretrain", [given])
    with pytest.raises(ConfigError, match="fsar-pretrain has no option --k-shot; --help-all lists"):
        pretrain.cli.make_context("fsar-pretrain", ["--k-shot"])


def test_a_key_of_a_recipe_is_answered_by_its_meaning() -> None:
    with pytest.raises(ConfigError, match='unknown key "learning_rate" for method otam; did you mean "lr"'):
        config.build_config({"method": "otam", "trunk": "tiny", "learning_rate": 1.0})
    with pytest.raises(ConfigError, match='unknown key "batch_size" for method moco; did you mean "batch"'):
        pretraining.build_pretrain_config({"method": "moco", "trunk": "tiny3d", "batch_size": 4})
    assert suggest_key("zzqq", ["lr", "way"]) == "known: lr, way"


def test_every_meaning_is_an_option_of_a_command() -> None:
    known = {
        name.lstrip("-").replace("-", "_") for each in COMMANDS.values() for param in each.params for name in param.opts
    }
    assert {ours for names in MEANINGS.values() for ours in names} <= known


def test_the_options_of_an_evaluation_are_keys_of_a_run() -> None:
    replaced = {"episodes": "test_episodes", "way": "test_way", "shot": "test_shot", "queries": "test_queries"}
    replaced |= {"seed": "eval_seed"}
    same = ("groups", "small_classes", "unlabelled_per_class", "distractor_classes", "distractors_per_class")
    same += ("device", "precision", "executor", "class_text", "views")
    same += ("streams", "motion_series", "fields", "camera", "stream_weight")
    assert replaced | {name: name for name in same} == evaluate.REPLACED


def test_a_resumed_run_may_differ_in_what_no_result_depends_on() -> None:
    free = {name for name, key in config.KEYS.items() if key.free}
    assert free == {"device", "executor", "threads", "prefetch", "log_every", "test_episodes", "graph"} | {
        "checkpoint_activations",
        "checkpoint_parts",
        "feature_cache",
    }
    free = {name for name, key in pretraining.KEYS.items() if key.free}
    assert free == {"device", "executor", "threads", "prefetch", "log_every", "checkpoint_every"} | {
        "checkpoint_activations",
        "checkpoint_parts",
    }
