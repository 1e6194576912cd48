"""Train a few-shot model from shards, test it on novel classes and write a report.

The command `fsar-train`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch

from fsar.cli.help import GroupedCommand, option
from fsar.cli.launch import launch
from fsar.cli.options import check_option, default_text, key_options, overrides
from fsar.evaluation.accuracy import Result, answer, evaluate, summarise
from fsar.evaluation.overlap import find_overlap
from fsar.loader import EpisodeLoader
from fsar.methods import METHODS, find_method, method_options
from fsar.report.examples import Examples, collect_examples
from fsar.report.result import CONTROL_TEXTS, coverage_text, describe, describe_data, of_streams, stream_lines
from fsar.report.run import write_report
from fsar.run import ranks
from fsar.run.build import (
    build_stream,
    class_text_sha256,
    frozen_prototypes,
    open_episodes,
    training_labels,
    untrained_motion,
)
from fsar.run.config import METHOD, OUTPUT, RunConfig, all_keys, build_config
from fsar.run.device import choose_device
from fsar.run.folder import begin_run, check_is_run, check_resumable, check_same_data
from fsar.run.keys import Key
from fsar.run.recipes import STYLES, choose_recipe, list_recipes, read_recipe, recipe_tables, restyle
from fsar.training.trainer import Trainer
from pipelines.episodes.labels import labels_sha256
from pipelines.episodes.stream import EpisodeStream
from shards_spec import ShardSet
from shards_spec.cli.console import shards_option
from shards_spec.errors import ConfigError
from shards_spec.files import json_bytes, write_whole
from shards_spec.remote.shards import RemoteShards


def _default(key: Key) -> str:
    return default_text(key, recipe_tables().values())


def _show_recipes(context: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(list_recipes())
        context.exit()


@click.command(cls=GroupedCommand, more="Add --print-config to a command to see every value of its run.")
@shards_option()
@option("--method", group=METHOD,
        help=f"One of {', '.join(METHODS)}, or module:Class.  [default: the recipe's, or molo]")  # fmt: skip
@option("--recipe", group=METHOD, help="Name of a recipe, or a TOML file.  [default: by data set, method and shot]")
@option("--recipes", group=METHOD, is_flag=True, is_eager=True, expose_value=False, callback=_show_recipes,
        help="List the recipes and exit.")  # fmt: skip
@option("--recipe-style", group=METHOD, main=False, help=f"One of {', '.join(STYLES)}.  [default: the recipe's]")
@check_option
@key_options(all_keys(), _default)
@option("--run", group=OUTPUT, type=click.Path(path_type=Path),
        help="Run folder.  [default: runs/METHOD-DATASET-Nshot]")  # fmt: skip
@option("--resume", group=OUTPUT, is_flag=True, help="Go on from the last checkpoint of the run folder.")
@option("--shuffle-control", group=OUTPUT, main=False, is_flag=True,
        help="Also test with the frames of each clip shuffled.")  # fmt: skip
@option("--prototype-control", group=OUTPUT, main=False, is_flag=True,
        help="Also test prototypes of the trunk's starting weights.")  # fmt: skip
@option("--motion-control/--no-motion-control", group=OUTPUT, main=False, default=True, show_default=True,
        help="Also test stored motion without training, if the shards hold it.")  # fmt: skip
@option("--print-config", group=OUTPUT, is_flag=True, help="Print the whole configuration as a recipe and exit.")
def cli(
    folder: Path | RemoteShards,
    method: str | None,
    recipe: str | None,
    recipe_style: str | None,
    run: Path | None,
    *,
    resume: bool,
    shuffle_control: bool,
    prototype_control: bool,
    motion_control: bool,
    print_config: bool,
    check: bool,
    **command_options: Any,  # noqa: ANN401 -- the keys of the configuration
) -> None:
    """Train a few-shot method from shards, select on val, test once.

    A recipe is chosen by data set, method and shot, and gives every value that is not given here:
    see them with --print-config.  The run folder gets config.toml, log.jsonl, checkpoints,
    result.json and report.html.

    \b
    fsar-train --shards shards/ucf101 --method molo --shot 5 --trunk-weights fetch
    """  # noqa: D301 -- \b is click's mark of lines to be left as they are
    with ShardSet.open(folder, check=check) as shards:
        name, options = shards.dataset.name, overrides(command_options)
        saved = (run or _run_folder(method or "molo", name, options.get("shot", 1))) / "config.toml"
        if resume and recipe is None and saved.exists():
            recipe = str(saved)
        config = resolve(name, method, recipe, recipe_style, options)
        config = replace(config, num_classes=config.num_classes or _training_classes(shards, config))
        if config.freeze_trunk and config.query_jitter:
            click.echo("--freeze-trunk: colours of queries are not jittered, since views are computed once", err=True)
            config = replace(config, query_jitter=False)
        if print_config:
            click.echo(config.to_toml(), nl=False)
            return
        run = run or _run_folder(config.method, name, config.test_shot)
        _settle_run(run, config, shards, resume=resume)
        device = choose_device(config.device)
        controls = Controls(shuffled=shuffle_control, prototypes=prototype_control, motion=motion_control)
        result, examples = train_and_test(config, shards, run, device=device, resume=resume, controls=controls)
    if ranks.is_first():
        report = write_report(run, result, config.flat(), examples=examples)
        click.echo(f"result: {run / 'result.json'}; report: {report}")


def _run_folder(method: str, dataset: str, shot: int) -> Path:
    return Path("runs") / f"{method}-{dataset}-{shot}shot".replace(":", ".")


def resolve(
    dataset: str, method: str | None, recipe: str | None, style: str | None, command_options: dict[str, Any]
) -> RunConfig:
    """Make the configuration of a run: the recipe, its style, then the options that were set.

    Raises:
        ConfigError: unknown names or values.
    """
    find_method(method or "molo")
    name = recipe or choose_recipe(dataset, method or "molo", int(command_options.get("shot", 1)))
    click.echo(f"recipe: {name}" + ("" if recipe else f" (for data set {dataset})"), err=True)
    table = read_recipe(name)
    if method and method != table.get("method"):
        table = _adapt(table, method)
    if style is not None:
        table = restyle(table, style)
    return build_config(table | _own_shot(table, command_options))


def _own_shot(table: dict[str, Any], command_options: dict[str, Any]) -> dict[str, Any]:
    """Leave out the number of shots if it only names a recipe that is trained with another.

    CLIP-FSAR's 5-shot recipes are trained 1-shot.
    """
    shot, trained = command_options.get("shot"), table.get("shot", 1)
    if shot is None or "test_shot" in command_options or shot != table.get("test_shot") or shot == trained:
        return command_options
    sentence = f"trained {trained}-shot and tested {shot}-shot, as the recipe says; give --test-shot too to change it"
    click.echo(sentence, err=True)
    return {key: value for key, value in command_options.items() if key != "shot"}


def _adapt(table: dict[str, Any], method: str) -> dict[str, Any]:
    """Adapt a recipe to another method.

    Leave out and name the options that only its own method has.
    """
    foreign = set(method_options(table["method"])) - set(method_options(method)) if "method" in table else set()
    dropped = sorted(foreign & set(table))
    if dropped:
        click.echo(f"left out, since {method} has no such options: {', '.join(dropped)}", err=True)
    return {key: value for key, value in table.items() if key not in dropped} | {"method": method}


def _training_classes(shards: ShardSet, config: RunConfig) -> int:
    """Rows of the auxiliary classifier: training classes, or the clusters that replace them."""
    if "train" not in shards.dataset.splits:
        raise ConfigError(f"{shards.path} has no training classes; see --holdout, --train-classes of fsar-preprocess")
    labels = training_labels(shards, config)
    return len(labels.names) if labels and labels.names else len(shards.dataset.splits["train"].classes)


def _settle_run(run: Path, config: RunConfig, shards: ShardSet, *, resume: bool) -> None:
    """Start a run folder, or check that it can be resumed with this configuration and data."""
    data = describe_data(shards)
    if config.labels:
        data["labels"] = labels_sha256(Path(config.labels))
    if config.class_text:
        data["class_text"] = class_text_sha256(config)
    if not resume:
        if ranks.is_first():
            begin_run(run, config, data)
        return
    check_is_run(run)
    check_resumable(run, config, build_config(read_recipe(str(run / "config.toml"))))
    check_same_data(run, data, shards.path)


@dataclass(frozen=True)
class Controls:
    """Controls that are tested on the same episodes as the trained model."""

    shuffled: bool = False
    prototypes: bool = False
    motion: bool = True


def train_and_test(
    config: RunConfig, shards: ShardSet, run: Path, *, device: torch.device, resume: bool, controls: Controls
) -> tuple[dict[str, Any], Examples | None]:
    """Train, load the selected checkpoint, test it once, write `result.json`.

    The first process collects examples.
    """
    with Trainer(config, shards, run, device=device, resume=resume) as trainer:
        test = trainer.open_test()  # refused now, not after hours, when the test classes have too few videos
        baseline = frozen_prototypes(config).to(device) if controls.prototypes else None  # so are missing weights
        class_text = class_text_sha256(config)
        _announce(trainer, config, shards, run, device)
        trainer.train()
        selected = trainer.load_selected()
        answers = answer(trainer.model, test, config.test_episodes, precision=config.precision, label="test")
        result = summarise(answers, shards.dataset.classes)
        table = describe(config, shards, trainer.model, result, device=device, class_text=class_text)
        table["left_out"] = list(test.stream.dropped)
        overlap = find_overlap(trainer.trained_on, shards, test.stream.videos())
        table["overlap"] = overlap.to_json()
        if overlap.found:  # splits are disjoint, but classes whose names differ only in case or spaces count as one
            click.echo(str(overlap))
        if test.stream.dropped:
            click.echo(f"left out of the test, having too few videos: {', '.join(test.stream.dropped)}")
        in_views = f", each video in {config.views} random views" if config.views else ""
        click.echo(f"{config.test_way}-way {config.test_shot}-shot on novel classes{in_views}: {result}")
        table |= of_streams(answers, shards.dataset.classes)
        for line in stream_lines(table):
            click.echo(line)
        if controls.shuffled:
            control = trainer.evaluate(test, config.test_episodes, shuffled=True, label="shuffled")
            table["shuffled_frames"] = control.to_json()
            click.echo(f"the same episodes, each clip's frames shuffled: {control}")
        if baseline is not None:
            control = evaluate(baseline, test, config.test_episodes, precision=config.precision, label="prototypes")
            table["frozen_prototypes"] = control.to_json()
            click.echo(f"the same episodes, {CONTROL_TEXTS['frozen_prototypes']}: {control}")
        moving = untrained_motion(config, shards) if controls.motion else None
        if moving is not None:
            control = _stored_motion(moving, shards, test, device)
            table["stored_motion"] = control.to_json()
            click.echo(f"the same episodes, {CONTROL_TEXTS['stored_motion']}: {control}")
        table |= _training_facts(trainer, selected)
        if not ranks.is_first():
            return table, None
        write_whole(run / "result.json", json_bytes(table))
        shown = collect_examples(trainer.model, test, answers, precision=config.precision, seed=config.eval_seed)
        return table, shown


def _stored_motion(own: RunConfig, shards: ShardSet, test: EpisodeLoader, device: torch.device) -> Result:
    """Compute what stored motion reaches without training, on the test's episodes."""
    model = build_stream(own, weights=True).to(device)
    assert model.trunk is not None
    given = [replace(test.stream.choose(n), unlabelled=()) for n in range(own.test_episodes)]
    with open_episodes(shards, "test", own, trunk=model.trunk, device=device, training=False, given=given) as loader:
        return evaluate(model, loader, own.test_episodes, precision=own.precision, label="stored motion")


def _training_facts(trainer: Trainer, selected: int) -> dict[str, Any]:
    """Describe the training in a result."""
    return {
        "selected_on": trainer.config.select_on if trainer.selects else "last",
        "selected_after": selected,
        "episodes_trained": trainer.config.episodes,
        "episodes_skipped": trainer.progress.skipped,
        "training_seconds": trainer.progress.seconds,
        "processes": ranks.count(),
    }


def _announce(trainer: Trainer, config: RunConfig, shards: ShardSet, run: Path, device: torch.device) -> None:
    count = sum(parameter.numel() for parameter in trainer.model.parameters())
    splits = ", ".join(f"{name} {len(split.classes)}" for name, split in shards.dataset.splits.items())
    size = f"{count / 1e6:.2f} M parameters"
    where = f"{ranks.count()} processes, the first on {device}" if ranks.count() > 1 else f"on {device}"
    click.echo(f"{config.method} with trunk {config.trunk}: {size}, {where}, {config.precision}")
    click.echo(f"data set {shards.dataset.name}: classes {splits}; run folder {run}")
    if incomplete := coverage_text(shards):
        click.echo(incomplete)
    if not trainer.selects:
        why = "" if config.select_on == "last" else f', as the shards have no split "{config.select_on}"'
        click.echo(f"the last checkpoint is tested{why}")
    if config.freeze_trunk:
        videos = len(trainer.train_episodes.stream.drawn_videos())
        click.echo(f"the trunk is frozen: {config.cached_views} views of each of {videos:,} videos go through it once")
    if "class_text" in trainer.model.reads and not config.class_text:
        click.echo("no --class-text: what the method does with the texts of classes is left out")
    if config.labels:
        click.echo(f"the classes of training episodes are the {config.num_classes} clusters of {config.labels}")
    if config.tasks == "augment":
        click.echo("every training video is a class of its own; its queries are views of it")
    _announce_videos(trainer.train_episodes.stream)
    if trainer.progress.n:
        click.echo(f"resumed after {trainer.progress.n} of {config.episodes} episodes")


def _announce_videos(stream: EpisodeStream) -> None:
    """Say which training videos and classes are left out, repeated or still."""
    if stream.dropped:
        click.echo(f"classes left out of training, having too few videos: {', '.join(stream.dropped)}")
    if stream.short_videos:
        short = stream.short_videos
        click.echo(f"{short} training videos have fewer than {stream.rules.least_frames} frames: theirs are repeated")
    if stream.still_videos:
        series = stream.rules.motion_series
        click.echo(f"{stream.still_videos} training videos have no field of {series}: their motion is 0")


def main() -> None:
    """Entry point."""
    sys.path.insert(0, "")  # --method module:Class may lie in the current folder
    launch(cli, again="add --resume to the same command to go on from the last checkpoint")


if __name__ == "__main__":
    main()
