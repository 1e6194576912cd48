"""The command `fsar-preprocess`: videos -> shards, once; typed again it goes on where it was."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from preprocess.datasets import synthetic as synthetic_videos
from preprocess.datasets.catalogue import Catalogue
from preprocess.datasets.coverage import MIN_COVERAGE, check_coverage, lacking, report, write_missing
from preprocess.datasets.epic import epic_catalogue
from preprocess.datasets.folder import folder_catalogue, read_class_list
from preprocess.datasets.hmdb51 import hmdb51_catalogue
from preprocess.datasets.kinetics import kinetics_catalogue
from preprocess.datasets.ssv2 import ssv2_catalogue
from preprocess.datasets.ucf101 import ucf101_catalogue
from preprocess.decode import MOST_FRAMES, MOST_SIDE, Geometry
from preprocess.encode.flow import DIS
from preprocess.estimate import estimate
from preprocess.plan import Settings
from preprocess.report import report_part, report_whole
from preprocess.stage import join_parts, preprocess, preprocess_part
from preprocess.workers.executors import EXECUTORS
from preprocess.workers.parts import Part, holding
from shards_spec import Dataset, Split
from shards_spec.cli.console import LocalFolder, Place, SuggestingGroup, run_command
from shards_spec.errors import ConfigError, suggest
from shards_spec.files import disk_errors, temporary
from shards_spec.schema import CODECS, MOTION, flow_pairs, is_motion, motion_series, quoted, text_fault
from shards_spec.splits.shipped import NAMES

SMALLEST, LARGEST = 32, 4096  # pixels of a side: optical flow takes no fewer, a JPEG holds so many
SYNTHETIC_SIZE, EPIC_SIZE = "64", "256x320"
PATH = click.Path(path_type=Path)
PLACE = Place()  # a folder of videos; those at a URL are copied to this machine one by one


def _add(options: list[Callable[..., Any]]) -> Callable[..., Any]:
    """Return a decorator that adds several options, in this order."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _videos(dataset: str, default: str) -> Callable[..., Any]:
    """Return the option --videos of a data set with a usual folder."""
    return click.option("--videos", type=PLACE, default=default, show_default=True, help=f"Folder of {dataset}.")


# What every command has. Defaults that `Settings` has are stated there.
_common = _add([
    click.option("--out", type=LocalFolder(), required=True, help="Folder of the shards."),
    click.option("--profile", type=click.Choice(["square256", "short256"]), default="square256", show_default=True,
                 help="square256: squashed to a square, what MoLo and HyRSM train on; short256: aspect kept."),
    click.option("--size", help="Other size: N (side of the square, or short side), or HxW."),
    click.option("--codec", type=click.Choice(list(CODECS)), default=Settings.codec, show_default=True,
                 help="Of the frames; raw: ten times the bytes and nothing to decode, for sets that fit memory."),
    click.option("--motion", default=",".join(Settings.motion), show_default=True,
                 help="Stored motion, comma-separated; none for frames only. diff, flow: between neighbouring "
                      "frames; flow8g2, ...: flow from every 2nd frame to the 8th after it, with motion scores "
                      "(MSCL)."),
    click.option("--flow-estimator", metavar="MODULE:FUNCTION",
                 help="Your own estimator of the flow in --motion: two RGB frames [H, W, 3] uint8 -> [h, w, 2] "
                      "float32, u and v in pixels of this field; a slow one needs a longer --time-limit.  "
                      "[default: OpenCV's DIS]"),
    click.option("--workers", type=click.IntRange(1), default=len(os.sched_getaffinity(0)), show_default=True,
                 help="Processes."),
    click.option("--executor", type=click.Choice(list(EXECUTORS)), default=Settings.executor, show_default=True,
                 help="Who makes shards: --workers processes of this machine, or every CPU of a Ray cluster."),
    click.option("--part", metavar="I/N", help="Make only part I of N, one job of an array; then --join."),
    click.option("--join", is_flag=True, help="Make one shard set of the parts, when all are there."),
    click.option("--rows-per-shard", type=click.IntRange(0), default=Settings.rows_per_shard, show_default=True,
                 help="Videos of a shard, which one process makes; 0: as an old set has it, in a new one 64, or "
                      "fewer in a set of under 2,000 (at least 8)."),
    click.option("--time-limit", type=click.FloatRange(0, min_open=True), default=Settings.time_limit,
                 show_default=True, help="Seconds that one video may take."),
    click.option("--max-frames", type=click.IntRange(2, MOST_FRAMES), default=Settings.max_frames, show_default=True,
                 help="Frames that a video may have; a longer one counts as failed (too-long)."),
    click.option("--max-pixels", type=click.IntRange(1, MOST_SIDE**2), default=Settings.max_pixels, show_default=True,
                 help="Pixels that a video's own frames may have; a larger one counts as failed (too-large)."),
    click.option("--retry-failed", is_flag=True, help="Try the videos of failures.jsonl again."),
    click.option("--dry-run", is_flag=True, help="Measure a few videos, print time and bytes of each series."),
])  # fmt: skip
_lists = _add([
    click.option("--splits", type=PATH,
                 help="Lists of the videos: a folder of {train,val,test}_few_shot.txt or {train,val,test}list*.txt, "
                      "or one .csv or .json file."),
    click.option("--unmatched", type=PATH, help="File for the names that are listed but not found."),
    click.option("--min-coverage", type=click.FloatRange(0, 1), default=MIN_COVERAGE, show_default=True,
                 help="Refuse a data set with a smaller share of its videos."),
    click.option("--allow-missing", is_flag=True, help="Go on with the videos that are there, however few."),
    click.option("--follow-links", "links", is_flag=True,
                 help="Take what links lead to outside of the folder of videos, which is refused otherwise."),
])  # fmt: skip
_class_lists = _add([
    click.option("--train-classes", help="Comma-separated class names, or a file with one a line."),
    click.option("--val-classes", help="The same for the classes that choose the checkpoint."),
    click.option("--test-classes", help="The same for the novel classes; all: every class that no other list names."),
])  # fmt: skip


@click.group(cls=SuggestingGroup, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Decode videos once into shards of frames, frame differences and optical flow.

    Exit codes: 0 done; 2 bad input, nothing lost; 3 done, but some videos failed (listed in failures.jsonl).
    """


@cli.command()
@click.option("--videos", type=PLACE, required=True, help="Top of a tree of CLASS/video files, also at a URL.")
@click.option("--name", default="folder", show_default=True, help="Name of the data set in results.")
@click.option("--holdout", type=int, default=0, help="Hold out this many classes for testing.")
@_class_lists
@click.option("--group", help="Regular expression on file names; its first bracket is the group (scene, person, ...).")
@_lists
@_common
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
    classes = _take_classes(options)
    if sum(map(bool, (classes, holdout, splits))) > 1:
        raise ConfigError("--holdout, --splits and class lists each choose the splits: give one of these")
    catalogue = folder_catalogue(
        videos, name=name, classes=classes, holdout=holdout, splits=splits, group=group, links=links
    )
    _run(catalogue, **options)


@cli.command()
@_videos("UCF101", "data/UCF-101")
@_lists
@_common
def ucf101(videos: Path, splits: Path | None, *, links: bool, **options: Any) -> None:  # noqa: ANN401
    """UCF101: UCF-101/<Class>/v_<Class>_gNN_cNN.avi, at any depth."""
    _run(ucf101_catalogue(videos, splits=splits, links=links), **options)


@cli.command()
@_videos("HMDB51", "data/hmdb51")
@_lists
@_common
def hmdb51(videos: Path, splits: Path | None, *, links: bool, **options: Any) -> None:  # noqa: ANN401
    """HMDB51: <class>/<name>.avi, at any depth."""
    _run(hmdb51_catalogue(videos, splits=splits, links=links), **options)


@cli.command()
@_videos("Kinetics", "data/kinetics")
@click.option(
    "--classes",
    type=click.Choice(["100", "all"]),
    default="100",
    show_default=True,
    help="100: the few-shot classes; all: every class folder, for pre-training or classes of one's own.",
)
@_class_lists
@_lists
@_common
def kinetics(videos: Path, classes: str, splits: Path | None, *, links: bool, **options: Any) -> None:  # noqa: ANN401
    """Kinetics: {train,val}/<class>/<YouTube id>_<start>_<end>.mp4, at any depth."""
    chosen = _take_classes(options)
    if chosen and (classes == "100" or splits):
        raise ConfigError(
            "--train-classes, --val-classes and --test-classes go with --classes all and without --splits"
        )
    _run(kinetics_catalogue(videos, classes=classes, splits=splits, class_lists=chosen, links=links), **options)


@cli.command()
@_videos("Something-Something V2", "data/ssv2")
@click.option("--labels", type=PATH, help="Folder of its train and validation JSON files, which name the classes.")
@click.option("--variant", type=click.Choice(["full", "small"]), help="Which of the two few-shot splits the lists are.")
@_lists
@_common
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
@_videos("the clips", "data/epic")
@_lists
@_common
def epic(videos: Path, splits: Path | None, *, links: bool, **options: Any) -> None:  # noqa: ANN401
    """EPIC-Kitchens: <recording>_<n>.MP4 that --splits lists; 256x320 unless --size is given."""
    if options["size"] is None and options["profile"] == "square256":
        options["size"] = EPIC_SIZE
    _run(epic_catalogue(videos, splits=splits, links=links), **options)


@cli.command()
@click.option("--videos", type=PATH, help="Folder for the videos.  [default: OUT/videos]")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--per-class", type=click.IntRange(1), default=24, show_default=True, help="Videos a class.")
@_common
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


def _take_classes(options: dict[str, Any]) -> dict[str, list[str]]:
    """Take the class lists out of the options; return class names by split."""
    lists = {split: options.pop(f"{split}_classes") for split in NAMES}
    return {split: read_class_list(text) for split, text in lists.items() if text}


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
    chosen = _part(part, join=join, retry_failed=settings_as_named["retry_failed"])
    _check_names(catalogue.dataset)
    names = _motion(motion)
    if flow_estimator and not any(flow_pairs(name) for name in motion_series(names)):
        raise ConfigError("--flow-estimator is for flow, and --motion names none; name one, such as flow8g2")
    settings = Settings(_geometry(profile, size), names, flow_estimator=flow_estimator or DIS, **settings_as_named)
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


def _part(text: str | None, *, join: bool, retry_failed: bool) -> Part | None:
    """Return the part that --part names.

    Raises:
        ConfigError: it is no part, or other options do not go with it.
    """
    if text and join:
        raise ConfigError("--part makes a part and --join joins all of them: give one of the two")
    if join and retry_failed:
        raise ConfigError("--join makes nothing: give --retry-failed with --part, to each part, then --join by itself")
    return Part.parse(text) if text else None


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


def _geometry(profile: str, size: str | None) -> Geometry:
    """Return the frame size that --profile and --size ask for.

    Raises:
        ConfigError: the size is of another form, odd, too small or too large.
    """
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
    """Return the names in --motion.

    Raises:
        ConfigError: one is not known.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["none"]:
        return ()
    for name in names:
        if not is_motion(name):
            known = suggest(name, [*MOTION, "flow8g2", "none"])
            raise ConfigError(f'--motion: no modality "{name}"; {known}; flow8g2 stands for any flowDgG')
    return tuple(names)


def main() -> None:
    """Run the command."""
    sys.path.insert(0, "")  # --flow-estimator module:function may lie in the current folder
    run_command(cli)


if __name__ == "__main__":
    main()
