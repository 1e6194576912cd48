"""The command `fsar-eval`: test runs, others' weights or a pretrained trunk on episodes."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import click

from fsar.cli.compare import CompareOptions, check_runs, compare_runs
from fsar.cli.help import GroupedCommand, option
from fsar.cli.launch import launch
from fsar.cli.options import check_option, evaluation_options, parse_pairs
from fsar.cli.weights import (
    file_config,
    model_of_file,
    model_of_run,
    model_of_trunk,
    untrained_prototypes,
)
from fsar.evaluation.accuracy import Result, summarise
from fsar.evaluation.comparison import check_same
from fsar.evaluation.embeddings import EmbeddingStore
from fsar.evaluation.intervals import Answers
from fsar.evaluation.shared_episodes import UNLABELLED, ModelUnderTest, SharedEpisodes, open_shared_episodes
from fsar.methods import METHODS, Model, find_method, method_options
from fsar.report.examples import Examples, collect_examples
from fsar.report.result import CONTROL_TEXTS, coverage_text, describe, of_streams, stream_lines
from fsar.report.run import page
from fsar.run import ranks
from fsar.run.build import TRUNK_ALONE, WHOLE_FRAME, class_text_sha256, untrained_motion
from fsar.run.config import DATA, EPISODES, KEYS, METHOD, OUTPUT, SPEED, RunConfig, build_config
from fsar.run.device import choose_device
from fsar.run.weights import is_pretraining
from fsar.trunks import MOTION_TRUNKS
from shards_spec import ShardSet
from shards_spec.cli.console import shards_option
from shards_spec.errors import ConfigError
from shards_spec.files import json_bytes, write_whole
from shards_spec.peek.html import write_html
from shards_spec.remote.shards import RemoteShards

T = TypeVar("T")

FILE = click.Path(path_type=Path)
MODEL, CONTROLS, COMPARISON = METHOD, "Controls", "Comparison"  # headings of the help
OF_STREAMS = ("streams", "motion_series", "fields", "camera", "stream_weight", "test_shot")
# Options of this command -> keys of a run that they replace
REPLACED = {key.evaluation: name for name, key in KEYS.items() if key.evaluation}


@dataclass(frozen=True)
class Source:
    """Options that name one model: a run, a file of weights, or a method on a trunk."""

    weights: Path | None
    checkpoint: str | None
    method: str | None
    trunk: str | None
    recipe: str | None
    pairs: tuple[str, ...]
    trunk_weights: str | None


@click.command(cls=GroupedCommand)
@shards_option()
@option("--split", group=DATA, default="test", show_default=True, help="Split that is tested.")
@check_option
@option("--weights", group=MODEL, type=FILE,
        help="A run folder, also of fsar-pretrain, or a file with the published code's names.")  # fmt: skip
@option("--checkpoint", group=MODEL, type=click.Choice(["best", "last"]),
        help="Of a run.  [default: best, if there is one]")  # fmt: skip
@option("--method", group=MODEL, help="Method of a file of weights; without --weights: prototype, which has none.")
@option("--trunk", group=MODEL, help="Name of the trunk that goes with --method.")
@option("--trunk-weights", group=MODEL, help="For --method prototype, or --prototype-control: a file, or fetch.")
@option("--recipe", group=MODEL, main=False,
        help="For a file of weights: its configuration, which --method and --trunk override.")  # fmt: skip
@option("--option", "pairs", group=MODEL, main=False, multiple=True, metavar="KEY=VALUE",
        help="A further key of that configuration.")  # fmt: skip
@option("--inference", group=MODEL, main=False, type=click.Choice(["visual", "text", "combined"]),
        help="Of clip-fsar.  [default: the run's]")  # fmt: skip
@evaluation_options(KEYS)
@option("--episodes-file", group=EPISODES, type=FILE,
        help="Run this file's episodes; they are written there first if missing.")  # fmt: skip
@option("--embeddings", group=SPEED, type=FILE, help="Folder (zarr) of embeddings that evaluations share.")
@option("--shuffle-frames", "shuffled", group=CONTROLS, is_flag=True, help="Shuffle the frames of each clip.")
@option("--prototype-control", "control", group=CONTROLS, is_flag=True,
        help="Also test prototypes of the untrained trunk.")  # fmt: skip
@option("--motion-control/--no-motion-control", group=CONTROLS, default=True, show_default=True,
        help="Also test stored motion without training, if the shards hold it.")  # fmt: skip
@option("--allow-overlap", group=CONTROLS, main=False, is_flag=True,
        help="Test on what training saw; the result is stamped with it.")  # fmt: skip
@option("--compare", "first", group=COMPARISON, type=FILE, multiple=True, metavar="RUN...", help="Runs to compare.")
@click.argument("more", type=FILE, nargs=-1, metavar="")
@option("--baseline", group=COMPARISON, metavar="NAME",
        help="With --compare: the run to compare with.  [default: the first]")  # fmt: skip
@option("--allow-styles", group=COMPARISON, main=False, is_flag=True,
        help="With --compare: runs of several recipe styles, stamped.")  # fmt: skip
@option("--markdown", group=COMPARISON, main=False, type=FILE, help="With --compare: write the tables as Markdown.")
@option("--csv", group=COMPARISON, main=False, type=FILE, help="With --compare: write the figures as CSV.")
@option("--out", group=OUTPUT, type=FILE, help="Write the result as JSON.")
@option("--report", group=OUTPUT, type=FILE,
        help="Write a page to look at (HTML), of the one model or of the comparison.")  # fmt: skip
def cli(
    folder: Path | RemoteShards,
    split: str,
    first: tuple[Path, ...],
    more: tuple[Path, ...],
    *,
    episodes_file: Path | None,
    embeddings: Path | None,
    inference: str | None,
    shuffled: bool,
    motion_control: bool,
    check: bool,
    **command_options: Any,  # noqa: ANN401 -- the fields of Source and CompareOptions, the options of REPLACED
) -> None:
    """Test a model on episodes of a split that it was not trained on, or compare runs on them.

    \b
    fsar-eval --weights RUN --shards DIR
    fsar-eval --compare RUN RUN RUN --shards DIR
    fsar-eval --weights FILE.pyth --method molo --trunk resnet50 --shards DIR
    fsar-eval --method prototype --trunk efficientnet-lite0 --trunk-weights fetch --shards DIR
    """  # noqa: D301 -- \b is click's mark of lines to be left as they are
    source, options = _take(Source, command_options), _take(CompareOptions, command_options)
    _check(source, options, first, more)
    _check_folders(options, {"episodes-file": episodes_file, "embeddings": embeddings})
    store = EmbeddingStore(embeddings) if embeddings else None
    asked = {REPLACED[name]: value for name, value in command_options.items() if value is not None}
    changes = asked | {"inference": inference, "trunk_weights": source.trunk_weights}
    with ShardSet.open(folder, check=check) as shards:
        models = [model_of_run(run, source.checkpoint) for run in first + more] or [_tested(source, shards, asked)]
        models = _changed(models, {key: value for key, value in changes.items() if value is not None})
        if first:
            models = check_runs(models, first + more, options)
        models += _controls(models, shards, prototypes=options.control, motion=motion_control)
        kept: dict[str, Any] = {"episodes_file": episodes_file, "embeddings": store}
        shared = open_shared_episodes(shards, split, models, asked=asked, shuffled=shuffled, **kept)
        for line in (coverage_text(shards), _left_out(shared), *map(shared.selection_warning, models)):
            if line:
                click.echo(line)
        for one in models:
            shared.check(one)
        if first:
            compare_runs(models, shared, options)
        else:
            _evaluate(models, shared, options)


def _controls(
    tested: Sequence[ModelUnderTest], shards: ShardSet, *, prototypes: bool, motion: bool
) -> list[ModelUnderTest]:
    """Make the controls: prototypes of the first model's trunk, and stored motion where there is some."""
    found = [untrained_prototypes(tested[0].config)] if prototypes else []
    plain = [untrained_motion(one.config, shards) for one in tested] if motion else [None]
    if None not in plain:
        assert plain[0] is not None
        found.append(replace(model_of_trunk(plain[0]), name=CONTROL_TEXTS["stored_motion"]))
    return found


def _changed(models: list[ModelUnderTest], changes: dict[str, Any]) -> list[ModelUnderTest]:
    """Change the models' configurations; a key that only some methods read changes only theirs.

    Raises:
        ConfigError: no model reads a key that was given.
    """
    methods = sorted({one.config.method for one in models})
    for key in ("streams", "motion_series"):
        for one in models if key in changes else ():
            own = getattr(one.config, key)
            if own != changes[key]:
                option = f"--{key.replace('_', '-')} {changes[key]}"
                raise ConfigError(f"{option}: {one.name} reads {own}, which a test cannot change; leave it out")
    for key, value in changes.items():
        if value and not any(_reads(method, key) for method in methods):
            readers = ", ".join(method for method in METHODS if _reads(method, key))
            raise ConfigError(
                f"--{key.replace('_', '-')} is nothing that {' or '.join(methods)} reads: leave it out, or choose a "
                f"method that does ({readers})"
            )
    return [replace(one, config=_with(one.config, changes)) for one in models]


def _with(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    own = {key: value for key, value in changes.items() if _reads(config.method, key)}
    options = {"inference": own.pop("inference")} if "inference" in own else {}
    return replace(config, **own, options=config.options | options)


def _reads(method: str, key: str) -> bool:
    """Tell whether a method reads a key, such as those of unlabelled videos and class texts."""
    if key in UNLABELLED:
        return "unlabelled" in find_method(method).reads
    if key == "class_text":
        return "class_text" in find_method(method).reads
    return key != "inference" or key in method_options(method)


def _take(kind: type[T], command_options: dict[str, Any]) -> T:
    """Take the options that are the fields of a class."""
    return kind(**{field.name: command_options.pop(field.name) for field in fields(kind)})  # type: ignore[arg-type]


def _check(source: Source, options: CompareOptions, first: tuple[Path, ...], more: tuple[Path, ...]) -> None:
    """Refuse options that contradict each other."""
    if source.trunk_weights and (first or source.weights) and not options.control:
        raise ConfigError("--trunk-weights go only with --method, or with --prototype-control: leave them out")
    _check_control(source, options, first)
    if first:
        if source.weights or source.method or source.trunk or source.recipe or source.pairs:
            raise ConfigError("--compare takes run folders: leave out --weights, --method, --trunk, --recipe, --option")
        return
    if more:
        raise ConfigError(f"{more[0]} stands alone; fsar-eval --weights RUN tests one run, --compare RUN RUN several")
    if options.baseline or options.allow_styles or options.markdown or options.csv:
        raise ConfigError("--baseline, --allow-styles, --markdown and --csv go with --compare RUN RUN")
    if source.weights and not source.weights.exists():
        raise ConfigError(f"--weights {source.weights}: there is no such file or folder")
    one_file = source.weights is not None and source.weights.is_file()
    if source.checkpoint and (one_file or not source.weights):
        raise ConfigError("--checkpoint chooses one of a run's: give the run folder as --weights, or leave it out")
    if not one_file and (source.recipe or (source.pairs and source.weights)):
        raise ConfigError("--recipe and --option say what a file of weights holds; give the file as --weights")
    if source.weights and not one_file and (source.trunk or source.method) and not _on_pretrained(source):
        raise ConfigError(f"--method and --trunk are those of the run {source.weights}: leave them out, or --weights")


def _check_control(source: Source, options: CompareOptions, first: tuple[Path, ...]) -> None:
    """Refuse the control of a pre-training run, unless told its trunk's weights before."""
    run = first[0] if first else source.weights  # whose control it is
    if options.control and run and not source.trunk_weights and is_pretraining(run):
        raise ConfigError(
            f"--prototype-control: {run} is a trunk alone; give --trunk-weights random to test it untrained"
        )


def _on_pretrained(source: Source) -> bool:
    """Tell whether prototypes on the trunk of a run of pre-training are asked for by name."""
    prototypes = source.method == "prototype" and not source.trunk
    return prototypes and source.weights is not None and is_pretraining(source.weights)


def _check_folders(options: CompareOptions, others: dict[str, Path | None]) -> None:
    """Refuse files that could not be written, before anything is computed."""
    files = {name: getattr(options, name) for name in ("out", "report", "markdown", "csv")} | others
    for name, path in files.items():
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"--{name} {path}: there is no folder {path.parent}; make it first")


def _tested(source: Source, shards: ShardSet, asked: Mapping[str, Any]) -> ModelUnderTest:
    """Open the one model that was named; `asked` are keys that replace those of its configuration."""
    if source.weights and source.weights.is_file():
        config = file_config(source.recipe, source.method, source.trunk, parse_pairs(source.pairs))
        training = shards.dataset.splits.get("train")
        classes = config.num_classes or (len(training.classes) if training else 1)
        return model_of_file(source.weights, replace(config, num_classes=classes))
    if source.weights:
        return model_of_run(source.weights, source.checkpoint)
    return model_of_trunk(_of_trunk(source, {key: asked[key] for key in OF_STREAMS if key in asked}))


def _of_trunk(source: Source, streams: Mapping[str, Any]) -> RunConfig:
    """Configure a method that has no weights but those of a pretrained trunk."""
    if not source.method or not (source.trunk or find_method(source.method).only_stream):
        raise ConfigError(
            "give --weights RUN, --compare RUN RUN, --method motion, or --method prototype with --trunk and "
            "--trunk-weights"
        )
    table = {"method": source.method, "trunk": source.trunk or "", "trunk_weights": source.trunk_weights or ""}
    if source.trunk not in MOTION_TRUNKS:
        table |= {"motion_trunk": "flow-grid"}  # random weights would be those of nothing
    # the options of a prototype are those of --prototype-control
    options: dict[str, Any] = dict(TRUNK_ALONE) if source.method == "prototype" else {}
    if find_method(source.method).only_stream or streams.get("streams") == "motion":
        options |= WHOLE_FRAME
    return build_config(table | {"num_classes": 1} | options | parse_pairs(source.pairs) | dict(streams))


def _examples(shared: SharedEpisodes, tested: ModelUnderTest, model: Model, answers: Answers) -> Examples:
    """Collect examples of the queries that `SharedEpisodes.run` has asked."""
    config = shared.configured(tested.config)
    with closing(shared.open_loader(config, model, choose_device(config.device))) as loader:
        how: dict[str, Any] = {"precision": config.precision, "seed": config.eval_seed}
        return collect_examples(model, loader, answers, shuffled=shared.shuffled, **how)


def _left_out(shared: SharedEpisodes) -> str | None:
    return f"left out, having too few videos: {', '.join(shared.left_out)}" if shared.left_out else None


def _evaluate(models: list[ModelUnderTest], shared: SharedEpisodes, options: CompareOptions) -> None:
    """Test one model, and its control where there is one; print and write the result."""
    tested, *controls = models
    overlap = shared.overlap(tested, allowed=options.allow_overlap)
    class_text = class_text_sha256(tested.config)
    model, answers, device = shared.run(tested)
    config, classes = shared.configured(tested.config), shared.shards.dataset.classes
    result = summarise(answers, classes)
    table = describe(config, shared.shards, model, result, device=device, class_text=class_text)
    table |= tested.stamp | shared.stamp()
    table["overlap"] = overlap.to_json()
    task = f"{config.test_way}-way {config.test_shot}-shot on {shared.split}"
    in_views = f", each video in {config.views} random views" if config.views else ""
    _print(f"{config.method}, {task}{in_views} ({overlap})", result)
    table |= of_streams(answers, classes)
    for line in stream_lines(table):
        click.echo(line)
    for control in controls:
        _, others, _ = shared.run(control)
        check_same(others, answers, f"{control.name} and {tested.name}")
        result = summarise(others, classes)
        name = "stored_motion" if control.config.method == "motion" else "frozen_prototypes"
        table[name] = result.to_json()
        _print(f"the same episodes, {CONTROL_TEXTS[name]}", result)
    if options.out and ranks.is_first():
        write_whole(options.out, json_bytes(table))
    if options.report and ranks.is_first():
        examples = _examples(shared, tested, model, answers)
        write_html(options.report, page(tested.name, table, config.flat(), [], examples=examples))


def _print(what: str, result: Result) -> None:
    click.echo(f"{what}: {result}")
    for name, accuracy in sorted(result.per_class.items()):
        click.echo(f"  {name:32} {accuracy:.1%}")


def main() -> None:
    """Entry point."""
    sys.path.insert(0, "")  # the run's --method module:Class may lie in the current folder
    launch(cli, again="nothing was written")


if __name__ == "__main__":
    main()
