"""The command `fsar-preprocess`: videos -> shards, once; typed again it goes on where it was."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from preprocess.datasets import synthetic as synthetic_videos
from preprocess.datasets.catalogue import Catalogue
from preprocess.datasets.coverage import check_coverage, lacking, report, write_missing
from preprocess.datasets.epic import epic_catalogue
from preprocess.datasets.folder import folder_catalogue
from preprocess.datasets.hmdb51 import hmdb51_catalogue
from preprocess.datasets.kinetics import kinetics_catalogue
from preprocess.datasets.ssv2 import ssv2_catalogue
from preprocess.datasets.ucf101 import ucf101_catalogue
from preprocess.encode.flow_estimators import DIS
from preprocess.estimate import estimate
from preprocess.options import (
    PATH,
    PLACE,
    class_list_options,
    common_options,
    geometry_of,
    list_options,
    motion_of,
    part_of,
    take_classes,
    videos_option,
)
from preprocess.plan import Settings
from preprocess.report import report_part, report_whole
from preprocess.stage import join_parts, preprocess, preprocess_part
from preprocess.workers.parts import Part, holding
from shards_spec import Dataset, Split
from shards_spec.cli.console import SuggestingGroup, run_command
from shards_spec.errors import ConfigError
from shards_spec.files import disk_errors, temporary
from shards_spec.schema import flow_pairs, motion_series, quoted, text_fault

SYNTHETIC_SIZE, EPIC_SIZE = "64", "256x320"


@click.group(cls=SuggestingGroup, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Decode videos once into shards of frames, frame differences and optical flow.

    Exit codes: 0 done; 2 bad input, nothing lost; 3 done, but some videos failed (listed in failures.jsonl).
    """


@cli.command()
@click.option("--videos", type=PLACE, required=True, help="Top of a tree of CLASS/video files, also at a URL.")
@click.option("--name", default="folder", show_default=True, help="Name of the data set in results.")
@click.option("--holdout", type=int, default=0, help="Hold out this many classes for testing.")
@class_list_options
@click.option("--group", help="Regular expression on file names; its first bracket is the group (scene, person, ...).")
@list_options
@common_options
def folder(
    videos: Path,
    name: str,
    holdout: int,
    group: str | None,
    splits: Path | None,
    *,
    links: bool,
    **options: Any,  # noqa: ANN401
) -> None:
    """Any CLASS/video tree; the folder that a file lies in is its class."""
    classes = take_classes(options)
    if sum(map(bool, (classes, holdout, splits))) > 1:
        raise ConfigError("--holdout, --splits and class lists each choose the splits: give one of these")
    catalogue = folder_catalogue(
        videos, name=name, classes=classes, holdout=holdout, splits=splits, group=group, links=links
    )
    _run(catalogue, **options)


@cli.command()
@videos_option("UCF101", "data/UCF-101")
@list_options
@common_options
def ucf101(videos: Path, splits: Path | None, *, links: bool, **options: Any) -> None:  # noqa: ANN401
    """UCF101: UCF-101/<Class>/v_<Class>_gNN_cNN.avi, at any depth."""
    _run(ucf101_catalogue(videos, splits=splits, links=links), **options)


@cli.command()
@videos_option("HMDB51", "data/hmdb51")
@list_options
@common_options
def hmdb51(videos: Path, splits: Path | None, *, links: bool, **options: Any) -> None:  # noqa: ANN401
    """HMDB51: <class>/<name>.avi, at any depth."""
    _run(hmdb51_catalogue(videos, splits=splits, links=links), **options)


@cli.command()
@videos_option("Kinetics", "data/kinetics")
@click.option(
    "--classes",
    type=click.Choice(["100", "all"]),
    default="100",
    show_default=True,
    help="100: the few-shot classes; all: every class folder, for pre-training or classes of one's own.",
)
@class_list_options
@list_options
@common_options
def kinetics(videos: Path, classes: str, splits: Path | None, *, links: bool, **options: Any) -> None:  # noqa: ANN401
    """Kinetics: {train,val}/<class>/<YouTube id>_<start>_<end>.mp4, at any depth."""
    chosen = take_classes(options)
    if chosen and (classes == "100" or splits):
        raise ConfigError(
            "--train-classes, --val-classes and --test-classes go with --classes all and without --splits"
        )
    _run(kinetics_catalogue(videos, classes=classes, splits=splits, class_lists=chosen, links=links), **options)


@cli.command()
@videos_option("Something-Something V2", "data/ssv2")
@click.option("--labels", type=PATH, help="Folder of its train and validation JSON files, which name the classes.")
@click.option("--variant", type=click.Choice(["full", "small"]), help="Which of the two few-shot splits the lists are.")
@list_options
@common_options
def ssv2(
    videos: Path,
    labels: Path | None,
    variant: str | None,
    splits: Path | None,
    *,
    links: bool,
    **options: Any,  # noqa: ANN401
) -> None:
    """Something-Something V2: <id>.webm or .mp4, those that the lists of --splits name."""
    _run(ssv2_catalogue(videos, splits=splits, labels=labels, variant=variant, links=links), **options)


@cli.command()
@videos_option("the clips", "data/epic")
@list_options
@common_options
def epic(videos: Path, splits: Path | None, *, links: bool, **options: Any) -> None:  # noqa: ANN401
    """EPIC-Kitchens: <recording>_<n>.MP4 that --splits lists; 256x320 unless --size is given."""
    if options["size"] is None and options["profile"] == "square256":
        options["size"] = EPIC_SIZE
    _run(epic_catalogue(videos, splits=splits, links=links), **options)


@cli.command()
@click.option("--videos", type=PATH, help="Folder for the videos.  [default: OUT/videos]")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--per-class", type=click.IntRange(1), default=24, show_default=True, help="Videos a class.")
@common_options
def synthetic(videos: Path | None, seed: int, per_class: int, **options: Any) -> None:  # noqa: ANN401
    """Generated videos in which only motion tells the class; written as .mp4, then decoded."""
    videos = videos or options["out"] / "videos"
    options["size"] = options["size"] or SYNTHETIC_SIZE
    written, repeat = per_class, 1
    with ExitStack() as stack:
        if options["dry_run"]:  # one video a class, elsewhere, stands for all of its class
            videos = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            written, repeat = 1, per_class
        total = written * sum(map(len, synthetic_videos.splits().values()))
        turn = _one_part_at_a_time(videos) if options["part"] else nullcontext()
        with turn, tqdm(total=total, unit="video", desc="generate") as bar:
            synthetic_videos.write_videos(
                videos, seed=seed, per_class=written, workers=options["workers"], on_written=bar.update
            )
        _run(_synthetic_catalogue(videos, repeat), **options)


@contextmanager
def _one_part_at_a_time(videos: Path) -> Iterator[None]:
    """Let other parts wait: each would write the same videos under the same temporary names."""
    with disk_errors(videos):
        videos.mkdir(parents=True, exist_ok=True)
    with holding(temporary(videos / "synthetic"), wait=True):
        yield


def _synthetic_catalogue(videos: Path, repeat: int) -> Catalogue:
    """Return the catalogue of the written videos, each `repeat` times, with their splits."""
    catalogue = folder_catalogue(videos, name="synthetic")
    splits = {name: Split(classes) for name, classes in synthetic_videos.splits().items()}
    dataset = Dataset("synthetic", catalogue.dataset.classes, splits)
    return replace(catalogue, dataset=dataset, videos=catalogue.videos * repeat)


def _run(
    catalogue: Catalogue,
    *,
    out: Path,
    profile: str,
    size: str | None,
    motion: str,
    flow_estimator: str | None,
    dry_run: bool,
    part: str | None = None,
    join: bool = False,
    min_coverage: float = 0.0,
    allow_missing: bool = False,
    unmatched: Path | None = None,
    **settings_as_named: Any,  # noqa: ANN401
) -> None:
    """Check the options, report the coverage, then estimate the run or make the shards."""
    chosen = part_of(part, join=join, retry_failed=settings_as_named["retry_failed"])
    _check_names(catalogue.dataset)
    names = motion_of(motion)
    if flow_estimator and not any(flow_pairs(name) for name in motion_series(names)):
        raise ConfigError("--flow-estimator is for flow, and --motion names none; name one, such as flow8g2")
    settings = Settings(geometry_of(profile, size), names, flow_estimator=flow_estimator or DIS, **settings_as_named)
    for line in report(catalogue, min_coverage):
        click.echo(line)
    if unmatched:
        write_missing(catalogue, unmatched)
    if dry_run:
        if sentence := lacking(catalogue, min_coverage):
            click.echo(f"warning: {sentence}", err=True)
        for line in estimate(catalogue, out, settings):
            click.echo(line)
        return
    if not allow_missing:
        check_coverage(catalogue, min_coverage)
    _make(catalogue, out, settings, part=chosen, join=join)


def _check_names(dataset: Dataset) -> None:
    """Refuse names that no reader would take, before anything is made under them.

    Raises:
        ConfigError: there is such a name.
    """
    for text in (dataset.name, *dataset.classes, *dataset.splits):
        if fault := text_fault(text):
            raise ConfigError(
                f"the name {quoted(text)} of the data set or of one of its classes {fault}; choose another"
            )


def _make(catalogue: Catalogue, out: Path, settings: Settings, *, part: Part | None, join: bool) -> None:
    """Make a part, join all parts, or make the whole set; report it."""
    if part:
        report_part(preprocess_part(catalogue, out, settings, part), out, part)
        return
    failures = join_parts(catalogue, out, settings) if join else preprocess(catalogue, out, settings)
    report_whole(catalogue, failures, out, retried=settings.retry_failed)


def main() -> None:
    """Run the command."""
    sys.path.insert(0, "")  # --flow-estimator module:function may lie in the current folder
    run_command(cli)


if __name__ == "__main__":
    main()
