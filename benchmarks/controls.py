"""Does the model use motion? MoLo beside three controls on the demo's shards, on the same test episodes.

    python -m benchmarks.controls --shards demo/shards

* shuffled: the trained MoLo, the frames of each test clip in random order.
* one frame: MoLo trained and tested on one frame a clip, repeated.
* prototypes: cosine prototypes of time-averaged features, trained from the same trunk for as many episodes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from benchmarks.environment import write_result

RUNS: dict[str, list[str]] = {
    "MoLo": ["--shuffle-control"],
    "MoLo, one frame": ["--frame-rule", "still"],
    "prototypes, trained": ["--method", "prototype"],
}


@click.command()
@click.option("--shards", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--seed", "seeds", type=int, multiple=True, default=(0, 1, 2), show_default=True)
def main(shards: Path, seeds: tuple[int, ...]) -> None:
    """Train MoLo and its controls on the same shards; print and store a table."""
    rows = [row for seed in seeds for row in train_all(shards, seed)]
    click.echo("| model | seed | accuracy | over episodes | over videos | chance |")
    click.echo("|---|---|---|---|---|---|")
    for row in rows:
        intervals = f"±{row['interval_episodes']:.1%} | ±{row['interval_videos']:.1%}"
        click.echo(f"| {row['model']} | {row['seed']} | {row['accuracy']:.1%} | {intervals} | {row['chance']:.0%} |")
    click.echo(f"written: {write_result('controls', rows)}")


def train_all(shards: Path, seed: int) -> list[dict[str, Any]]:
    """Results of all models for one seed."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, words in RUNS.items():
            run = Path(folder) / name.replace(" ", "-")
            command = [sys.executable, "-m", "fsar.cli.train", "--shards", str(shards), "--recipe", "demo"]
            subprocess.run([*command, "--run", str(run), "--seed", str(seed), *words], check=True)
            result = json.loads((run / "result.json").read_text())
            rows.append(_row(name, seed, result["test"], result))
            if "shuffled_frames" in result:
                rows.append(_row(f"{name}, frames shuffled", seed, result["shuffled_frames"], result))
    return rows


def _row(name: str, seed: int, test: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    figures = ("accuracy", "interval_episodes", "interval_videos", "chance", "episodes", "queries", "videos")
    row = {"model": name, "seed": seed} | {key: test[key] for key in figures}
    return row | {key: result[key] for key in ("episodes_trained", "seconds", "shards_sha256", "weights_sha256")}


if __name__ == "__main__":
    main()
