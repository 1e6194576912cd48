"""The command `fsar-preprocess`: videos -> shards, once; typed again it goes on where it was."""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

from preprocess.catalogue import CatalogueError
from preprocess.decode import Geometry
from preprocess.dryrun import estimate
from preprocess.encode import MOTION
from preprocess.folder import folder_catalogue, read_class_list
from preprocess.stage import Settings, preprocess
from preprocess.ucf101 import HELP as UCF101_HELP
from preprocess.ucf101 import ucf101_catalogue
from shards_spec import Dataset, Split
from shards_spec.console import WITH_FAILURES, SuggestingGroup, run_command
from shards_spec.errors import ConfigError, suggest

if TYPE_CHECKING:
    from collections.abc import Callable

    from preprocess.catalogue import Catalogue
    from shards_spec.schema import Failure

SMALLEST, LARGEST = 32, 4096  # pixels: optical flow needs some, and a JPEG holds so many
SYNTHETIC_SIZE = "64"


def _common(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that every data set has."""
    cores = len(os.sched_getaffinity(0))
    options = [
        click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the shards."),
        click.option("--profile", type=click.Choice(["square256", "short256"]), default="square256", show_default=True,
                     help="square256: squashed to a square, what MoLo and HyRSM train on; short256: aspect kept."),
        click.option("--size", help="Other size: N (side of the square, or short side), or HxW."),
        click.option("--motion", default="diff,flow", show_default=True,
                     help="Stored motion, comma-separated; none for frames alone."),
        click.option("--workers", type=click.IntRange(1), default=cores, show_default=True, help="Processes."),
        click.option("--rows-per-shard", type=click.IntRange(1), default=64, show_default=True),
        click.option("--time-limit", type=click.FloatRange(0, min_open=True), default=300.0, show_default=True,
                     help="Seconds that one video may take."),
        click.option("--retry-failed", is_flag=True, help="Try the videos of failures.jsonl again."),
        click.option("--dry-run", is_flag=True, help="Measure a few videos, print time and bytes of each series."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@click.group(cls=SuggestingGroup, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Decode videos once into shards of frames, frame differences and optical flow.

    Exit codes: 0 done; 2 bad input, nothing lost; 3 done, but some videos failed (listed in failures.jsonl).
    """


@cli.command()
@click.option("--videos", type=click.Path(path_type=Path), required=True, help="Top of a tree of CLASS/video files.")
@click.option("--name", default="folder", show_default=True, help="Name of the data set in results.")
@click.option("--holdout", type=int, default=0, help="Hold out this many classes for testing.")
@click.option("--train-classes", help="Comma-separated class names, or a file with one a line.")
@click.option("--val-classes", help="The same for the classes that choose the checkpoint.")
@click.option("--test-classes", help="The same for the novel classes.")
@click.option("--group", help="Regular expression on file names; its first bracket is the group (scene, person, ...).")
@_common
def folder(videos: Path, name: str, holdout: int, group: str | None, **options: Any) -> None:  # noqa: ANN401
    """Any CLASS/video tree; the folder that a file lies in is its class."""
    lists = {split: options.pop(f"{split}_classes") for split in ("train", "val", "test")}
    classes = {split: read_class_list(text) for split, text in lists.items() if text}
    if classes and holdout:
        raise ConfigError("--holdout chooses the classes itself: give it or class lists, not both")
    _run(folder_catalogue(videos, name=name, classes=classes, holdout=holdout, group=group), **options)


@cli.command()
@click.option("--videos", type=click.Path(path_type=Path), help="Folder of UCF101.  [default: data/UCF-101]")
@click.option("--splits", type=click.Path(path_type=Path),
              help="Folder of {train,val,test}_few_shot.txt or {train,val,test}list03.txt lists.")  # fmt: skip
@_common
def ucf101(videos: Path | None, splits: Path | None, **options: Any) -> None:  # noqa: ANN401
    """UCF101: UCF-101/<Class>/v_<Class>_gNN_cNN.avi, at any depth."""
    if videos is None and not Path("data/UCF-101").is_dir():
        raise CatalogueError(f"no --videos given and there is no data/UCF-101 here\n{UCF101_HELP}")
    _run(ucf101_catalogue(videos or Path("data/UCF-101"), splits=splits), **options)


@cli.command()
@click.option("--videos", type=click.Path(path_type=Path), help="Folder for the videos.  [default: OUT/videos]")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--per-class", type=click.IntRange(1), default=24, show_default=True, help="Videos a class.")
@_common
def synthetic(videos: Path | None, seed: int, per_class: int, **options: Any) -> None:  # noqa: ANN401
    """Generated videos in which only motion tells the class; written as .mp4 files first, then decoded."""
    from preprocess.synthetic import splits as synthetic_splits  # noqa: PLC0415
    from preprocess.synthetic import write_videos  # noqa: PLC0415

    videos = videos or options["out"] / "videos"
    options["size"] = options["size"] or SYNTHETIC_SIZE
    written, repeat = per_class, 1
    with ExitStack() as stack:
        if options["dry_run"]:  # one video a class, elsewhere, stands for all of its class
            videos = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            written, repeat = 1, per_class
        total = written * sum(map(len, synthetic_splits().values()))
        with tqdm(total=total, unit="video", desc="generate") as bar:
            write_videos(videos, seed=seed, per_class=written, workers=options["workers"], progress=bar.update)
        _run_synthetic(folder_catalogue(videos, name="synthetic"), repeat, **options)


def _run_synthetic(catalogue: Catalogue, repeat: int, **options: Any) -> None:  # noqa: ANN401
    from preprocess.synthetic import splits as synthetic_splits  # noqa: PLC0415

    splits = {name: Split(classes) for name, classes in synthetic_splits().items()}
    dataset = Dataset("synthetic", catalogue.dataset.classes, splits)
    _run(replace(catalogue, dataset=dataset, videos=catalogue.videos * repeat), **options)


def _run(
    catalogue: Catalogue,
    *,
    out: Path,
    profile: str,
    size: str | None,
    motion: str,
    dry_run: bool,
    **work: Any,  # noqa: ANN401
) -> None:
    settings = Settings(_geometry(profile, size), _motion(motion), **work)
    dataset = catalogue.dataset
    click.echo(f"{dataset.name}: {len(catalogue.videos)} videos of {len(dataset.classes)} classes")
    for line in catalogue.coverage():
        click.echo(line)
    if dry_run:
        for line in estimate(catalogue, out, settings):
            click.echo(line)
        return
    failures = preprocess(catalogue, out, settings)
    _report(dataset, len(catalogue.videos), failures, out, settings)


def _report(dataset: Dataset, total: int, failures: list[Failure], out: Path, settings: Settings) -> None:
    click.echo(f"{out}: {total - len(failures)} videos stored; next: {_next_step(dataset, out)}")
    if not failures:
        return
    for failure in failures[:20]:
        click.echo(f"  failed: {failure.name}: {failure.reason}: {failure.detail}", err=True)
    reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(f.reason for f in failures).most_common())
    again = "they failed again" if settings.retry_failed else "repair them and add --retry-failed"
    click.echo(f"{len(failures)} videos failed ({reasons}); see {out / 'failures.jsonl'}; {again}", err=True)
    raise click.exceptions.Exit(WITH_FAILURES)


def _next_step(dataset: Dataset, out: Path) -> str:
    """The command that follows."""
    if "train" not in dataset.splits or "test" not in dataset.splits:
        return "name classes with --holdout, or --train-classes and --test-classes (nothing is decoded again)"
    train = f"fsar-train --shards {out} --method molo"
    if dataset.name == "synthetic":
        return train
    return f"{train} --trunk-weights FILE" + ("" if dataset.name == "ucf101" else " --recipe molo-ucf101-1shot")


def _geometry(profile: str, size: str | None) -> Geometry:
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", size or "256")
    if not match:
        raise ConfigError(f'--size "{size}": expected N or HxW, such as 128 or 256x320')
    height, width = int(match[1]), int(match[2] or match[1])
    if min(height, width) < SMALLEST or max(height, width) > LARGEST or height % 2 or width % 2:
        raise ConfigError(f"--size {size}: each side must be even and of {SMALLEST} to {LARGEST} pixels")
    if profile == "short256" and not match[2]:
        return Geometry(short=height)
    return Geometry(height=height, width=width)


def _motion(text: str) -> tuple[str, ...]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["none"]:
        return ()
    for name in names:
        if name not in MOTION:
            raise ConfigError(f'--motion: no modality "{name}"; {suggest(name, [*MOTION, "none"])}')
    return tuple(name for name in MOTION if name in names)


def main() -> None:
    """Entry point."""
    run_command(cli)


if __name__ == "__main__":
    main()
