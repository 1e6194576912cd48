r"""One table of all methods: each trained from the same trunk, tested on the same episodes, in pairs.

    python -m benchmarks.models.accuracy --shards demo/shards --runs runs/demo
    python -m benchmarks.models.accuracy --shards arid --runs runs/arid -- \
        --recipe "{method}-lite0" --trunk-weights fetch

Every method takes its own recipe of the data set, or that of `--recipe`; the words after `--` go to every training,
with the method's name for {method}. What was trained already is kept, and what was interrupted goes on.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from benchmarks.measure.environment import write_result
from fsar.methods import METHODS

BASELINE = "prototype"


@click.command()
@click.option("--shards", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--runs", type=click.Path(path_type=Path), required=True, help="Folder for a run folder a method.")
@click.option("--method", "methods", multiple=True, default=tuple(METHODS), help="[default: all]")
@click.option("--name", help="Name of the result.  [default: accuracy-DATASET]")
@click.option("--episodes", type=int, help="Of the comparison.  [default: the recipe's test_episodes]")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(
    shards: Path, runs: Path, methods: tuple[str, ...], name: str | None, episodes: int | None, options: tuple[str, ...]
) -> None:
    """Train every method on the shards and compare them; print and store the table."""
    chosen = [BASELINE, *(method for method in methods if method != BASELINE)]
    for method in chosen:
        train(shards, runs / method, method, options)
    table = compare(shards, [runs / method for method in chosen], episodes)
    rows = [describe(runs / row["run"], row) for row in table.pop("runs")]
    dataset = json.loads((shards / "dataset.json").read_text())["name"]
    context = {"options": options} | table
    click.echo(f"written: {write_result(name or f'accuracy-{dataset}', rows, context=context)}")


def train(shards: Path, run: Path, method: str, options: tuple[str, ...]) -> None:
    """Train one method in a process of its own, or go on with it; nothing where its result is there."""
    if (run / "result.json").exists():
        return
    resume = ["--resume"] if (run / "checkpoints" / "last.safetensors").exists() else []
    words = ["--shards", str(shards), "--method", method, "--run", str(run), *resume]
    _run("fsar.cli.train", *words, *(option.replace("{method}", method) for option in options))


def compare(shards: Path, runs: list[Path], episodes: int | None) -> dict[str, Any]:
    """The comparison of the runs with the first of them, and with prototypes of the trunk as it was before."""
    out, markdown = runs[0].parent / "comparison.json", runs[0].parent / "comparison.md"
    words = ["--shards", str(shards), "--out", str(out), "--markdown", str(markdown), "--prototype-control"]
    words += ["--episodes", str(episodes)] if episodes else []
    _run("fsar.cli.evaluate", *words, "--compare", *map(str, runs))
    table: dict[str, Any] = json.loads(out.read_text())
    return table


def describe(run: Path, compared: dict[str, Any]) -> dict[str, Any]:
    """One row: the accuracies of a run, and what was spent on it; the control has no run."""
    if not (run / "result.json").exists():
        return compared
    result = json.loads((run / "result.json").read_text())
    kept = ("episodes_trained", "training_seconds")
    return compared | {key: result[key] for key in kept}


def _run(module: str, *words: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, *words], check=False)
    if done.returncode:
        raise click.ClickException(f"python -m {module} {' '.join(words)}: ended with exit code {done.returncode}")


if __name__ == "__main__":
    main()
