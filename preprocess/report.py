"""Say what was stored and who reads it, what failed and which command follows."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import click

from preprocess.datasets.catalogue import Catalogue
from preprocess.datasets.coverage import empty_classes
from preprocess.workers.parts import Part
from shards_spec import Dataset
from shards_spec.cli.console import WITH_FAILURES
from shards_spec.index.layout import list_shards, shard_path
from shards_spec.schema import MOTION, Failure, is_motion

WITH_RECIPES = {"ucf101", "hmdb51", "kinetics100", "ssv2-full", "ssv2-small"}
# Series -> who reads it; flowDgG stands for any of that form. docs/format.md says the same.
READERS = {
    "rgb": "few-shot methods with --streams frames (the default) or both, pre-training and probes",
    "diff1": "few-shot methods with --streams motion or both and --motion-series diff1, and your own readers of tars",
    "flow1": "few-shot methods with --streams motion or both, --method motion, fsar-cluster --features flow, "
    "and MoLo with --recons-target flow",
    "flowDgG": "fsar-pretrain --method mscl, its motion scores too, and few-shot methods with --motion-series {series}",
}


def purpose(series: str, made: Iterable[str], *, where: str = "") -> str:
    """Say who reads a series, and how a run leaves it out.

    Args:
        series: Its name.
        made: Names of all series of the run.
        where: What else leaving it out takes, after the option.
    """
    text = f"read by {READERS.get(series, READERS['flowDgG']).format(series=series)}"
    if not is_motion(series):
        return text
    short = {name: option for option, name in MOTION.items()}
    others = [short.get(name, name) for name in made if is_motion(name) and name != series]
    return f"{text}; without it: --motion {','.join(others) or 'none'}{where}"


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
    _report_series(out)
    if not failures:
        return
    for failure in failures[:20]:
        click.echo(f"  failed: {failure.name}: {failure.reason}: {failure.detail}", err=True)
    reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(f.reason for f in failures).most_common())
    again = "they failed again" if retried else "repair them and add --retry-failed"
    click.echo(f"{len(failures)} videos failed ({reasons}); see {out / 'failures.jsonl'}; {again}", err=True)
    raise click.exceptions.Exit(WITH_FAILURES)


def _report_series(out: Path) -> None:
    """Say of each series what it takes on disk and who reads it."""
    paths = {name: [shard_path(out, name, number) for number in numbers] for name, numbers in list_shards(out).items()}
    sizes = {name: sum(path.stat().st_size for path in tars) for name, tars in paths.items()}
    for name, size in sizes.items():
        share = size / sum(sizes.values())
        for_whom = purpose(name, sizes, where=" in another --out folder")
        click.echo(f"  {name}: {size / 1e6:,.1f} MB, {share:.0%} of the bytes; {for_whom}")


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
