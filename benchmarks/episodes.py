"""Episodes a second: ours from shards, the usual way from video files, and the bound that decoding sets.

python -m benchmarks.episodes --videos VIDEOS [--shards SHARDS]
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.measure.bounds import CopyBound, DaliBound, PortableBound, WriteBound, frames_of, synchronise
from benchmarks.measure.environment import load_average, write_result
from benchmarks.measure.timing import Contestant, Timing, markdown_table, read_whole, time_in_turn, warm_up
from benchmarks.preprocess import store
from benchmarks.sides.clips import make_clips
from benchmarks.sides.sequential import DOES, NAME, SequentialClips
from benchmarks.sides.usual import DecordEpisodes, FirstEpisodes, check_decord, clips_of_plan, episode_loader
from fsar import EpisodeLoader
from pipelines.augment.clips import normalise
from pipelines.decoding.dali import dali_is_installed
from pipelines.episodes.rules import EpisodeRules
from pipelines.episodes.stream import EpisodeStream
from pipelines.reads import Reads
from preprocess.datasets.folder import folder_catalogue
from shards_spec import ShardSet
from shards_spec.cli.console import run_command
from shards_spec.errors import ConfigError

CORES = len(os.sched_getaffinity(0))
HELD = 8  # episodes whose payloads the bounds keep in memory
PLANNED = 32  # episodes that the usual way goes round in
JITTER = "float32, jitter"
LAST = "ours, raw, float32, channels last"
COPYING, WRITING = "bound, raw, copying windows alone", "bound, writing float32 alone"
FIELDS = {"float32 and 1 field": 1, "float32 and 4 fields": 4, "float32 and all fields": 0}  # of each segment
KINDS = ("uint8", "float32", JITTER, *FIELDS)
SERIES = "flow1"
MEAN, STD = (0.45,) * 3, (0.225,) * 3


@dataclass(frozen=True)
class Setting:
    """Hold what all contestants share."""

    shards: ShardSet
    videos: Path
    split: str
    rules: EpisodeRules
    workers: int
    device: torch.device
    raw: ShardSet | None = None  # the same videos, their frames not coded

    def with_jitter(self) -> Setting:
        """Return the setting with the colours of queries jittered."""
        return replace(self, rules=replace(self.rules, query_jitter=True))

    def with_fields(self, fields: int) -> Setting:
        """Return the setting with stored flow beside the frames, so many fields of each segment."""
        return replace(self, rules=replace(self.rules, streams="both", motion_series=SERIES, fields=fields))

    def stream(self) -> EpisodeStream:
        """The episodes: every contestant begins with number 0."""
        return EpisodeStream(self.shards, self.split, self.rules, seed=0)


@click.command()
@click.option(
    "--videos", type=click.Path(path_type=Path), help="CLASS/video files.  [default: clips made for this run]"
)
@click.option("--shards", "shards_path", type=click.Path(path_type=Path), help="Their shards.  [default: made first]")
@click.option("--raw-shards", "raw_path", type=click.Path(path_type=Path),
              help="The same with --codec raw.  [default: made first, unless --shards is given]")  # fmt: skip
@click.option("--split", default="train", show_default=True, help="Split of --shards to draw from.")
@click.option("--way", type=click.IntRange(1), default=5, show_default=True, help="Fewer where the split has fewer.")
@click.option("--shot", type=click.IntRange(1), default=1, show_default=True)
@click.option("--queries", type=click.IntRange(1), default=6, show_default=True, help="For each class.")
@click.option("--workers", type=click.IntRange(1), default=CORES, show_default=True,
              help="Processes of the usual DataLoader, and decoding threads of ours.")  # fmt: skip
@click.option("--device", default="cpu", show_default=True, help="Where the episodes are wanted.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--seconds", type=click.FloatRange(0, min_open=True), default=0.8, show_default=True,
              help="About so long is one measurement of one contestant, or two episodes a worker.")  # fmt: skip
@click.option("--name", default="episodes", show_default=True, help="Name of the file below benchmarks/results.")
def main(
    videos: Path | None,
    shards_path: Path | None,
    raw_path: Path | None,
    name: str,
    **options: Any,  # noqa: ANN401
) -> None:
    """Measure how many few-shot episodes a second arrive on the device.

    Three ways of making the same episodes from the same frames are timed in turn, round by round.

    "ours": JPEG frames from shards, decoded by DALI or by the portable executor.

    "usual": a torch DataLoader of worker processes that decode the video files with decord.

    "bound": the same JPEGs decoded from memory by the same decoder on as many threads, and nothing else; for
    float32, the time of writing that much float32 to memory that is warm is added.

    "ours, raw": the same frames from shards of --codec raw. Its bound is to copy the same windows from memory of
    the process on as many threads; for float32, it is to write that output. "channels last" has the same clips
    in the order in memory that some trunks want.

    "webdataset": its reader streams the same JPEG shards from end to end; it cannot draw episodes.

    "and 4 fields": the same with stored flow, 4 fields of each of 8 segments, made into maps of displacement. The
    bound adds the decoding of these fields and nothing else. Nobody's usual way has flow.

    Two outputs: "uint8" is cropped frames on the device; "float32" is resized, cropped, normalised clips, ready for
    the model. Colour jitter is off in these rows and on, on both sides, in the rows "float32, jitter". "ratio" is to
    the fastest usual way of that output. The making of the shards is not in these figures (benchmarks.preprocess
    measures it). Warm-up runs are left out; all files are in the page cache, on both sides. Each measurement begins
    with nothing prepared and ends with nothing unfinished. Medians, with the least and the most of all rounds.
    "core-s" is CPU time of all processes, which says more than rates on a busy machine.
    """
    check_decord()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        before = load_average()
        if videos is None:
            if shards_path is not None:
                raise ConfigError("--shards needs the --videos that they were made from")
            click.echo("making clips of UCF101's size ...")
            videos = make_clips(scratch / "videos")
        if shards_path is None:
            click.echo("making their shards ...")
            least = options["shot"] + options["queries"]
            shards_path = make_shards(videos, scratch / "shards", least)
            raw_path = raw_path or make_shards(videos, scratch / "raw", least, codec="raw")
        shards = stack.enter_context(ShardSet.open(shards_path))
        rounds, seconds = options.pop("rounds"), options.pop("seconds")
        setting = make_setting(shards, videos, **options)
        if raw_path is not None:
            setting = replace(setting, raw=open_raw(raw_path, shards, stack))
        context = describe(setting, shards_path) | {"load_average_before": before, "rounds": rounds}
        click.echo(f"{context['episode']}; load average {before[0]} before")
        rows = measure(setting, rounds=rounds, seconds=seconds)
        click.echo(table(rows))
        click.echo(f"load average {load_average()[0]} after; written: {write_result(name, rows, context=context)}")


def make_shards(videos: Path, out: Path, per_class: int, *, codec: str = "jpeg") -> Path:
    """Store 256x256 frames; the split "train" is every class with enough videos for an episode."""
    every = folder_catalogue(videos)
    labels = [video.label for video in every.videos]
    enough = [label for label in every.dataset.classes if labels.count(label) >= per_class]
    if not enough:
        raise ConfigError(f"no class of {videos} has {per_class} videos: use fewer --queries")
    store(folder_catalogue(videos, classes={"train": enough}), out, codec=codec, motion=(SERIES,))
    return out


def open_raw(path: Path, shards: ShardSet, stack: ExitStack) -> ShardSet:
    """The raw set of the same videos, its files read once, so that they lie in the page cache."""
    raw = stack.enter_context(ShardSet.open(path))
    same = raw.num_videos == shards.num_videos and (raw.frames == shards.frames).all()
    if raw.series("rgb").codec != "raw" or not same:
        raise ConfigError(f"{path} is no raw shard set of the videos of {shards.path}")
    read_whole(path.glob("rgb-*.tar"))
    return raw


def make_setting(
    shards: ShardSet, videos: Path, *, split: str, way: int, shot: int, queries: int, workers: int, device: str
) -> Setting:
    """Rules of the measured episodes: 8 random frames a clip, 256 to a random crop of 224, no flip."""
    available = len(shards.dataset.splits[split].classes) if split in shards.dataset.splits else way
    rules = EpisodeRules(
        way=min(way, available),
        shot=shot,
        queries=queries,
        frames=8,
        random_frames=True,
        resize=256,
        crop=224,
        random_crop=True,
        groups="any",
    )
    return Setting(shards, videos, split, rules, workers, torch.device(device))


def describe(setting: Setting, shards_path: Path) -> dict[str, Any]:
    """Prepare what is measured, and read every file once, so that it lies in the page cache."""
    rules, rows = setting.rules, setting.shards.split_rows(setting.split)
    clips = rules.way * rules.videos_per_class
    files = [setting.videos / setting.shards.name(int(row)) for row in rows]
    return {
        "episode": f"{rules.way}-way {rules.shot}-shot, {rules.queries} queries a class: {clips} clips, "
        f"{clips * rules.frames} frames of {rules.crop}x{rules.crop}",
        "videos": len(files),
        "video_frames": int(setting.shards.frames[rows].sum()),
        "video_bytes": read_whole(files),
        "shard_bytes": read_whole(shards_path.glob("rgb-*.tar")),
        "shards_sha256": setting.shards.sha256,
        "workers": setting.workers,
        "device": str(setting.device),
        "page_cache": "warm on both sides",
    }


def measure(setting: Setting, *, rounds: int, seconds: float, least: int = 2) -> list[dict[str, Any]]:
    """Time all contestants in turn; one row each."""
    with ExitStack() as stack:
        entries = contestants(setting, stack)
        every = [contestant for _, _, contestant in entries]
        counts = warm_up(every, seconds=seconds, workers=setting.workers, least=least)
        timings = time_in_turn(every, rounds=rounds, counts=counts)
    rows = [_row(kind, side, timings[each.name], each.name) for kind, side, each in entries]
    return _with_bounds(rows)


def contestants(setting: Setting, stack: ExitStack) -> list[tuple[str, str, Contestant]]:
    """Who runs: (output, side, contestant)."""
    entries = []
    executors = ["dali", "portable"] if dali_is_installed() else ["portable"]
    jittered = setting.with_jitter()
    for executor in [*executors, *(["raw"] if setting.raw else [])]:
        plain = stack.enter_context(_ours(setting, executor))
        coloured = stack.enter_context(_ours(jittered, executor))
        runs = {"uint8": _run_frames(plain), "float32": _run_episodes(plain), JITTER: _run_episodes(coloured)}
        entries += [(kind, "ours", Contestant(f"ours, {executor}, {kind}", run)) for kind, run in runs.items()]
        if executor == "raw":
            last = stack.enter_context(_ours(setting, executor, memory_format=torch.channels_last))
            entries.append(("float32", "ours", Contestant(LAST, _run_episodes(last))))
        else:
            entries += _of_both(setting, executor, stack)
    entries += [
        ("uint8", "usual", Contestant("usual, decord, uint8", usual(setting, "uint8"))),
        ("float32", "usual", Contestant("usual, decord, float32", usual(setting, "float32"))),
        (
            "float32",
            "usual",
            Contestant("usual, decord, uint8 sent, normalised after", usual(setting, "uint8", then_normalise=True)),
        ),
        (JITTER, "usual", Contestant(f"usual, decord, {JITTER}", usual(jittered, "float32"))),
    ]
    entries.append(("uint8", "stream", Contestant(NAME, _sequential(setting).run)))
    return entries + _bounds(setting, executors, stack)


def _of_both(setting: Setting, executor: str, stack: ExitStack) -> list[tuple[str, str, Contestant]]:
    """Episodes of frames and flow, and the decoding of the flow alone; nothing where none is stored."""
    found = []
    for kind, fields in FIELDS.items() if SERIES in setting.shards.series_names else ():
        own = setting.with_fields(fields)
        loader = stack.enter_context(_ours(own, executor))
        found.append((kind, "ours", Contestant(f"ours, {executor}, {kind}", _run_episodes(loader))))
        reads = [own.stream().plan(n).motion_reads for n in range(HELD)]
        found.append(
            (
                kind,
                "bound",
                Contestant(f"bound, {executor}, fields alone, {kind}", _decoding(own, executor, reads, stack)),
            )
        )
    return found


def _decoding(
    setting: Setting, executor: str, episodes: Sequence[Sequence[Reads]], stack: ExitStack
) -> Callable[[int], None]:
    """Decoding what episodes read, and nothing else."""
    threads = setting.workers
    if executor == "dali":
        return DaliBound(episodes, setting.shards, threads=threads, device=setting.device).run
    return stack.enter_context(PortableBound(episodes, setting.shards, threads=threads)).run


def _sequential(setting: Setting) -> SequentialClips:
    rules, paths = setting.rules, sorted(setting.shards.path.glob("rgb-*.tar"))
    clips = rules.way * rules.videos_per_class
    return SequentialClips(paths, clips=clips, frames=rules.frames, crop=rules.crop, workers=setting.workers)


def _ours(
    setting: Setting, executor: str, *, memory_format: torch.memory_format = torch.contiguous_format
) -> EpisodeLoader:
    raw = setting.raw if executor == "raw" else None
    return EpisodeLoader(
        raw or setting.shards,
        setting.split,
        setting.rules,
        device=setting.device,
        executor="auto" if raw else executor,
        threads=setting.workers,
        mean=MEAN,
        std=STD,
        memory_format=memory_format,
    )


def _run_frames(loader: EpisodeLoader) -> Callable[[int], None]:
    def run(count: int) -> None:
        for _ in loader.background.frames(loader.stream, 0, count):
            pass
        synchronise(loader.device)

    return run


def _run_episodes(loader: EpisodeLoader) -> Callable[[int], None]:
    def run(count: int) -> None:
        for _ in loader.episodes(0, count):
            pass
        synchronise(loader.device)

    return run


def usual_clips(setting: Setting, count: int) -> list[Any]:
    """The first episodes of the stream as the usual way needs them, planned before the clock starts."""
    stream = setting.stream()
    return [clips_of_plan(stream.plan(n), setting.shards, setting.videos) for n in range(count)]


def usual(setting: Setting, output: str, *, then_normalise: bool = False) -> Callable[[int], None]:
    """The usual loader, its episodes moved to the device, and there made float32 and normalised where asked."""
    rules, device = setting.rules, setting.device
    dataset = DecordEpisodes(usual_clips(setting, PLANNED), output=output, resize=rules.resize, crop=rules.crop)
    sampler = FirstEpisodes(len(dataset))
    loader = episode_loader(dataset, sampler, workers=setting.workers, pin_memory=device.type == "cuda")

    def run(count: int) -> None:
        sampler.count = count
        for batch in loader:
            episode = batch.to(device, non_blocking=True)
            if then_normalise:
                for clip in episode:  # [T, h, w, 3]; one clip fits the cache
                    normalise(clip.movedim(-1, 1).contiguous().float(), MEAN, STD, white=255.0)
        synchronise(device)

    return run


def _bounds(setting: Setting, executors: Sequence[str], stack: ExitStack) -> list[tuple[str, str, Contestant]]:
    stream, rules, threads = setting.stream(), setting.rules, setting.workers
    plans = [stream.plan(n) for n in range(HELD)]
    frames = [plan.reads for plan in plans]
    shape = (frames_of(plans[0].reads), 3, rules.crop, rules.crop)
    write = Contestant(WRITING, WriteBound(shape, device=setting.device).run)
    found = [
        (
            "uint8",
            "bound",
            Contestant(f"bound, {executor}, decoding alone", _decoding(setting, executor, frames, stack)),
        )
        for executor in executors
    ]
    if setting.raw:
        copy = stack.enter_context(CopyBound([stream.plan(n) for n in range(PLANNED)], setting.raw, threads=threads))
        found.append(("uint8", "bound", Contestant(COPYING, copy.run)))
    return [*found, ("float32", "part", write)]


def _row(kind: str, side: str, timing: Timing, name: str) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "output": kind, "side": side} | ({"does": DOES} if side == "stream" else {})
    return row | {
        "episodes_per_second": round(timing.rate, 3),
        "least": round(min(timing.rates), 3),
        "most": round(max(timing.rates), 3),
        "core_seconds_per_episode": round(timing.core_seconds, 4),
        "episodes_a_round": timing.count,
        "rounds": len(timing.wall),
    }


def _with_bounds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add the float32 bounds, the ratio of each row to the fastest usual way, and its part of its bound."""
    rates = {row["name"]: row["episodes_per_second"] for row in rows}
    write = rates[WRITING]
    bounds: dict[tuple[str, str], float] = {}
    if COPYING in rates:
        bounds["uint8", "raw"], bounds["float32", "raw"] = rates[COPYING], write
    for executor in ("dali", "portable"):
        decode = rates.get(f"bound, {executor}, decoding alone")
        if decode:
            bounds["uint8", executor] = decode
            bounds["float32", executor] = round(1 / (1 / decode + 1 / write), 3)
            for kind in FIELDS:
                fields = rates.get(f"bound, {executor}, fields alone, {kind}")
                if fields:
                    bounds[kind, executor] = round(1 / (1 / decode + 1 / write + 1 / fields), 3)
    for row in rows:
        usual_rates = [other["episodes_per_second"] for other in rows if _peers(other, row)]
        if row["side"] == "ours":
            if usual_rates:
                row["ratio_to_usual"] = round(row["episodes_per_second"] / max(usual_rates), 2)
            bound = bounds.get((row["output"], row["name"].split(", ")[1]))
            row["part_of_bound"] = round(row["episodes_per_second"] / bound, 3) if bound else None
    made = [
        {
            "name": f"bound, {executor}, decoding and writing",
            "output": kind,
            "side": "bound",
            "episodes_per_second": rate,
        }
        for (kind, executor), rate in bounds.items()
        if kind != "uint8" and executor != "raw"
    ]
    return sorted(rows + made, key=lambda row: KINDS.index(row["output"]))


def _peers(other: dict[str, Any], row: dict[str, Any]) -> bool:
    return bool(other["side"] == "usual" and other["output"] == row["output"])


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for reading."""
    head = ["output", "way", "episodes/s (least-most)", "core-s/episode", "ratio to usual", "of bound", ""]
    return markdown_table(head, [_line(row) for row in rows])


def _line(row: dict[str, Any]) -> list[str]:
    rate = f"{row['episodes_per_second']:.2f}"
    spread = f" ({row['least']:.2f}-{row['most']:.2f})" if "least" in row else " (from the two)"
    core = f"{row['core_seconds_per_episode']:.3f}" if "least" in row else ""
    ratio = f"{row['ratio_to_usual']:.1f}" if "ratio_to_usual" in row else ""
    part = f"{row['part_of_bound']:.0%}" if row.get("part_of_bound") else ""
    return [row["output"], row["name"], rate + spread, core, ratio, part, row.get("does", "")]


if __name__ == "__main__":
    run_command(main, again="nothing was written")
