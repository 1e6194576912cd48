"""One measurement of `benchmarks.index` in a process of its own: prints a line of JSON.

python -m benchmarks.index_process build FOLDER
python -m benchmarks.index_process plan FOLDER
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.draw import PhiloxDraw
from pipelines.plan import EpisodeRules, EpisodeStream
from shards_spec import ShardSet
from shards_spec.index import build_index

if TYPE_CHECKING:
    from collections.abc import Callable

EPISODES = 2_000
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
    """What some work returns, and its wall seconds."""
    began = time.perf_counter()
    found = work()
    return found, time.perf_counter() - began


def build(folder: Path) -> dict[str, float]:
    """Seconds and MB of writing the index from summaries."""
    before = resident("VmRSS")
    _, seconds = timed(lambda: build_index(folder))
    return {"build_s": seconds, "build_mb": resident("VmHWM") - before}


def plan(folder: Path) -> dict[str, float]:
    """Seconds and MB of opening the set and of its streams; microseconds of planning an episode."""
    before = resident("VmRSS")
    shards, seconds = timed(lambda: ShardSet.open(folder))
    found = {"open_s": seconds, "open_mb": resident("VmHWM") - before}
    for name, rules in RULES.items():
        stream, seconds = timed(lambda rules=rules: EpisodeStream(shards, "all", rules, seed=0))
        stream.plan(EPISODES)  # what a first call alone pays for
        taken = [timed(lambda n=n, stream=stream: stream.plan(n))[1] for n in range(EPISODES)]
        median, most = np.percentile(taken, [50, 99]) * 1e6
        found |= {f"{name}_stream_s": seconds, f"{name}_plan_us": median, f"{name}_plan_99_us": most}
        found[f"{name}_draws_us"] = _draws(rules) * 1e6
    return found | {"all_mb": resident("VmHWM") - before}


def _draws(rules: EpisodeRules) -> float:
    """Seconds of an episode's random numbers alone, the median of 200 episodes."""
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
