"""Index and sampler at scale: what opening a set and planning an episode cost, from 1,000 videos to 1,000,000.

    python -m benchmarks.index

The sets hold 32 kept frames a video, 100 videos a class and 64 a shard, and no pixels. Each size is measured in
fresh processes, opening and planning in three of which the median counts; memory is the most that was resident,
less the interpreter with its imports.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.measure.environment import write_result
from benchmarks.measure.timing import markdown_table
from benchmarks.sides.synthetic_index import FRAMES, PER_CLASS, ROWS_PER_SHARD, make_set
from shards_spec.cli.console import run_command

SIZES = (1_000, 10_000, 100_000, 1_000_000)
ROUNDS = 3
# A figure's key, what it is, its goal, and the key of what bounds it
FIGURES = (
    ("build_s", "index built from summaries, s", None, "build_bound_s"),
    ("build_mb", "memory for it, MB", 1_000.0, "build_bound_mb"),
    ("open_s", "set opened, s", 1.0, "open_bound_s"),
    ("open_cpu_s", "CPU time of that, s", None, None),
    ("open_mb", "memory for it, MB", 300.0, "open_bound_mb"),
    ("all_mb", "memory with three streams, MB", None, None),
    ("disjoint_stream_s", "stream made, s", None, None),
    ("disjoint_plan_us", "episode planned, median µs", 200.0, "disjoint_draws_us"),
    ("disjoint_plan_99_us", "99th percentile", None, None),
    ("any_stream_s", "groups any: stream made, s", None, None),
    ("any_plan_us", "episode planned, median µs", 200.0, "any_draws_us"),
    ("any_plan_99_us", "99th percentile", None, None),
    ("training_stream_s", "random frames, crops, flips: stream made, s", None, None),
    ("training_plan_us", "episode planned, median µs", None, "training_draws_us"),
    ("training_plan_99_us", "99th percentile", None, None),
)
BOUNDS = {
    "build_bound_s": "the summaries read and parsed as JSON, and nothing done with them",
    "build_bound_mb": "the columns of the series",
    "open_bound_s": "the stored columns read, and their content hashed",
    "open_bound_mb": "the columns themselves",
    "draws_us": "the random numbers of the episode",
}


@click.command()
@click.option("--largest", type=click.IntRange(SIZES[0]), default=SIZES[-1], show_default=True, help="Most videos.")
@click.option("--name", default="index", show_default=True, help="Of the file in benchmarks/results.")
def main(largest: int, name: str) -> None:
    """Measure sets of 1,000 videos and more; print and store a table. The largest takes about 1.5 GB of disk."""
    rows = [measure(videos) for videos in SIZES if videos <= largest]
    click.echo(table(rows))
    goals = {key: goal for key, _, goal, _ in FIGURES if goal is not None}
    context = {"episode": "5-way 5-shot, 5 queries a class, 8 frames", "goals": goals, "bounds": BOUNDS}
    click.echo(f"written: {write_result(name, rows, context=context)}")


def measure(videos: int) -> dict[str, Any]:
    """All figures of a set of so many videos."""
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / "shards"
        make_set(shards, videos)
        found = {"videos": videos, "classes": max(videos // PER_CLASS, 1), "frames": FRAMES}
        found["shards"] = -(-videos // ROWS_PER_SHARD)
        found |= _process("build", shards)
        plans = [_process("plan", shards) for _ in range(ROUNDS)]
        return found | {key: statistics.median(each[key] for each in plans) for key in plans[0]}


def _process(what: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.sides.index_process", what, str(folder)]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{what}: {done.stderr.strip().splitlines()[-1]}")
    return {key: float(f"{value:.4g}") for key, value in json.loads(done.stdout).items()}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for reading, one a column; the bound is that of the largest set."""
    head = ["videos", *(f"{row['videos']:,}" for row in rows), "goal", "bound"]
    return markdown_table(
        head,
        [
            [
                what,
                *(f"{row[key]:.3g}" if row[key] < 1_000 else f"{row[key]:,.0f}" for row in rows),
                "" if goal is None else f"{goal:g}",
                "" if bound is None else f"{rows[-1][bound]:.3g}",
            ]
            for key, what, goal, bound in FIGURES
        ],
    )


if __name__ == "__main__":
    run_command(main, again="nothing was written")
