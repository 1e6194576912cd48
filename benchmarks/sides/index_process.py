"""One measurement of `benchmarks.index` in a process of its own: prints a line of JSON.

python -m benchmarks.sides.index_process build FOLDER
python -m benchmarks.sides.index_process plan FOLDER
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from benchmarks.measure.timing import read_whole
from pipelines.draw import PhiloxDraw
from pipelines.episodes.rules import EpisodeRules
from pipelines.episodes.stream import EpisodeStream
from shards_spec import ShardSet
from shards_spec.index.build import build_index
from shards_spec.index.layout import INDEX

EPISODES = 2_000
NEEDED = {"videos": ("label", "group", "frames", "fps"), "series/rgb": ("shard", "offset", "first", "size")}
TEST = EpisodeRules(way=5, shot=5, queries=5)
RULES = {
    "disjoint": TEST,
    "any": dataclasses.replace(TEST, groups="any"),
    "training": dataclasses.replace(TEST, random_frames=True, random_crop=True, query_flip=True),
}


def resident(kind: str) -> float:
    """Resident memory of this process in MB: `VmRSS` now, `VmHWM` at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) * 1024 / 1e6


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Return the result of some work, and its wall seconds."""
    began = time.perf_counter()
    found = work()
    return found, time.perf_counter() - began


def build(folder: Path) -> dict[str, float]:
    """Measure seconds and MB of writing the index from summaries, and the bounds of both."""
    before = resident("VmRSS")
    _, seconds = timed(lambda: build_index(folder))
    most = resident("VmHWM") - before
    summaries = sorted(folder.glob("rgb-*.json"))
    _, parsed = timed(lambda: [json.loads(path.read_bytes()) is None for path in summaries])
    columns = _columns(folder, "series/rgb")
    size = sum(array.nbytes for array in columns.values()) / 1e6
    return {"build_s": seconds, "build_mb": most, "build_bound_s": parsed, "build_bound_mb": size}


def _columns(folder: Path, group: str) -> dict[str, zarr.Array[Any]]:
    return dict(zarr.open_group(folder / INDEX / group, mode="r").arrays())


def _open_bound(folder: Path) -> dict[str, float]:
    """Seconds of reading the files of the columns that `open` needs and of hashing their content; MB of that."""
    columns = [(group, name) for group, names in NEEDED.items() for name in names]
    paths = [path for group, name in columns for path in (folder / INDEX / group / name).rglob("*") if path.is_file()]
    size = sum(_columns(folder, group)[name].nbytes for group, name in columns)
    _, read = timed(lambda: read_whole(paths))
    content = bytes(size)
    _, hashed = timed(lambda: hashlib.sha256(content).digest())
    return {"open_bound_s": read + hashed, "open_bound_mb": size / 1e6}


def plan(folder: Path) -> dict[str, float]:
    """Seconds and MB of opening the set and of its streams; microseconds of planning an episode."""
    before, cpu = resident("VmRSS"), time.process_time()
    shards, seconds = timed(lambda: ShardSet.open(folder))
    found = {"open_s": seconds, "open_cpu_s": time.process_time() - cpu, "open_mb": resident("VmHWM") - before}
    for name, rules in RULES.items():
        stream, seconds = timed(lambda rules=rules: EpisodeStream(shards, "all", rules, seed=0))
        stream.plan(EPISODES)  # what only a first call pays for
        taken = [timed(lambda n=n, stream=stream: stream.plan(n))[1] for n in range(EPISODES)]
        median, most = np.percentile(taken, [50, 99]) * 1e6
        found |= {f"{name}_stream_s": seconds, f"{name}_plan_us": median, f"{name}_plan_99_us": most}
        found[f"{name}_draws_us"] = _draws(rules) * 1e6
    return found | {"all_mb": resident("VmHWM") - before} | _open_bound(folder)


def _draws(rules: EpisodeRules) -> float:
    """Measure the seconds of an episode's random numbers, the median of 200 episodes."""
    videos = rules.way * rules.videos_per_class
    words = rules.way + videos + rules.way * rules.queries - 1 + videos * rules.frames * rules.random_frames

    def draw_all(n: int) -> None:
        draw = PhiloxDraw(0, n)
        for _ in range(words):
            draw.randint(0, 99)

    return float(np.median([timed(lambda n=n: draw_all(n))[1] for n in range(200)]))


if __name__ == "__main__":
    measure = {"build": build, "plan": plan}[sys.argv[1]]
    print(json.dumps(measure(Path(sys.argv[2]))))
