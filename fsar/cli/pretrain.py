"""Train a video trunk from shards without labels and write its curves and a report.

The command `fsar-pretrain`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch

from fsar.checkpoints import join_records, load_training_record, weights_sha256
from fsar.cli.help import GroupedCommand, option
from fsar.cli.launch import launch
from fsar.cli.options import check_option, default_text, key_options, overrides
from fsar.evaluation.overlap import training_record
from fsar.pretraining import PRETRAINING
from fsar.pretraining.batches import ViewLoader
from fsar.pretraining.config import (
    PretrainConfig,
    all_keys,
    build_pretrain_config,
    choose_pretrain_recipe,
    pretrain_config_of,
    pretrain_recipe_names,
    read_pretrain_recipe,
)
from fsar.pretraining.trainer import Pretrainer, build_pretraining, check_queue
from fsar.report.pretraining import draw_pictures, write_pretrain_report
from fsar.report.result import coverage_text, describe_data, provenance
from fsar.run import ranks
from fsar.run.config import METHOD, OUTPUT
from fsar.run.device import choose_device
from fsar.run.folder import begin_run, check_is_run, check_resumable, check_same_data, last_checkpoint
from fsar.run.keys import Key
from fsar.run.recipes import shipped
from fsar.run.weights import training_record_of
from shards_spec import ShardSet
from shards_spec.cli.console import shards_option
from shards_spec.errors import ConfigError
from shards_spec.files import json_bytes, write_whole
from shards_spec.remote.shards import RemoteShards


def _default(key: Key) -> str:
    return default_text(key, shipped("pretraining.toml").values())


def _show_recipes(context: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo("\n".join(pretrain_recipe_names()))
        context.exit()


@click.command(cls=GroupedCommand, more="Add --print-config to a command to see every value of its run.")
@shards_option()
@option("--method", group=METHOD, help=f"One of {', '.join(PRETRAINING)}.  [default: the recipe's]")
@option("--recipe", group=METHOD, help="Name of a recipe, or a TOML file.  [default: by data set and method]")
@option("--recipes", group=METHOD, is_flag=True, is_eager=True, expose_value=False, callback=_show_recipes,
        help="List the recipes and exit.")  # fmt: skip
@check_option
@key_options(all_keys(), _default)
@option("--out", "run", group=OUTPUT, type=click.Path(path_type=Path), required=True, help="Run folder.")
@option("--resume", group=OUTPUT, is_flag=True, help="Go on from the last checkpoint of the run folder.")
@option("--print-config", group=OUTPUT, is_flag=True, help="Print the whole configuration as a recipe and exit.")
def cli(
    folder: Path | RemoteShards,
    method: str | None,
    recipe: str | None,
    run: Path,
    *,
    resume: bool,
    print_config: bool,
    check: bool,
    **command_options: Any,  # noqa: ANN401 -- the keys of the configuration
) -> None:
    """Train a video trunk from shards without labels.

    A recipe is chosen by data set and method, and gives every value that is not given here: see
    them with --print-config.  The run folder gets config.toml, log.jsonl, a checkpoint, result.json
    and report.html; give it to fsar-probe, or to fsar-train as --trunk-weights.

    \b
    fsar-pretrain --shards shards/ucf101 --method fima --lists ucfTrainTestlist --out runs/fima
    """  # noqa: D301 -- \b is click's mark of lines to be left as they are
    with ShardSet.open(folder, check=check) as shards:
        if resume and recipe is None:
            check_is_run(run)
            recipe = str(run / "config.toml")
        config = resolve(shards.dataset.name, method, recipe, overrides(command_options, all_keys()))
        if print_config:
            click.echo(config.to_toml(), nl=False)
            return
        device = choose_device(config.device)
        result = pretrain(config, shards, run, device=device, resume=resume)
    if ranks.is_first():
        report = write_pretrain_report(run, result, config.flat())
        click.echo(f"result: {run / 'result.json'}; report: {report}")


def resolve(dataset: str, method: str | None, recipe: str | None, command_options: dict[str, Any]) -> PretrainConfig:
    """Make the configuration of a run: the recipe, then the options that were set.

    Raises:
        ConfigError: unknown names or values, or neither a recipe nor a method.
    """
    if not (recipe or method):
        raise ConfigError(f"name a method with --method ({', '.join(PRETRAINING)}), or a recipe with --recipe")
    name = recipe or choose_pretrain_recipe(dataset, str(method))
    click.echo(f"recipe: {name}" + ("" if recipe else f" (for data set {dataset})"), err=True)
    table = read_pretrain_recipe(name)
    return build_pretrain_config(table | command_options | ({"method": method} if method else {}))


def pretrain(
    config: PretrainConfig, shards: ShardSet, run: Path, *, device: torch.device, resume: bool
) -> dict[str, Any]:
    """Train to the end and write `result.json`."""
    if resume:
        check_is_run(run)
        check_resumable(run, config, pretrain_config_of(run))
    with ViewLoader(config, shards, device=device) as views:
        data = describe_data(shards) | ({"videos": views.videos.sha256(shards)} if config.lists else {})
        if resume:
            check_same_data(run, data, shards.path)
        check_queue(config, len(views.rows))
        samples = config.epochs * views.epoch_steps * config.batch
        model = build_pretraining(config, samples=samples, weights=not resume).to(device)
        if resume:
            before = load_training_record(last_checkpoint(run))
        else:
            before = training_record_of(config.weights, option="--weights")
        if not resume and ranks.is_first():
            begin_run(run, config, data, option="--out")
        record = join_records(training_record(shards, views.rows, source=views.videos.text), before)
        trainer = Pretrainer(config, model, views, run, trained_on=record, resume=resume)
        _announce(trainer, views, shards, device)
        trainer.train()
        result = describe_pretraining(trainer, views, shards, device=device)
        if ranks.is_first():
            write_whole(run / "result.json", json_bytes(result))
            draw_pictures(run, config, shards, views.rows, model, device=device)
    return result


def describe_pretraining(
    trainer: Pretrainer, views: ViewLoader, shards: ShardSet, *, device: torch.device
) -> dict[str, Any]:
    """Describe a finished run, for result.json."""
    config, progress = trainer.config, trainer.progress
    return {
        "method": config.method,
        "trunk": config.trunk,
        "dataset": shards.dataset.name,
        "split": None if config.lists else config.split,
        "training": views.videos.text,
        "listed_but_not_stored": views.videos.absent,
        "starting_weights": config.weights or "random",
        "videos": len(views.rows),
        "videos_too_short": views.skipped,
        "epochs": config.epochs,
        "batch": config.batch,
        "steps": progress.n,
        "steps_skipped": progress.skipped_steps,
        "seconds": progress.seconds,
        "processes": ranks.count(),
        "trunk_sha256": weights_sha256(trainer.model.encoder),
    } | provenance(shards, trainer.model, device=device, precision=config.precision)


def _announce(trainer: Pretrainer, views: ViewLoader, shards: ShardSet, device: torch.device) -> None:
    config, model = trainer.config, trainer.model
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    own = sum(parameter.numel() for parameter in model.encoder.parameters())
    where = f"{ranks.count()} processes, the first on {device}" if ranks.count() > 1 else f"on {device}"
    click.echo(
        f"{config.method} with trunk {config.trunk}: {trained / 1e6:.2f} M trained parameters, {own / 1e6:.2f} M of "
        f"them the trunk's, {where}, {config.precision}"
    )
    click.echo(
        f"data set {views.videos.text}: {len(views.rows):,} videos, {views.epoch_steps} steps an epoch; "
        f"run folder {trainer.run}"
    )
    if views.videos.absent:
        click.echo(f"listed, but not stored: {views.videos.absent:,} videos")
    if views.skipped:
        click.echo(f"left out, being too short for these clips: {views.skipped:,} videos")
    if incomplete := coverage_text(shards):
        click.echo(incomplete)
    if trainer.progress.n:
        click.echo(f"resumed after {trainer.progress.n} of {trainer.steps} steps")


def main() -> None:
    """Entry point."""
    launch(cli, again="add --resume to the same command to go on from the last checkpoint")


if __name__ == "__main__":
    main()
