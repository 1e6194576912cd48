"""All that needs a GPU in one command: tests that must not be skipped, then figures.

    python -m benchmarks.gpu --out DIR

Each part runs in a process of its own, so that one that fails stops no other; the exit code is 1 then.  Results are
written to benchmarks/results as by every benchmark, and copied to DIR.  --device cpu is a rehearsal on a CPU of all
parts but the tests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import step
from benchmarks.__main__ import run
from benchmarks.episodes import make_shards
from benchmarks.measure import environment
from benchmarks.measure.bounds import synchronise
from benchmarks.measure.environment import load_average, write_result
from benchmarks.measure.timing import Contestant, markdown_table, time_in_turn, warm_up
from benchmarks.sides.clips import make_clips
from benchmarks.sides.gpu_checks import busy_share, check_step
from benchmarks.sides.step_counts import Counts, step_gflop
from benchmarks.sides.step_side import Sizes
from fsar import EpisodeLoader
from pipelines.decoding.dali import dali_is_installed
from pipelines.episodes.rules import EpisodeRules
from shards_spec import ShardSet
from shards_spec.cli.console import run_command
from shards_spec.errors import FsarError

CORES = len(os.sched_getaffinity(0))
STEP_CLIPS = (10, 35)  # 80 and 280 frames


@dataclass(frozen=True)
class Setting:
    """Hold what the parts share."""

    out: Path
    device: str
    given: Path | None  # shards
    trunk: str
    size: int
    way: int
    queries: int  # for each class
    seconds: float
    sides: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """Cpu or cuda."""
        return torch.device(self.device).type

    def shards(self) -> Path:
        """Those given, or made once of clips of UCF101's size."""
        made = self.out / "shards"
        if self.given is None and not made.exists():
            make_shards(make_clips(self.out / "videos"), self.out / "shards.part", 1 + self.queries)
            (self.out / "shards.part").rename(made)
        return self.given or made

    def rules(self) -> EpisodeRules:
        """Episodes of training: random frames, crops and flips."""
        crop = {"resize": round(self.size * 256 / 224), "crop": self.size, "random_crop": True}
        return EpisodeRules(
            way=self.way, queries=self.queries, frames=8, random_frames=True, groups="any", query_flip=True, **crop
        )


def run_tests(setting: Setting) -> None:
    """Run the tests marked gpu; a skipped one is a failure."""
    environment = os.environ | {"FSAR_REQUIRE_GPU": "1"}
    done = subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", "-ra"], env=environment, check=False)
    if done.returncode:
        raise FsarError(f"pytest -m gpu ended with exit code {done.returncode} on {setting.device}")


def measure_loader(setting: Setting) -> None:
    """Normalised float32 episodes a second on the device: JPEG decoded there, or on the CPU and then moved."""
    ways = [("portable, frames to the device", "portable", setting.device)]
    if dali_is_installed():
        ways = [("dali, on the device", "dali", setting.device), ("dali, on the CPU", "dali", "cpu"), *ways]
    else:
        click.echo("no row of DALI: it is not installed")
    with ShardSet.open(setting.shards()) as shards:
        loaders = [
            EpisodeLoader(shards, "train", setting.rules(), device=device, executor=executor, threads=CORES)
            for _, executor, device in ways
        ]
        contestants = [Contestant(way[0], _deliver(loader, setting)) for way, loader in zip(ways, loaders, strict=True)]
        counts = warm_up(contestants, seconds=setting.seconds / 10, workers=1)
        timings = time_in_turn(contestants, rounds=3, counts=counts)
        for loader in loaders:
            loader.close()
    rows = [
        {"name": name, "side": "ours", "episodes_per_second": round(timing.rate, 2),
         "core_seconds_per_episode": round(timing.core_seconds, 4)}
        for name, timing in timings.items()
    ]  # fmt: skip
    lines = [[row["name"], f"{row['episodes_per_second']}", f"{row['core_seconds_per_episode']}"] for row in rows]
    click.echo(markdown_table(["way", "episodes/s", "core-s/episode"], lines))
    _write(f"loader-{setting.kind}", rows, setting)


def _deliver(loader: EpisodeLoader, setting: Setting) -> Callable[[int], None]:
    device = torch.device(setting.device)

    def run(count: int) -> None:
        for episode in loader.episodes(0, count):
            episode.to(device)
        synchronise(device)

    return run


def measure_step(setting: Setting) -> None:
    """The sides of the training step, for two numbers of frames."""
    place = torch.device(setting.device)
    rates, sides = step.matmul_rates(place), step.choose_sides(place.type, setting.sides)
    for clips in STEP_CLIPS:
        sizes = Sizes(way=setting.way, queries=clips - setting.way, size=setting.size)
        recomputes = {side.recomputes for side in sides}
        counts = Counts({recomputed: step_gflop(recomputed, sizes) for recomputed in recomputes}, {}, [])
        rows = step.measure(sides, sizes, setting.device, rates, counts, rounds=5)
        click.echo(f"{sizes.count} frames of {sizes.size} x {sizes.size}\n{step.table(rows)}")
        matmul = {name: round(rate, 1) for name, rate in rates.items()}
        name = f"step-{place.type}-{sizes.count}-frames"
        _write(name, rows, setting, frames=sizes.count, matmul_gflop_per_second=matmul)


def measure_evaluation(setting: Setting) -> None:
    """Episodes a second of a test."""
    if not run("benchmarks.evaluate", "--device", setting.device):
        raise FsarError("benchmarks.evaluate failed")


def measure_training(setting: Setting) -> None:
    """Measure how busy a real training run from shards keeps the device."""
    with ShardSet.open(setting.shards()) as shards:
        found = busy_share(
            shards, setting.rules(), setting.out / "run", device=torch.device(setting.device),
            trunk=setting.trunk, seconds=setting.seconds,
        )  # fmt: skip
    click.echo(f"{found['episodes_per_second']} episodes/s; a step runs for {found['busy_share']:.1%} of the time")
    _write(f"training-{setting.kind}", [found], setting)


def check_waiting(setting: Setting) -> None:
    """No step waits for the device, and a replayed graph allocates nothing."""
    sizes = Sizes(way=setting.way, queries=setting.way, size=setting.size)
    rows = [check_step(sizes, torch.device(setting.device), trunk=setting.trunk, graph=graph)
            for graph in (False, True)]  # fmt: skip
    for row in rows:
        click.echo(", ".join(f"{key}: {value}" for key, value in row.items()))
    _write(f"waiting-{setting.kind}", rows, setting)


PARTS: dict[str, Callable[[Setting], None]] = {
    "tests": run_tests,
    "waiting": check_waiting,
    "step": measure_step,
    "loader": measure_loader,
    "training": measure_training,
    "evaluation": measure_evaluation,
}


def _write(name: str, rows: list[dict[str, Any]], setting: Setting, **context: object) -> None:
    episode = f"{setting.way}-way 1-shot, {setting.queries} queries a class, frames of {setting.size}x{setting.size}"
    context |= {"device": setting.device, "trunk": setting.trunk, "load_average": load_average()}
    path = write_result(name, rows, context={"episode": episode} | context)
    click.echo(f"written: {path}")


def copy_new(out: Path, since: float) -> None:
    """Copy what was written to benchmarks/results since then."""
    for path in environment.RESULTS.iterdir():
        if path.stat().st_mtime >= since:
            shutil.copy(path, out / path.name)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for results, shards and logs.")
@click.option("--part", "parts", multiple=True, type=click.Choice(list(PARTS)), help="[default: all]")
@click.option("--device", default="cuda", show_default=True)
@click.option("--shards", "given", type=click.Path(path_type=Path, exists=True),
              help="With a split train.  [default: made first, which needs ffmpeg]")  # fmt: skip
@click.option("--trunk", default="resnet50", show_default=True, help="Of training and waiting.")
@click.option("--size", type=click.IntRange(32), default=224, show_default=True, help="Of a frame.")
@click.option("--way", type=click.IntRange(2), default=5, show_default=True)
@click.option("--queries", type=click.IntRange(1), default=6, show_default=True, help="For each class.")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), default=60.0, show_default=True, help="To train.")
@click.option("--side", "sides", multiple=True, help="Of the step, next to the usual.  [default: all of the device]")
def main(out: Path, parts: tuple[str, ...], **options: Any) -> None:  # noqa: ANN401 -- the fields of Setting
    """Run the parts, one or all; exit code 1 where one has failed."""
    out.mkdir(parents=True, exist_ok=True)
    setting = Setting(out, **options)
    if len(parts) == 1:
        began = time.time()
        try:
            PARTS[parts[0]](setting)
        finally:
            copy_new(out, began)
        return
    failed = [part for part in parts or PARTS if not run("benchmarks.gpu", "--part", part, *_words(setting))]
    click.echo(f"\nfailed: {', '.join(failed)}" if failed else "\nall parts are done")
    raise click.exceptions.Exit(bool(failed))


def _words(setting: Setting) -> list[str]:
    """The command line of a setting."""
    words = [f"--out={setting.out}", f"--device={setting.device}", f"--trunk={setting.trunk}", f"--size={setting.size}"]
    words += [f"--way={setting.way}", f"--queries={setting.queries}", f"--seconds={setting.seconds}"]
    words += [f"--shards={setting.given}"] if setting.given else []
    return words + [f"--side={side}" for side in setting.sides]


if __name__ == "__main__":
    run_command(main, again="what was measured is written")
