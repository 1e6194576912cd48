"""Run one job in this process: the videos of one shard -> the temporary tars of that shard."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from preprocess.datasets.catalogue import Video
from preprocess.decode import USUAL_FRAMES, USUAL_PIXELS, Geometry, VideoError, VideoReader
from preprocess.encode.flow_estimators import DIS
from preprocess.encode.series import Encoder, ThreadedEncoder, create_encoder, make_opencv_deterministic
from preprocess.workers.downloads import Downloads
from shards_spec.files import json_line
from shards_spec.index.layout import shard_path
from shards_spec.schema import Failure, flow_pairs, sample_key
from shards_spec.summary import Summary, summarise
from shards_spec.tar import TarSeriesWriter


@dataclass(frozen=True)
class Job:
    """The work of one shard: its videos, and the series to write of them.

    Attributes:
        shard: Its number.
        videos: Videos by catalogue row.
        classes: Number of each class by its name.
        series: Names of the series to write.
        out: Folder of the shard set.
        geometry: Size of the frames.
        time_limit: Seconds that one video may take.
        max_frames: Frames that a video may have.
        max_pixels: Pixels that a video's own frames may have.
        codec: Codec of the frames.
        estimators: Name of the flow estimator of some series; the others use DIS.
        fatal: Reason by row, for the videos at which workers died: they are not tried again.
    """

    shard: int
    videos: dict[int, Video]
    classes: dict[str, int]
    series: tuple[str, ...]
    out: Path
    geometry: Geometry
    time_limit: float
    max_frames: int = USUAL_FRAMES
    max_pixels: int = USUAL_PIXELS
    codec: str = "jpeg"
    estimators: Mapping[str, str] = field(default_factory=dict)
    fatal: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class VideoDone:
    """The message that one video is done; `frames` is 0 where it failed."""

    frames: int


@dataclass(frozen=True)
class ShardDone:
    """The message that the tars of a shard are whole, under their temporary names.

    Attributes:
        shard: Its number.
        rows: Rows of the videos that were tried.
        tars: Final path -> (temporary path, summary).
        failures: The videos of `rows` that could not be stored.
    """

    shard: int
    rows: set[int]
    tars: dict[Path, tuple[Path, Summary]]
    failures: list[Failure]


Messages = Generator[VideoDone | ShardDone]


def run_job(job: Job, report: Callable[[int], None]) -> ShardDone:
    """Decode the videos of a job and write its series under temporary names.

    Args:
        job: The work.
        report: Called after every video with the number of its frames (0: it failed).

    Raises:
        DiskError: the disk is full; the temporary files are gone by then.
        DecoderKilledError: the decoder was killed, which says nothing about the video.
    """
    failures: list[Failure] = []
    infos: dict[int, dict[str, dict[str, Any]]] = {}
    with ExitStack() as stack:
        paths = {name: shard_path(job.out, name, job.shard) for name in job.series}
        writers = {name: stack.enter_context(TarSeriesWriter(path)) for name, path in paths.items()}
        thread = stack.enter_context(ThreadPoolExecutor(1, initializer=make_opencv_deterministic))
        readers = stack.enter_context(closing(_readers(job)))
        for row, reader in readers:
            video = job.videos[row]
            try:
                infos[row] = _store(row, reader, job, writers, thread)
            except VideoError as error:
                failures.append(Failure(row, video.name, video.label, video.group, error.reason, error.detail))
            report(next(iter(infos[row].values()))["frames"] if row in infos else 0)
    tars = {
        paths[name]: (writer.written, _summary(writer, {row: info[name] for row, info in infos.items()}))
        for name, writer in writers.items()
    }
    return ShardDone(job.shard, set(job.videos), tars, failures)


def _readers(job: Job) -> Generator[tuple[int, VideoReader | VideoError]]:
    """Yield the rows of a job, each with its reader or with the reason why it has none.

    The decoder of the next video starts before a reader is handed over. So the start of its
    process costs no time, and it decodes ahead as far as its pipe holds frames.
    """
    rows = iter(job.videos)
    with Downloads({row: video.path for row, video in job.videos.items() if row not in job.fatal}) as files:
        started = [_start(row, files, job) for row in islice(rows, 1)]
        try:
            while started:
                started += [_start(row, files, job) for row in islice(rows, 1)]
                row, reader = started.pop(0)
                yield row, reader
                files.done(row)
        finally:
            for _, reader in started:
                if isinstance(reader, VideoReader):
                    reader.close()


def _start(row: int, files: Downloads, job: Job) -> tuple[int, VideoReader | VideoError]:
    """Start the decoder of a video."""
    if row in job.fatal:
        return row, VideoError("crash", job.fatal[row])
    try:
        limits = {"max_frames": job.max_frames, "max_pixels": job.max_pixels}
        return row, VideoReader(files.take(row), job.geometry, time_limit=job.time_limit, **limits)
    except VideoError as error:
        return row, error


def _store(
    row: int, decoded: VideoReader | VideoError, job: Job, writers: Mapping[str, TarSeriesWriter], thread: Executor
) -> dict[str, dict[str, Any]]:
    """Decode one video once, and append it to every series; return its JSON by series.

    Nothing is written before all of the video is known good: a tar only grows.

    Raises:
        VideoError: the video cannot be stored.
    """
    if isinstance(decoded, VideoError):
        raise decoded
    video = job.videos[row]
    encoders: dict[str, Encoder] = {}
    for name in writers:
        encoder = create_encoder(name, codec=job.codec, estimator=job.estimators.get(name, DIS))
        # Flow costs as much as all other series and the decoder together, so it has a thread.
        encoders[name] = encoder if flow_pairs(name) is None else ThreadedEncoder(encoder, thread)
    count = 0
    with decoded as reader:
        for frame in reader:
            count += 1
            for encoder in encoders.values():
                encoder.add(frame)
    common = {"name": video.name, "label": video.label, "group": video.group, "frames": count}
    source = {"fps": round(reader.fps, 4), "source_size": list(reader.source_size)}
    infos = {name: common | source | encoder.info() for name, encoder in encoders.items()}
    for name, writer in writers.items():
        files = dict(encoders[name].members())
        files["cls"] = str(job.classes[video.label]).encode()
        files["json"] = json_line(infos[name])
        writer.add(sample_key(row), files)
    return infos


def _summary(writer: TarSeriesWriter, infos: dict[int, dict[str, Any]]) -> Summary:
    samples = summarise(writer.members, infos, writer.path)
    return Summary(writer.size, writer.sha256, samples)
