"""Define the command `fsar-shards`: show a shard set, check it, make its index again."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import click
import numpy as np
from tqdm import tqdm

from shards_spec.cli.console import LocalFolder, SuggestingGroup, run_command
from shards_spec.cli.peek import peek
from shards_spec.cli.splits import splits
from shards_spec.errors import ShardError
from shards_spec.files import only_writer, sweep
from shards_spec.index.build import build_index
from shards_spec.index.layout import list_shards, shard_path
from shards_spec.reader import ShardSet
from shards_spec.schema import Failure
from shards_spec.summary import check_as_described, from_tar, write_sidecars
from shards_spec.verify import verify as verify_set

FOLDER = click.argument("folder", type=LocalFolder())


@click.group(cls=SuggestingGroup, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Look at shard sets and split lists, check them, make an index again."""


cli.add_command(peek)
cli.add_command(splits)


@cli.command()
@FOLDER
def info(folder: Path) -> None:
    """Print what a shard set holds."""
    with ShardSet.open(folder, series=()) as shards:
        stored = shards.frames > 0
        click.echo(f"{shards.dataset.name}: {stored.sum()} videos of {len(shards.dataset.classes)} classes")
        if stored.any():
            low, middle, high = np.percentile(shards.frames[stored], [0, 50, 100]).astype(int)
            click.echo(f"frames a video: {low} / {middle} / {high} (least, median, most)")
        for name in shards.series_names:
            paths = [shard_path(folder, name, n) for n in list_shards(folder).get(name, [])]
            size = sum(path.stat().st_size for path in paths) / 1e6
            shapes = {"x".join(map(str, s)) for s in shards.series(name).sizes[stored].tolist()}
            shape = shapes.pop() if len(shapes) == 1 else f"{len(shapes)} sizes"
            shape += " raw" if shards.columns(name).codec == "raw" else ""
            click.echo(f"  {name:8} {len(paths):5} shards  {size:10.1f} MB  {shape}")
        for name, split in shards.dataset.splits.items():
            rows = shards.split_rows(name)
            click.echo(f"  {name:8} {len(split.classes):5} classes {len(rows):8} videos  sha256 {split.sha256[:12]}")
        failures = Failure.load_all(folder / "failures.jsonl").values()
        for reason, count in Counter(f.reason for f in failures).most_common():
            click.echo(f"  failed   {count:5} {reason}")


@cli.command()
@FOLDER
def verify(folder: Path) -> None:
    """Check every byte against the index; exit code 2 when something is damaged."""
    total = sum(path.stat().st_size for path in folder.glob("*.tar"))
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify") as bar:
        faults = verify_set(folder, progress=lambda size: bar.update(size) and None)
    if faults:
        for fault in faults:
            click.echo(fault)
        raise ShardError(
            f"{folder} is damaged in {len(faults)} places (above); copy those files again, or "
            "delete them and type the fsar-preprocess command again"
        )
    click.echo(f"{folder}: every byte is as it was written ({total / 1e6:.1f} MB)")


@cli.command()
@FOLDER
def reindex(folder: Path) -> None:
    """Make the index, .idx and .json files again from the tars (dataset.json names the splits)."""
    if not folder.is_dir():
        raise ShardError(f"{folder} is no folder")
    tars = [shard_path(folder, name, number) for name, numbers in list_shards(folder).items() for number in numbers]
    if not tars:
        raise ShardError(f"{folder} holds no shards; make some with fsar-preprocess")
    with only_writer(folder):
        for tar in tars:
            check_as_described(tar)
        sweep(folder)
        for tar in tars:  # each file is replaced in one step: the set stays whole
            write_sidecars(tar, from_tar(tar))
        build_index(folder)
    with ShardSet.open(folder) as shards:
        click.echo(f"{folder}: index of {shards.num_videos} videos written")


def main() -> None:
    """Run the command."""
    run_command(cli)
