"""The command `fsar-eval`: a trained run, or a pretrained trunk -> its accuracy on the episodes of a split."""

from __future__ import annotations

import sys
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fsar.config import build_config, read_recipe
from fsar.data import check_unlabelled, choose_device, open_episodes
from fsar.evaluation import evaluate
from fsar.results import coverage_text, describe
from fsar.run_state import choose_checkpoint, load_state
from fsar.training import build_model, frozen_prototypes
from shards_spec import ShardSet
from shards_spec.console import run_command
from shards_spec.errors import ConfigError
from shards_spec.files import json_bytes, write_whole

if TYPE_CHECKING:
    from fsar.config import RunConfig
    from fsar.evaluation import Result
    from fsar.methods import FewShotMethod

# Options of this command -> keys of the configuration that they replace.
KEYS = {
    "episodes": "test_episodes",
    "way": "test_way",
    "shot": "test_shot",
    "queries": "test_queries",
    "seed": "eval_seed",
    "groups": "groups",
    "small_classes": "small_classes",
    "unlabelled_per_class": "unlabelled_per_class",
    "distractor_classes": "distractor_classes",
    "device": "device",
    "precision": "precision",
    "executor": "executor",
}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--weights", type=click.Path(path_type=Path), help="A run folder of fsar-train.")
@click.option("--shards", "folder", type=click.Path(path_type=Path), required=True, help="Folder of the shards.")
@click.option("--split", default="test", show_default=True)
@click.option("--checkpoint", type=click.Choice(["best", "last"]), help="[default: best where there is one]")
@click.option("--method", help="Without --weights: a method that has nothing to train, such as prototype.")
@click.option("--trunk", help="Without --weights: name of the trunk.")
@click.option("--trunk-weights", help="Without --weights: a file, or fetch.")
@click.option("--episodes", type=click.IntRange(1), help="[default: the run's test_episodes]")
@click.option("--way", type=click.IntRange(2), help="[default: the run's test_way]")
@click.option("--shot", type=click.IntRange(1), help="[default: the run's test_shot]")
@click.option("--queries", type=click.IntRange(1), help="Per class.  [default: the run's test_queries]")
@click.option("--groups", type=click.Choice(["disjoint", "any"]), help="[default: the run's]")
@click.option("--small-classes", type=click.Choice(["refuse", "drop"]), help="Classes with too few videos.")
@click.option("--unlabelled-per-class", type=click.IntRange(0), help="[default: the run's]")
@click.option("--distractor-classes", type=click.IntRange(0), help="[default: the run's]")
@click.option("--seed", type=int, help="[default: the run's eval_seed]")
@click.option("--device", help="[default: the run's]")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="[default: the run's]")
@click.option("--executor", type=click.Choice(["auto", "dali", "portable"]), help="[default: the run's]")
@click.option("--shuffle-frames", "shuffled", is_flag=True, help="Shuffle the frames of each clip: a control.")
@click.option("--prototype-control", "control", is_flag=True, help="Also test prototypes of the untrained trunk.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the result as JSON.")
def cli(
    weights: Path | None,
    folder: Path,
    split: str,
    checkpoint: str | None,
    out: Path | None,
    *,
    method: str | None,
    trunk: str | None,
    trunk_weights: str | None,
    shuffled: bool,
    control: bool,
    **given: Any,  # noqa: ANN401 -- the options of KEYS
) -> None:
    """Evaluate a trained run on episodes of a split; the classes of `train` are no fair test.

    Without a run, prototypes of a pretrained trunk:
    fsar-eval --method prototype --trunk efficientnet-lite0 --trunk-weights fetch --shards DIR
    """
    if out is not None and not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}; make it first")
    config = _of_run(weights) if weights else _of_trunk(method, trunk, trunk_weights)
    if weights and (method or trunk):
        raise ConfigError(f"--method and --trunk are those of the run {weights}: leave them out, or --weights")
    if trunk_weights:
        config = replace(config, trunk_weights=trunk_weights)
    config = replace(config, **{KEYS[name]: value for name, value in given.items() if value is not None})
    with ShardSet.open(folder) as shards:
        device = choose_device(config.device)
        model = _model(config, weights, checkpoint).to(device)
        check_unlabelled(model, config)
        baseline = frozen_prototypes(config).to(device) if control else None
        assert model.trunk is not None
        loader = open_episodes(shards, split, config, trunk=model.trunk, device=device, training=False)
        test = partial(evaluate, episodes=config.test_episodes, precision=config.precision, shuffled=shuffled)
        with closing(loader):
            result = test(model, loader)
            table = describe(config, shards, model, result, device=device) | {"split": split, "shuffled": shuffled}
            if incomplete := coverage_text(shards):
                click.echo(incomplete)
            if loader.stream.dropped:
                click.echo(f"left out, having too few videos: {', '.join(loader.stream.dropped)}")
            table["left_out"] = list(loader.stream.dropped)
            _print(f"{config.method}, {config.test_way}-way {config.test_shot}-shot on {split}", result)
            if baseline is not None:
                result = test(baseline, loader)
                table["frozen_prototypes"] = result.to_json()
                _print("the same episodes, prototypes of the untrained trunk", result)
    if out:
        write_whole(out, json_bytes(table))


def _of_run(run: Path) -> RunConfig:
    if not (run / "config.toml").is_file():
        raise ConfigError(f"{run} is no run folder (it has no config.toml); give one that fsar-train wrote")
    return build_config(read_recipe(str(run / "config.toml")))


def _of_trunk(method: str | None, trunk: str | None, trunk_weights: str | None) -> RunConfig:
    """The configuration of a method that stands on a pretrained trunk alone."""
    if not method or not trunk:
        raise ConfigError("give --weights RUN, or --method prototype with --trunk and --trunk-weights")
    return build_config({"method": method, "trunk": trunk, "trunk_weights": trunk_weights or "", "num_classes": 1})


def _model(config: RunConfig, run: Path | None, checkpoint: str | None) -> FewShotMethod:
    model = build_model(config, weights=run is None)
    if run is not None:
        load_state(choose_checkpoint(run, checkpoint), model)
        return model
    trained = [name for name, value in model.named_parameters() if not name.startswith("trunk.") and value.ndim > 1]
    if trained:
        raise ConfigError(
            f"{config.method} has weights beyond its trunk ({trained[0]}, ...), which would be random: "
            "train it and give --weights RUN"
        )
    return model


def _print(what: str, result: Result) -> None:
    click.echo(f"{what}: {result}")
    for name, accuracy in sorted(result.per_class.items()):
        click.echo(f"  {name:32} {accuracy:.1%}")


def main() -> None:
    """Entry point."""
    sys.path.insert(0, "")  # the run's --method module:Class may lie in the current folder
    run_command(cli, again="nothing was written")


if __name__ == "__main__":
    main()
