"""State the options of `fsar-preprocess` once each, and read the texts of those that have a form."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from preprocess.datasets.coverage import MIN_COVERAGE
from preprocess.datasets.folder import read_class_list
from preprocess.decode import MOST_FRAMES, MOST_STORED_SIDE, Geometry
from preprocess.plan import Settings
from preprocess.workers.executors import EXECUTORS
from preprocess.workers.parts import Part
from shards_spec.cli.console import LocalFolder, Place
from shards_spec.errors import ConfigError, suggest
from shards_spec.schema import CODECS, MOTION, is_motion
from shards_spec.splits.shipped import NAMES

SMALLEST, LARGEST = 32, 4096  # pixels of a side: optical flow takes no fewer, a JPEG holds so many
PATH = click.Path(path_type=Path)
PLACE = Place()  # a folder of videos; those at a URL are copied to this machine one by one


def _add(options: list[Callable[..., Any]]) -> Callable[..., Any]:
    """Return a decorator that adds several options, in this order."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def videos_option(dataset: str, default: str) -> Callable[..., Any]:
    """Return the option --videos of a data set with a usual folder."""
    return click.option("--videos", type=PLACE, default=default, show_default=True, help=f"Folder of {dataset}.")


# What every command has. Defaults that `Settings` has are stated there.
common_options = _add([
    click.option("--out", type=LocalFolder(), required=True, help="Folder of the shards."),
    click.option("--profile", type=click.Choice(["square256", "short256"]), default="square256", show_default=True,
                 help="square256: squashed to a square, what MoLo and HyRSM train on; short256: aspect kept."),
    click.option("--size", help="Other size: N (side of the square, or short side), or HxW."),
    click.option("--codec", type=click.Choice(list(CODECS)), default=Settings.codec, show_default=True,
                 help="Of the frames; raw: ten times the bytes and nothing to decode, for sets that fit memory."),
    click.option("--motion", default=",".join(Settings.motion), show_default=True,
                 help="Stored motion, comma-separated; none for frames only. diff, flow: between neighbouring "
                      "frames; flow8g2, ...: flow from every 2nd frame to the 8th after it, with motion scores "
                      "(MSCL). --dry-run says what each costs and who reads it."),
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
    click.option("--max-pixels", type=click.IntRange(1, MOST_STORED_SIDE**2), default=Settings.max_pixels,
                 show_default=True,
                 help="Pixels that a video's own frames may have; a larger one counts as failed (too-large)."),
    click.option("--retry-failed", is_flag=True, help="Try the videos of failures.jsonl again."),
    click.option("--dry-run", is_flag=True, help="Measure a few videos, print time, bytes and readers of each series."),
])  # fmt: skip
list_options = _add([
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
class_list_options = _add([
    click.option("--train-classes", help="Comma-separated class names, or a file with one a line."),
    click.option("--val-classes", help="The same for the classes that choose the checkpoint."),
    click.option("--test-classes", help="The same for the novel classes; all: every class that no other list names."),
])  # fmt: skip


def take_classes(options: dict[str, Any]) -> dict[str, list[str]]:
    """Take the class lists out of the options; return class names by split."""
    lists = {split: options.pop(f"{split}_classes") for split in NAMES}
    return {split: read_class_list(text) for split, text in lists.items() if text}


def part_of(text: str | None, *, join: bool, retry_failed: bool) -> Part | None:
    """Return the part that --part names.

    Raises:
        ConfigError: it is no part, or other options do not go with it.
    """
    if text and join:
        raise ConfigError("--part makes a part and --join joins all of them: give one of the two")
    if join and retry_failed:
        raise ConfigError("--join makes nothing: give --retry-failed with --part, to each part, then --join by itself")
    return Part.parse(text) if text else None


def geometry_of(profile: str, size: str | None) -> Geometry:
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


def motion_of(text: str) -> tuple[str, ...]:
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
