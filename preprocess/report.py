"""Say at the end of a run what was stored, what failed and which command follows."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path

import click

from preprocess.datasets.catalogue import Catalogue
from preprocess.datasets.coverage import empty_classes
from preprocess.workers.parts import Part
from shards_spec import Dataset
from shards_spec.cli.console import WITH_FAILURES
from shards_spec.schema import Failure

WITH_RECIPES = {"ucf101", "hmdb51", "kinetics100", "ssv2-full", "ssv2-small"}


def report_part(failures: list[Failure], out: Path, part: Part) -> None:
    """Say that a part is whole, and which file lists its failed videos.

    Raises:
        Exit: some videos failed; the command ends with code 3.
    """
    click.echo(f"{out}: part {part} is whole; when all are: the same command with --join in place of --part")
    if failures:
        click.echo(f"{len(failures)} of its videos failed; see {part.failures(out)}", err=True)
        raise click.exceptions.Exit(WITH_FAILURES)


def report_whole(catalogue: Catalogue, failures: list[Failure], out: Path, *, retried: bool) -> None:
    """Say what was stored, what failed and which command follows.

    Raises:
        Exit: some videos failed; the command ends with code 3.
    """
    stored = len(catalogue.videos) - len(failures)
    click.echo(f"{out}: {stored:,} videos stored; next: {_next_step(catalogue.dataset, out)}")
    if empty := empty_classes(catalogue):
        click.echo(f"  ({len(empty)} classes of its splits have no video: fsar-train needs --small-classes drop)")
    if not failures:
        return
    for failure in failures[:20]:
        click.echo(f"  failed: {failure.name}: {failure.reason}: {failure.detail}", err=True)
    reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(f.reason for f in failures).most_common())
    again = "they failed again" if retried else "repair them and add --retry-failed"
    click.echo(f"{len(failures)} videos failed ({reasons}); see {out / 'failures.jsonl'}; {again}", err=True)
    raise click.exceptions.Exit(WITH_FAILURES)


def _next_step(dataset: Dataset, out: Path) -> str:
    """Return the command that follows, or what is still to choose."""
    shards = shlex.quote(str(out))
    if "test" in dataset.splits and "train" not in dataset.splits:
        return f"fsar-eval --shards {shards} --weights RUN"
    if not {"train", "test"} <= set(dataset.splits):
        return (
            "choose classes with --train-classes and --test-classes, or lists with --splits (nothing is decoded again)"
        )
    train = f"fsar-train --shards {shards} --method molo"
    if dataset.name == "synthetic":
        return train
    if dataset.name in WITH_RECIPES:
        return f"{train} --trunk-weights FILE"
    if dataset.name == "epic":
        return f"fsar-train --shards {shards} --method hyrsm++ --trunk-weights FILE"
    return f"{train} --recipe molo-lite0 --trunk-weights fetch (on a CPU), or --recipe molo-ucf101-1shot (on a GPU)"
