"""The command `fsar-predict`: tell the classes of videos from a few examples of each."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import click

from fsar.cli.help import Command
from fsar.evaluation.prediction import Prediction, find_examples, find_videos, open_run, predict, read_support
from shards_spec.cli.console import WITH_FAILURES, run_command
from shards_spec.errors import ConfigError

FILE = click.Path(path_type=Path)


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--weights", type=FILE, required=True, help="A run folder of fsar-train.")
@click.option("--support", "folder", type=FILE, required=True, help="Top of a tree of CLASS/video files: the examples.")
@click.option("--query", "first", type=FILE, multiple=True, metavar="VIDEO...",
              help="Videos to classify; of a folder all videos below it.")  # fmt: skip
@click.argument("more", type=FILE, nargs=-1, metavar="")
@click.option("--top", type=click.IntRange(1), default=3, show_default=True, help="Classes to print of each video.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a video, a line each, with all classes.")
@click.option("--examples", type=click.IntRange(1), help="Use at most so many examples a class, first by name.")
@click.option("--checkpoint", type=click.Choice(["best", "last"]), help="[default: best where there is one]")
@click.option("--device", help="[default: the run's]")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="[default: the run's]")
@click.option("--class-text", help='A file of fsar-text with the classes, or "" for none.  [default: the run\'s]')
@click.option("--workers", type=click.IntRange(1), default=len(os.sched_getaffinity(0)), show_default=True,
              help="Processes that decode videos.")  # fmt: skip
@click.option("--time-limit", type=click.FloatRange(0, min_open=True), default=300.0, show_default=True,
              help="Seconds that one video may take.")  # fmt: skip
def cli(
    weights: Path,
    folder: Path,
    first: tuple[Path, ...],
    more: tuple[Path, ...],
    *,
    top: int,
    as_json: bool,
    examples: int | None,
    checkpoint: str | None,
    device: str | None,
    precision: str | None,
    class_text: str | None,
    workers: int,
    time_limit: float,
) -> None:
    """Tell the class of videos from a few examples of each class.

    The classes are the folders of --support: at least two, each with one example or more, none of
    which the model needs to have seen in training.  A class's score is the softmax of the model's
    logits over these classes: it ranks them, and is no calibrated probability.  Frames lie in a
    temporary folder ($TMPDIR) meanwhile.

    Exit codes: 0 done; 2 bad input, or no video could be read; 3 done, but some videos could not be
    read.
    """
    if not first + more:
        raise ConfigError("no --query given; name videos, or folders of videos, to classify")
    command_options = {"device": device, "precision": precision, "class_text": class_text}
    changes = {key: value for key, value in command_options.items() if value is not None}
    found = find_examples(folder, most=examples)
    queries = find_videos(first + more)
    model, viewing = open_run(weights, checkpoint=checkpoint, workers=workers, time_limit=time_limit, **changes)
    support = read_support(model, found, viewing)
    for path, error in support.errors.items():
        click.echo(f"example left out: {path}: {error}", err=True)
    failed = 0
    for answer in predict(model, support, queries, viewing):
        failed += answer.error is not None
        _print(answer, top, as_json=as_json)
    if failed == len(queries):
        raise ConfigError(f"none of the {failed} videos could be read")
    if failed:
        click.echo(f"{failed} of {len(queries)} videos could not be read", err=True)
        raise click.exceptions.Exit(WITH_FAILURES)


def _print(answer: Prediction, top: int, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(answer.to_json()))
    elif answer.error is not None:
        click.echo(f"failed: {answer.path}: {answer.error}", err=True)
    else:
        best = list(answer.scores.items())[:top]
        click.echo(f"{answer.path}: " + ", ".join(f"{name} ({score:.3f})" for name, score in best))


def main() -> None:
    """Entry point."""
    sys.path.insert(0, "")  # the run's --method module:Class may lie in the current folder
    run_command(cli, again="nothing was written")


if __name__ == "__main__":
    main()
