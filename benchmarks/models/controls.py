"""Does the model use motion? MoLo next to three controls on the demo's shards, on the same test episodes.

    python -m benchmarks.models.controls --shards demo/shards

* shuffled: the trained MoLo, the frames of each test clip in random order.
* one frame: MoLo trained and tested on one frame a clip, repeated.
* prototypes: cosine prototypes of time-averaged features, trained from the same trunk for as many episodes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click

from benchmarks.measure.environment import write_result

RUNS: dict[str, list[str]] = {
    "MoLo": ["--shuffle-control"],
    "MoLo, one frame": ["--frame-rule", "still"],
    "prototypes, trained": ["--method", "prototype", "--support-merge", "prototype", "--temperature", "0"],
}


@click.command()
@click.option("--shards", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--seed", "seeds", type=int, multiple=True, default=(0, 1, 2), show_default=True)
@click.option(
    "--jobs", type=click.IntRange(1), default=len(os.sched_getaffinity(0)), show_default=True, help="At once."
)
def main(shards: Path, seeds: tuple[int, ...], jobs: int) -> None:
    """Train MoLo and its controls on the same shards; print and store a table."""
    tasks = [(shards, name, seed, max(1, len(os.sched_getaffinity(0)) // jobs)) for seed in seeds for name in RUNS]
    with ThreadPoolExecutor(jobs) as pool:
        rows = [row for rows in pool.map(lambda task: train(*task), tasks) for row in rows]
    click.echo("| model | seed | accuracy | over episodes | over videos | chance |")
    click.echo("|---|---|---|---|---|---|")
    for row in rows:
        intervals = f"±{row['interval_episodes']:.1%} | ±{row['interval_videos']:.1%}"
        click.echo(f"| {row['model']} | {row['seed']} | {row['accuracy']:.1%} | {intervals} | {row['chance']:.0%} |")
    click.echo(f"written: {write_result('controls', rows)}")


def train(shards: Path, name: str, seed: int, threads: int) -> list[dict[str, Any]]:
    """Rows of one model and seed, trained in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        words = ["--shards", str(shards), "--recipe", "demo", "--run", str(run), "--seed", str(seed), *RUNS[name]]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-m", "fsar.cli.train", *words, "--threads", str(threads)]
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise click.ClickException(f"{name}, seed {seed}: {done.stderr.strip().splitlines()[-1]}")
        result = json.loads((run / "result.json").read_text())
    rows = [_row(name, seed, result["test"], result)]
    if "shuffled_frames" in result:
        rows.append(_row(f"{name}, frames shuffled", seed, result["shuffled_frames"], result))
    return rows


def _row(name: str, seed: int, test: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    figures = ("accuracy", "interval_episodes", "interval_videos", "chance", "episodes", "queries", "videos")
    row = {"model": name, "seed": seed} | {key: test[key] for key in figures}
    return row | {
        key: result[key] for key in ("episodes_trained", "training_seconds", "shards_sha256", "weights_sha256")
    }


if __name__ == "__main__":
    main()
