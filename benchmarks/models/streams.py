r"""What stored motion gives beside frames: each by itself, and both, on folds of the classes of small sets.

    python -m benchmarks.models.streams --clips CLIPS --trunk efficientnet-lite0 --trunk-weights FILE \
        --group 'egogestar=_(\d+)\.mp4' --group 'ucf101=_g(\d+)_'

CLIPS holds a folder a data set, of CLASS/video files. Nothing is trained, but for the rows "motion, trained":

* all: every class is tested.
* fold 1, fold 2: half of the classes are tested, the other half is the split "train". On that half the share of
  motion is chosen, and the small network on motion is trained.

A data set of two usable classes has no folds of classes. Its folds are halves of the groups of each class.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.measure.environment import write_result
from benchmarks.measure.timing import markdown_table
from shards_spec import ShardSet

MOST_WAY = 20
SEVERAL = 6  # videos of a class
SHOTS = (1, 5)
FIGURES = ("accuracy", "interval_episodes", "interval_videos", "chance", "episodes", "videos")
Tree = dict[str, list[Path]]  # class -> videos


@dataclass(frozen=True)
class Models:
    """What is tested.

    Attributes:
        trunk: Name and weights of the trunk that reads frames.
        trained: A network on motion is trained too, where a fold leaves classes for that.
        episodes: Test episodes of each row.
    """

    trunk: tuple[str, str]
    trained: bool
    episodes: int


@click.command()
@click.option("--clips", type=click.Path(path_type=Path, exists=True), required=True, help="A folder a data set.")
@click.option("--set", "sets", multiple=True, help="Names of its folders.  [default: all]")
@click.option("--group", "groups", multiple=True, metavar="SET=REGEX", help="Groups of a set, as in fsar-preprocess.")
@click.option("--trunk", required=True, help="Of the frames.")
@click.option("--trunk-weights", required=True)
@click.option("--train/--no-train", "trained", default=True, show_default=True, help="The network on motion too.")
@click.option("--episodes", default=2000, show_default=True, help="Test episodes of each row.")
@click.option("--name", default="streams", show_default=True, help="Name of the result.")
def main(
    clips: Path,
    sets: tuple[str, ...],
    groups: tuple[str, ...],
    *,
    trunk: str,
    trunk_weights: str,
    trained: bool,
    episodes: int,
    name: str,
) -> None:
    """Test frames, motion and both on every data set; print and store a table."""
    patterns = dict(each.split("=", 1) for each in groups)
    models = Models((trunk, trunk_weights), trained, episodes)
    rows: list[dict[str, Any]] = []
    for folder in sorted(path for path in clips.iterdir() if path.is_dir() and (not sets or path.name in sets)):
        for row in of_set(folder, patterns.get(folder.name), models):
            click.echo(line(row))
            rows.append(row)
    if not rows:
        raise click.ClickException(f"{clips} holds none of these data sets")
    click.echo(table(rows))
    context = {"trunk": trunk, "frames": "8 of 224 x 224", "metric": "shift"}
    click.echo(f"written: {write_result(name, rows, context=context)}")


def of_set(folder: Path, pattern: str | None, models: Models) -> Iterator[dict[str, Any]]:
    """Rows of one data set: of all its classes, and of two folds."""
    tree = read_tree(folder, pattern)
    with tempfile.TemporaryDirectory() as scratch:
        for name, train, test in folds(tree, pattern):
            parts = [part for part in (train, test) if part]
            shards = make_shards(Path(scratch) / name, train, test, pattern, name=folder.name)
            for shot in SHOTS:
                way = min(MOST_WAY, *(sum(serves(each, pattern, shot) for each in part.values()) for part in parts))
                if way >= 2:
                    about = {"set": folder.name, "part": name, "way": way, "shot": shot}
                    for row in tested(shards, way, shot, models, split=bool(train)):
                        yield about | row


def read_tree(folder: Path, pattern: str | None) -> Tree:
    """Classes with videos of two groups or more; where there are any of SEVERAL videos, these alone."""
    tree = {path.name: sorted(path.iterdir()) for path in sorted(folder.iterdir()) if path.is_dir()}
    tree = {label: videos for label, videos in tree.items() if serves(videos, pattern, 1)}
    large = {label: videos for label, videos in tree.items() if len(videos) >= SEVERAL}
    return large or tree


def group_of(video: Path, pattern: str | None) -> str:
    """The group of a video: the first bracket of the pattern, or the video itself."""
    found = re.search(pattern, video.name) if pattern else None
    return found.group(1) if found else video.name


def serves(videos: Sequence[Path], pattern: str | None, shot: int) -> bool:
    """Tell whether a class gives an episode of one query, whose group is not in the support."""
    count: defaultdict[str, int] = defaultdict(int)
    for video in videos:
        count[group_of(video, pattern)] += 1
    return len(videos) - min(count.values(), default=0) >= shot


def folds(tree: Tree, pattern: str | None) -> Iterator[tuple[str, Tree, Tree]]:
    """(name, classes of training, classes of the test) of the whole set and of its two folds."""
    yield "all", {}, tree
    labels = sorted(tree)
    if len(labels) > 3:
        halves = [
            {label: tree[label] for label in part} for part in (labels[: len(labels) // 2], labels[len(labels) // 2 :])
        ]
    else:
        halves = [{}, {}]
        for label, videos in tree.items():
            names = sorted({group_of(video, pattern) for video in videos})
            for number, half in enumerate(halves):
                own = set(names[number::2])
                half[f"{label} {number + 1}"] = [video for video in videos if group_of(video, pattern) in own]
    for number in (0, 1):
        yield f"fold {number + 1}", halves[1 - number], halves[number]


def make_shards(out: Path, train: Tree, test: Tree, pattern: str | None, *, name: str) -> Path:
    """Store the videos of a fold, through links to them."""
    for label, videos in (train | test).items():
        (out / "videos" / label).mkdir(parents=True)
        for video in videos:
            (out / "videos" / label / video.name).symlink_to(video.resolve())
    words = ["--videos", str(out / "videos"), "--follow-links", "--name", name, "--out", str(out / "shards")]
    words += ["--test-classes", ",".join(test)]
    words += ["--train-classes", ",".join(train)] if train else []
    words += ["--group", pattern] if pattern else []
    run("preprocess.cli", "folder", *words)
    return out / "shards"


def tested(shards: Path, way: int, shot: int, models: Models, *, split: bool) -> Iterator[dict[str, Any]]:
    """Rows of one task: frames, motion, both with each rule of the share, and the network on motion."""
    asked = ["--shards", str(shards), "--way", str(way), "--shot", str(shot), "--groups", "disjoint"]
    asked += ["--episodes", str(models.episodes), "--small-classes", "drop", "--no-motion-control"]
    rules = [*(["train"] if split else []), *(["support"] if shot > 1 else [])]
    trunk, weights = models.trunk
    words = ["--method", "prototype", "--trunk", trunk, "--trunk-weights", weights, "--streams", "both"]
    words += ["--option", "metric=shift"]
    alone: set[str] = set()
    for rule in rules or ["0.5"]:
        result = evaluate(shards, *asked, *words, "--stream-weight", rule)
        for name, figures in result["of_streams"].items():
            if name not in alone:
                yield row_of(name, figures)
                alone.add(name)
        yield row_of(f"both, {rule}", result["test"]) | {"share_of_motion": result["share_of_motion"]}
    if models.trained and split:
        yield row_of("motion, trained", evaluate(shards, *asked, "--weights", str(train(shards)))["test"])


def train(shards: Path) -> Path:
    """Train the network on motion, 1-shot on the classes of the split train, once for all shots."""
    out = shards.parent / "run"
    if not out.exists():
        with ShardSet.open(shards) as stored:
            labels = stored.labels[stored.split_rows("train")]
        classes, counts = np.unique(labels, return_counts=True)
        words = ["--shards", str(shards), "--recipe", "motion-lite0", "--motion-trunk", "tiny-flow", "--run", str(out)]
        words += ["--way", str(min(5, len(classes))), "--queries", str(min(2, counts.min() - 1))]
        words += ["--select-on", "last", "--small-classes", "drop", "--no-motion-control"]
        run("fsar.cli.train", *words, "--test-way", "2", "--test-episodes", "10")
    return out


def evaluate(shards: Path, *words: str) -> dict[str, Any]:
    """Test a model, and return its result."""
    out = shards.parent / "result.json"
    run("fsar.cli.evaluate", *words, "--out", str(out))
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def row_of(model: str, figures: dict[str, Any]) -> dict[str, Any]:
    """One row of a result."""
    return {"model": model} | {key: figures[key] for key in FIGURES}


def line(row: dict[str, Any]) -> str:
    """One row for reading."""
    over = row["interval_videos"]
    interval = f"{100 * row['interval_episodes']:.1f}, {'?' if over is None else f'{100 * over:.1f}'}"
    share = f", share {row['share_of_motion']:.2f}" if "share_of_motion" in row else ""
    task = f"{row['set']}, {row['part']}, {row['way']}-way {row['shot']}-shot"
    return f"{task}: {row['model']} {100 * row['accuracy']:.1f} ({interval}){share}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table, a task a line and a model a column."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    tasks: dict[tuple[Any, ...], dict[str, str]] = defaultdict(dict)
    for row in rows:
        _, _, text = line(row).partition(f": {row['model']} ")
        tasks[row["set"], row["part"], row["way"], row["shot"]][row["model"]] = text
    head = ["set", "classes", "way", "shot", *models]
    return markdown_table(
        head, [[*map(str, task), *(own.get(each, "") for each in models)] for task, own in tasks.items()]
    )


def run(module: str, *words: str) -> None:
    """Run a command of the toolkit in a process of its own."""
    done = subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"python -m {module} {' '.join(words)}: {done.stderr.strip().splitlines()[-1]}")


if __name__ == "__main__":
    main()
