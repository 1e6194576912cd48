"""Estimate for `--dry-run` what a run would cost, from a few of its videos."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from preprocess.datasets.catalogue import Catalogue
from preprocess.decode import VideoError, VideoReader
from preprocess.encode.series import create_encoder
from preprocess.plan import Settings, wanted_plan
from preprocess.report import purpose
from preprocess.workers.downloads import Downloads

SAMPLED = 8  # videos at most


def estimate(catalogue: Catalogue, out: Path, settings: Settings) -> Iterator[str]:
    """Yield lines of text: time and bytes of each series and of the whole run, and who reads it.

    They are measured on up to `SAMPLED` videos, evenly spaced in the catalogue.
    """
    videos = catalogue.videos
    chosen = videos[:: max(1, len(videos) // SAMPLED)][:SAMPLED]
    series = list(wanted_plan(catalogue, settings).series)
    seconds: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    measured = 0
    for video in chosen:
        try:
            _measure(video.path, settings, series, seconds, sizes)
            measured += 1
        except VideoError as error:
            yield f"  {video.name}: {error}"
    if not measured:
        yield "nothing could be decoded: no estimate"
        return
    scale = len(videos) / measured
    total = sum(seconds.values())
    yield f"estimate from {measured} of {len(videos)} videos, one core (nothing is written to {out}):"
    for name in ("decode", *series):
        size = f"{sizes[name] * scale / 1e9:9.3f} GB {sizes[name] / sum(sizes.values()):6.1%}" if sizes[name] else ""
        yield f"  {name:8} {seconds[name] * scale / 60:8.1f} min {seconds[name] / total:6.1%} {size}"
    wall = total * scale / 60 / settings.workers
    yield f"  all      {wall:8.1f} min with {settings.workers} workers, {sum(sizes.values()) * scale / 1e9:.3f} GB"
    yield "what each series is for:"
    for name in series:
        shares = f"{sizes[name] / sum(sizes.values()):.0%} of the bytes, {seconds[name] / total:.0%} of the time"
        yield f"  {name}: {shares}; {purpose(name, series)}"


def _measure(path: Path, settings: Settings, series: list[str], seconds: Counter[str], sizes: Counter[str]) -> None:
    """Decode and encode one video; add its seconds and bytes by series to the two counters."""
    encoders = {name: create_encoder(name, codec=settings.codec, estimator=settings.flow_estimator) for name in series}
    mark = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal mark
        now = time.perf_counter()
        seconds[name] += now - mark  # type: ignore[assignment]  # Counter is typed for counts only
        mark = now

    limits = {"max_frames": settings.max_frames, "max_pixels": settings.max_pixels}
    with (
        Downloads({0: path}) as files,
        VideoReader(files.take(0), settings.geometry, time_limit=settings.time_limit, **limits) as reader,
    ):
        for frame in reader:
            lap("decode")
            for name, encoder in encoders.items():
                encoder.add(frame)
                lap(name)
    lap("decode")
    for name, encoder in encoders.items():
        sizes[name] += sum(len(data) for data in encoder.members().values())
