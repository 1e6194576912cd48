"""The command `fsar-eval`: a trained run -> its accuracy on the episodes of a split."""

from __future__ import annotations

import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from fsar.config import build_config, read_recipe
from fsar.data import choose_device, open_source
from fsar.evaluation import evaluate, shuffle_frames
from fsar.results import describe
from fsar.run_state import load_state
from fsar.training import build_model
from shards_spec import ShardSet
from shards_spec.console import run_command
from shards_spec.errors import ConfigError
from shards_spec.files import json_bytes, write_whole


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--weights", type=click.Path(path_type=Path), required=True, help="A run folder of fsar-train.")
@click.option("--shards", "folder", type=click.Path(path_type=Path), required=True, help="Folder of the shards.")
@click.option("--split", default="test", show_default=True)
@click.option("--checkpoint", type=click.Choice(["best", "last"]), help="[default: best where there is one]")
@click.option("--episodes", type=click.IntRange(1), help="[default: the run's test_episodes]")
@click.option("--way", type=click.IntRange(2), help="[default: the run's test_way]")
@click.option("--shot", type=click.IntRange(1), help="[default: the run's test_shot]")
@click.option("--queries", type=click.IntRange(1), help="Per class.  [default: the run's test_queries]")
@click.option("--seed", type=int, help="[default: the run's eval_seed]")
@click.option("--device", help="[default: the run's]")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="[default: the run's]")
@click.option("--shuffle-frames", "shuffled", is_flag=True, help="Shuffle the frames of each clip: a control.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the result as JSON.")
def cli(
    weights: Path,
    folder: Path,
    split: str,
    checkpoint: str | None,
    out: Path | None,
    *,
    shuffled: bool,
    episodes: int | None,
    way: int | None,
    shot: int | None,
    queries: int | None,
    seed: int | None,
    device: str | None,
    precision: str | None,
) -> None:
    """Evaluate a trained run on episodes of a split; the classes of `train` are no fair test."""
    if not (weights / "config.toml").is_file():
        raise ConfigError(f"{weights} is no run folder (it has no config.toml); give one that fsar-train wrote")
    if out is not None and not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}; make it first")
    config = build_config(read_recipe(str(weights / "config.toml")))
    given: dict[str, Any] = {"test_episodes": episodes, "test_way": way, "test_shot": shot, "test_queries": queries}
    given |= {"eval_seed": seed, "device": device, "precision": precision}
    config = replace(config, **{key: value for key, value in given.items() if value is not None})
    with ShardSet.open(folder) as shards:
        place = choose_device(config.device)
        model = build_model(config, weights=False).to(place)
        load_state(_checkpoint(weights, checkpoint), model)
        assert model.trunk is not None
        source = open_source(shards, split, config, trunk=model.trunk, device=place, training=False)
        with closing(source):
            result = evaluate(
                model,
                source,
                config.test_episodes,
                classes=shards.dataset.classes,
                precision=config.precision,
                change=shuffle_frames if shuffled else None,
            )
        click.echo(f"{config.method}, {config.test_way}-way {config.test_shot}-shot on {split}: {result}")
        for name, accuracy in sorted(result.per_class.items()):
            click.echo(f"  {name:32} {accuracy:.1%}")
        if out:
            table = describe(config, shards, model, result, device=place) | {"split": split, "shuffled": shuffled}
            write_whole(out, json_bytes(table))


def _checkpoint(run: Path, name: str | None) -> Path:
    best, last = (run / "checkpoints" / f"{which}.safetensors" for which in ("best", "last"))
    if name is None:
        return best if best.exists() else last
    return best if name == "best" else last


def main() -> None:
    """Entry point."""
    sys.path.insert(0, "")  # the run's --method module:Class may lie in the current folder
    run_command(cli, again="nothing was written")


if __name__ == "__main__":
    main()
