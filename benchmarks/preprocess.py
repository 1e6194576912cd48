"""Videos a second into shards: ours, ffmpeg into folders of JPEGs, and the bound that decoding and flow set.

python -m benchmarks.preprocess --videos VIDEOS
"""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, redirect_stderr
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from subprocess import DEVNULL, run
from typing import Any

import click
import cv2
import numpy as np

from benchmarks.measure.environment import load_average, write_result
from benchmarks.measure.timing import Contestant, Timing, markdown_table, on_cores, read_whole, time_in_turn
from benchmarks.sides.clips import make_clips
from benchmarks.sides.usual import extract_flow, extract_frames, flow_pool, in_processes
from preprocess.datasets.catalogue import Catalogue
from preprocess.datasets.folder import folder_catalogue
from preprocess.decode import Geometry, VideoReader, ffmpeg_program, shrink
from preprocess.encode.flow_estimators import FLOW_SHORT_SIDE
from preprocess.stage import Settings, preprocess
from shards_spec import ShardSet
from shards_spec.cli.console import run_command
from shards_spec.errors import FsarError

CORES = len(os.sched_getaffinity(0))
SIZE = 256
FRAMES, DIFFERENCE, FLOW = "frames", "frames, difference", "frames, difference, flow"
USUAL_FLOW = "frames, flow"
PRODUCTS: dict[str, tuple[str, ...]] = {FRAMES: (), DIFFERENCE: ("diff",), FLOW: ("diff", "flow")}
DECODE, SCALE, DIS = "ffmpeg decoding alone", "ffmpeg decoding and scaling alone", "OpenCV DIS alone"
LEAST_PER_SHARD = 3  # a large set's shard has 64: with one video in each, what a shard costs would count 64 times
ON_ONE_CORE = {FRAMES, FLOW, SCALE, DIS}


@dataclass(frozen=True)
class Entry:
    """A contestant, what it makes, and with how many workers on how many cores."""

    side: str
    product: str
    workers: int
    cores: int
    contestant: Contestant


@dataclass(frozen=True)
class Work:
    """Hold what all contestants share: the videos, where to write, and processes started before the clock."""

    catalogue: Catalogue
    videos: list[Path]
    scratch: Path
    pools: dict[int, ProcessPoolExecutor]  # by number of workers
    luma: list[Path]  # small grey frames of each video, for DIS alone

    def folder(self, name: str, workers: int) -> Path:
        """Return the folder a contestant writes to; it stays after its last run, so that its bytes can be counted."""
        return self.scratch / f"{name} {workers}".replace(", ", "-").replace(" ", "_")


@click.command()
@click.option(
    "--videos", type=click.Path(path_type=Path), help="CLASS/video files.  [default: clips made for this run]"
)
@click.option("--workers", type=click.IntRange(1), multiple=True, default=sorted({1, CORES}), show_default=True,
              help="Processes; give it again for another row.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--scratch", type=click.Path(path_type=Path, exists=True),
              help="Folder to write in, of the disk that is meant.  [default: the system's temporary one]")  # fmt: skip
@click.option("--name", default="preprocess", show_default=True, help="Name of the file below benchmarks/results.")
def main(videos: Path | None, workers: tuple[int, ...], rounds: int, scratch: Path | None, name: str) -> None:
    """Measure how many videos a second are stored for training.

    All ways store every frame at 256x256, and are timed in turn, round by round.

    "ours": fsar-preprocess as a whole, into a fresh folder: decoding, JPEG, tars, checks, index.

    "usual": ffmpeg into one folder of JPEGs a video (-q:v 2), as many processes at a time as workers; with flow,
    OpenCV DIS (medium, short side 128, as ours) on those JPEGs, two grey JPEGs a pair.

    "bound": ffmpeg to nowhere (-f null), decoding alone, decoding and scaling; OpenCV DIS alone on frames in
    memory. For flow, the time of decoding and scaling and the time of DIS are added.

    "ratio" is to the usual way with as many workers; ours stores the frame difference with the flow, which the
    usual way does not. A shard is a worker's unit of work. Each worker gets about four shards of at least
    three videos here; in a real data set it gets many. All videos are in
    the page cache; a warm-up is left out, and the processes of OpenCV are started before the clock. Medians, with the
    least and the most.

    A worker is two processes, ffmpeg and ours, of several threads, so that one worker keeps more than one core busy.
    "cores" says on how many cores a row ran. Rows of one worker come twice where there are more cores: on all of them,
    and held to one core. "speed-up" is over ours of one worker on one core: what a further core and worker bring.
    "of bound" compares rates of as many workers on as many cores; "of bound, CPU" compares frames a core-second;
    "of DIS" is to DIS alone, with decoding, scaling, JPEG and the differences all on our side.
    """
    counts = sorted(set(workers))
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=scratch)))
        before = load_average()
        if videos is None:
            click.echo("making clips of UCF101's size ...")
            videos = make_clips(place / "videos", classes=4, per_class=3)
        work = prepare(videos, place, counts, stack)
        click.echo(f"{len(work.videos)} videos; load average {before[0]} before")
        rows, context = measure(work, counts, rounds=rounds)
        context |= {"load_average_before": before, "rounds": rounds, "size": SIZE, "page_cache": "warm"}
        click.echo(table(rows))
        click.echo(f"load average {load_average()[0]} after; written: {write_result(name, rows, context=context)}")


def store(
    catalogue: Catalogue, out: Path, *, motion: tuple[str, ...] = (), workers: int = CORES, codec: str = "jpeg"
) -> None:
    """Run the whole stage into `out`, without its progress bar.

    Raises:
        FsarError: a video could not be stored: the others would be compared with more.
    """
    per_shard = max(LEAST_PER_SHARD, len(catalogue.videos) // (4 * workers))
    settings = Settings(Geometry(SIZE, SIZE), motion=motion, rows_per_shard=per_shard, workers=workers, codec=codec)
    with redirect_stderr(io.StringIO()):
        failures = preprocess(catalogue, out, settings)
    if failures:
        raise FsarError(f"{failures[0].name} cannot be stored ({failures[0].detail}): take it out of --videos")


def prepare(videos: Path, scratch: Path, counts: Sequence[int], stack: ExitStack) -> Work:
    """Read every video once, start the pools of processes, and make the grey frames for DIS."""
    catalogue = folder_catalogue(videos)
    paths = [video.path for video in catalogue.videos]
    read_whole(paths)
    pools = {workers: stack.enter_context(flow_pool(workers)) for workers in counts}
    luma = [scratch / "luma" / f"{number:05d}.npy" for number in range(len(paths))]
    (scratch / "luma").mkdir()
    in_processes(pools[max(counts)], save_luma, paths, luma)
    return Work(catalogue, paths, scratch, pools, luma)


def save_luma(video: Path, out: Path) -> None:
    """Write the luma of all frames as DIS gets it: [n, 128, 128] uint8."""
    with VideoReader(video, Geometry(SIZE, SIZE), time_limit=300) as reader:
        np.save(out, np.stack([shrink(frame.y, FLOW_SHORT_SIDE) for frame in reader]))


def measure(work: Work, counts: Sequence[int], *, rounds: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Time all contestants in turn: one row each, and what was measured."""
    entries = [entry for workers in counts for entry in contestants(work, workers)]
    if 1 in counts and CORES > 1:
        entries += [
            _held_to_one_core(entry) for entry in entries if entry.workers == 1 and entry.product in ON_ONE_CORE
        ]
    every = [entry.contestant for entry in entries]
    first = [entry.contestant for entry in entries if entry.product in {FRAMES, SCALE}]
    time_in_turn(first, rounds=1, counts=[1] * len(first))  # starts the server of our workers, warms caches
    timings = time_in_turn(every, rounds=rounds, counts=[1] * len(every))
    frames = _check_same_frames(work, counts)
    rows = [_row(work, timings[entry.contestant.name], entry, frames) for entry in entries]
    context = {
        "videos": len(work.videos),
        "video_frames": frames,
        "video_bytes": sum(path.stat().st_size for path in work.videos),
    }
    return _with_ratios(rows), context


def contestants(work: Work, workers: int) -> list[Entry]:
    """Who runs with so many workers, on all cores."""
    pool = work.pools[workers]
    runs: dict[tuple[str, str], Callable[[int], None]] = {
        ("ours", product): _ours(work, product, workers) for product in PRODUCTS
    }
    runs["usual", FRAMES] = _usual(work, FRAMES, workers)
    runs["usual", USUAL_FLOW] = _usual(work, USUAL_FLOW, workers)
    runs["bound", DECODE] = lambda _: in_processes(pool, decode_to_nowhere, work.videos, [()] * len(work.videos))
    # one thread: with as many as cores, ffmpeg's default, the slices of so small a picture cost more than they bring
    scale = ("-filter_threads", "1", "-vf", f"scale={SIZE}:{SIZE}")
    runs["bound", SCALE] = lambda _: in_processes(pool, decode_to_nowhere, work.videos, [scale] * len(work.videos))
    runs["bound", DIS] = lambda _: in_processes(pool, flow_alone, work.luma)
    found = []
    for (side, product), each in runs.items():
        before = _cleaner(work.folder(f"{side} {product}", workers))
        contestant = Contestant(f"{side} {product} {workers}", each, before)
        found.append(Entry(side, product, workers, CORES, contestant))
    return found


def _held_to_one_core(entry: Entry) -> Entry:
    """Return the contestant with all of its processes on one core."""

    def run_held(count: int) -> None:
        with on_cores(1):
            entry.contestant.run(count)

    contestant = replace(entry.contestant, name=f"{entry.contestant.name}, one core", run=run_held)
    return replace(entry, cores=1, contestant=contestant)


def _cleaner(folder: Path) -> Callable[[], None]:
    def before() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        os.sync()  # what others wrote must not be written out on our time

    return before


def _ours(work: Work, product: str, workers: int) -> Callable[[int], None]:
    out = work.folder(f"ours {product}", workers)
    return lambda _: store(work.catalogue, out, motion=PRODUCTS[product], workers=workers)


def _usual(work: Work, product: str, workers: int) -> Callable[[int], None]:
    out = work.folder(f"usual {product}", workers)

    def usual(_: int) -> None:
        folders = extract_frames(work.videos, out, size=SIZE, workers=workers)
        if product == USUAL_FLOW:
            extract_flow(folders, work.pools[workers], short_side=FLOW_SHORT_SIDE)

    return usual


def decode_to_nowhere(video: Path, words: Sequence[str]) -> None:
    """Let ffmpeg decode a video, on one thread, and drop it."""
    call = [ffmpeg_program(), "-nostdin", "-v", "error", "-threads", "1", "-i", str(video), *words, "-f", "null", "-"]
    run(call, check=True, stdout=DEVNULL)


def flow_alone(luma: Path) -> None:
    """DIS of neighbouring frames, from memory, nothing kept."""
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    frames = np.load(luma)  # [n, h, w]
    for before, after in pairwise(frames):
        dis.calc(before, after, None)


def _check_same_frames(work: Work, counts: Sequence[int]) -> int:
    """Number of frames, which must be the same on both sides."""
    with ShardSet.open(work.folder(f"ours {FRAMES}", counts[0])) as shards:
        ours = int(shards.frames.sum())
    theirs = len(list(work.folder(f"usual {FRAMES}", counts[0]).glob("*/*.jpg")))
    if ours != theirs:
        raise FsarError(f"ours stored {ours} frames and the usual way {theirs}: their rates cannot be compared")
    return ours


def _row(work: Work, timing: Timing, entry: Entry, frames: int) -> dict[str, Any]:
    videos = len(work.videos)
    row = {
        "side": entry.side,
        "product": entry.product,
        "workers": entry.workers,
        "cores": entry.cores,
        "videos_per_second": round(timing.rate * videos, 3),
        "least": round(min(timing.rates) * videos, 3),
        "most": round(max(timing.rates) * videos, 3),
        "frames_per_second": round(timing.rate * frames),
        "core_seconds_per_video": round(timing.core_seconds / videos, 4),
        "frames_per_core_second": round(frames / max(timing.core_seconds, 0.01)),
    }
    folder = work.folder(f"{entry.side} {entry.product}", entry.workers)
    if folder.exists():
        files = [path for path in folder.rglob("*") if path.is_file()]
        row |= {
            "bytes_per_video": round(sum(path.stat().st_size for path in files) / videos),
            "files": len(files),
        }
    return row


def _with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to each row but the bounds' its part of the bound; to ours the ratio to the usual way and the speed-up."""
    found = {(row["side"], row["product"], row["workers"], row["cores"]): row for row in rows}
    for row in rows:
        if row["side"] == "bound":
            continue
        key, flow = (row["workers"], row["cores"]), "flow" in row["product"]
        for column, part in (("videos_per_second", "part_of_bound"), ("frames_per_core_second", "part_of_bound_cpu")):
            bounds = [found["bound", product, *key][column] for product in ((SCALE, DIS) if flow else (SCALE,))]
            row[part] = round(row[column] * sum(1 / bound for bound in bounds), 3)
        if flow:
            row["part_of_dis"] = round(row["videos_per_second"] / found["bound", DIS, *key]["videos_per_second"], 3)
        usual = found.get(("usual", USUAL_FLOW if flow else FRAMES, *key))
        if row["side"] == "ours" and row["product"] != DIFFERENCE and usual:  # the usual way has no difference
            row["ratio_to_usual"] = round(row["videos_per_second"] / usual["videos_per_second"], 2)
        alone = found.get((row["side"], row["product"], 1, 1))
        if alone:
            row["speed_up"] = round(row["videos_per_second"] / alone["videos_per_second"], 2)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for reading."""
    head = [
        "way",
        "stored",
        "workers",
        "cores",
        "videos/s (least-most)",
        "frames/s",
        "frames/core-s",
        "ratio",
        "of bound",
        "of bound, CPU",
        "of DIS",
        "speed-up",
        "kB/video",
    ]
    return markdown_table(head, [_line(row) for row in rows])


def _line(row: dict[str, Any]) -> list[str]:
    return [
        row["side"],
        row["product"],
        str(row["workers"]),
        str(row["cores"]),
        f"{row['videos_per_second']:.2f} ({row['least']:.2f}-{row['most']:.2f})",
        str(row["frames_per_second"]),
        str(row["frames_per_core_second"]),
        f"{row['ratio_to_usual']:.2f}" if "ratio_to_usual" in row else "",
        *(f"{row[part]:.0%}" if part in row else "" for part in ("part_of_bound", "part_of_bound_cpu", "part_of_dis")),
        f"{row['speed_up']:.2f}" if "speed_up" in row else "",
        f"{row['bytes_per_video'] / 1000:.0f}" if "bytes_per_video" in row else "",
    ]


if __name__ == "__main__":
    run_command(main, again="nothing was written")
