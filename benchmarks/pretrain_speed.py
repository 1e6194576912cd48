"""Measure videos a second of pre-training: the whole loop, and loading, decoding and computing apart.

    python -m benchmarks.pretrain_speed [--shards SHARDS] [--device cuda]

For each method on the same shards:

- "ours": steps as fsar-pretrain takes them, frames decoded ahead, views made on the device, forward, backward, update;
- "loader": its batches, ready for the model, and nothing computed;
- "decode", a bound: the same frames and fields decoded by the same decoder, and no views made of them;
- "compute", a bound: the same step on one batch that is there already.

On a CPU decoding and computing share the cores, so the bound of the loop is their time in sequence; on a GPU it is the
slower of the two.  `wait_ms`, `views_ms` and `compute_ms` say where a step of the loop spends its time.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.measure.bounds import synchronise
from benchmarks.measure.environment import load_average, write_result
from benchmarks.measure.timing import Contestant, Timing, markdown_table, read_whole, time_in_turn, warm_up
from benchmarks.preprocess import store
from benchmarks.sides.clips import make_clips
from fsar.pretraining import PRETRAINING
from fsar.pretraining.batches import batch_maker, clip_rules, training_videos
from fsar.pretraining.config import PretrainConfig, build_pretrain_config, read_pretrain_recipe
from fsar.pretraining.loader import ClipLoader
from fsar.pretraining.trainer import build_pretraining, pretraining_step
from fsar.run.device import choose_device
from fsar.training.optim import create_sgd
from preprocess.datasets.folder import folder_catalogue
from shards_spec import ShardSet
from shards_spec.cli.console import run_command

RECIPES = {"moco": "moco-r18", "fima": "fima-ucf101", "mscl": "mscl-r18"}
SIDES = {"ours": "ours", "loader": "between", "decode": "bound", "compute": "bound"}


@dataclass
class Loop:
    """One method's training on some shards, and its parts; close it when done."""

    config: PretrainConfig
    shards: ShardSet
    device: torch.device
    steps: int = 0  # that the loop has taken
    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("wait", "views", "compute"), 0.0))

    def __post_init__(self) -> None:
        config = self.config
        self.model = build_pretraining(config, samples=1_000_000).to(self.device).train()
        self.optimizer = create_sgd(self.model, lr=1e-4, momentum=0.9, weight_decay=1e-4)
        self.step = pretraining_step(self.model, precision=config.precision)
        self.make = batch_maker(config, self.model.encoder)
        self.loader = ClipLoader(
            self.shards,
            training_videos(config, self.shards).rows,
            clip_rules(config),
            batch=config.batch,
            device=self.device,
            executor=config.executor,
            threads=config.threads,
        )
        self.kept = next(iter(self._batches(1)))[0]

    def _batches(self, count: int) -> Any:  # noqa: ANN401 -- each method's own dataclass of views
        for plan, views, wait in self.loader.batches(0, count):
            yield self.make(plan, views), wait

    def ours(self, count: int) -> None:
        """Whole steps."""
        batches, last = self._batches(count), time.perf_counter()
        for batch, wait in batches:
            ready = self._now()
            self._compute(batch)
            done = self._now()
            parts = {"wait": wait, "views": ready - last - wait, "compute": done - ready}
            self.spent = {name: self.spent[name] + seconds for name, seconds in parts.items()}
            self.steps, last = self.steps + 1, done

    def load(self, count: int) -> None:
        """Batches that nothing is done with."""
        for _ in self._batches(count):
            pass
        synchronise(self.device)

    def decode(self, count: int) -> None:
        """The pixels of as many steps."""
        for _ in self.loader.background.frames(self.loader.stream, 0, count):
            pass
        synchronise(self.device)

    def compute(self, count: int) -> None:
        """As many steps on the one batch."""
        for _ in range(count):
            self._compute(self.kept)
        synchronise(self.device)

    def _compute(self, batch: Any) -> None:  # noqa: ANN401 -- each method's own dataclass of views
        self.step(batch, seed=0)
        self.step.update(self.optimizer, 1e-4, clip_norm=self.config.clip_norm)

    def _now(self) -> float:
        synchronise(self.device)
        return time.perf_counter()

    def contestants(self) -> list[Contestant]:
        """The loop and its parts."""
        runs = (self.ours, self.load, self.decode, self.compute)
        return [Contestant(name, run) for name, run in zip(SIDES, runs, strict=True)]


def measure(loop: Loop, *, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """One row a part of a method's training, the loop first."""
    contestants = loop.contestants()
    counts = warm_up(contestants, seconds=seconds, workers=1, least=2)
    loop.steps, loop.spent = 0, dict.fromkeys(loop.spent, 0.0)
    timings = time_in_turn(contestants, rounds=rounds, counts=counts)
    rows = [_row(loop.config, name, timing) for name, timing in timings.items()]
    decoded, computed = (timings[name].rate * loop.config.batch for name in ("decode", "compute"))
    bound = 1 / (1 / decoded + 1 / computed) if loop.device.type == "cpu" else min(decoded, computed)
    rows[0] |= {"bound_per_second": round(bound, 2), "part_of_bound": round(rows[0]["samples_per_second"] / bound, 3)}
    rows[0] |= {f"{name}_ms": round(1000 * spent / loop.steps, 1) for name, spent in loop.spent.items()}
    return rows


def _row(config: PretrainConfig, name: str, timing: Timing) -> dict[str, Any]:
    rates = [config.batch * rate for rate in timing.rates]
    return {
        "name": f"{config.method}: {name}",
        "method": config.method,
        "side": SIDES[name],
        "samples_per_second": round(config.batch * timing.rate, 2),
        "least": round(min(rates), 2),
        "most": round(max(rates), 2),
        "core_seconds_per_sample": round(timing.core_seconds / config.batch, 4),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    head = ["part", "samples/s (least-most)", "core-s a sample", "of bound", "wait, views, compute ms a step"]
    lines = [
        [
            row["name"],
            f"{row['samples_per_second']:.1f} ({row['least']:.1f}-{row['most']:.1f})",
            f"{row['core_seconds_per_sample']:.3f}",
            f"{row['part_of_bound']:.0%}" if "part_of_bound" in row else "",
            f"{row['wait_ms']:.0f}, {row['views_ms']:.0f}, {row['compute_ms']:.0f}" if "wait_ms" in row else "",
        ]
        for row in rows
    ]
    return markdown_table(head, lines)


def settings(method: str, trunk: str, crop: int, batch: int, device: str) -> PretrainConfig:
    """The published recipe of a method at another size."""
    config = build_pretrain_config(read_pretrain_recipe(RECIPES[method]) | {"trunk": trunk, "crop": crop})
    options = config.options | {"queue": 4096}
    options |= {"dense_queue": 0} if method == "fima" else {}
    precision = "bf16" if torch.device(device).type == "cuda" else "fp32"
    return replace(config, batch=batch, split="all", device=device, precision=precision, options=options)


@click.command()
@click.option(
    "--shards", "path", type=click.Path(path_type=Path), help="With flow8g2.  [default: made of generated clips]"
)
@click.option("--method", "methods", type=click.Choice(list(PRETRAINING)), multiple=True, help="[default: all]")
@click.option("--trunk", help="[default: tiny3d on a CPU, r3d18 elsewhere]")
@click.option("--crop", type=click.IntRange(32), default=112, show_default=True)
@click.option("--batch", type=click.IntRange(2), help="Videos a step.  [default: 4 on a CPU, 32 elsewhere]")
@click.option("--device", default="cpu", show_default=True)
@click.option("--executor", type=click.Choice(["auto", "dali", "portable"]), default="auto", show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--seconds", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True)
@click.option("--name", default="pretrain-speed", show_default=True, help="Of the file below benchmarks/results.")
def main(
    path: Path | None,
    methods: tuple[str, ...],
    *,
    trunk: str | None,
    crop: int,
    batch: int | None,
    device: str,
    executor: str,
    rounds: int,
    seconds: float,
    name: str,
) -> None:
    """Time the parts of each method's training in turn; print and store a table."""
    before, place, rows = load_average(), choose_device(device), []
    small = place.type == "cpu"
    trunk, batch = trunk or ("tiny3d" if small else "r3d18"), batch or (4 if small else 32)
    with ExitStack() as stack:
        if path is None:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            click.echo("making clips of UCF101's size and their shards ...")
            path = scratch / "shards"
            store(folder_catalogue(make_clips(scratch / "videos", classes=2)), path, motion=("flow8g2",))
        shards = stack.enter_context(ShardSet.open(path))
        read_whole(path.glob("*.tar"))
        stored = {"shards_sha256": shards.sha256, "videos": shards.num_videos}
        stored |= {"stored": shards.series("rgb").sizes[0].tolist()}
        for method in methods or PRETRAINING:
            config = replace(settings(method, trunk, crop, batch, device), executor=executor)
            loop = Loop(config, shards, place)
            rows += measure(loop, rounds=rounds, seconds=seconds)
            loop.loader.close()
    click.echo(table(rows))
    context = {"trunk": trunk, "crop": crop, "batch": batch, "device": device, "precision": config.precision}
    context |= {"executor": executor, "rounds": rounds, "threads": torch.get_num_threads()} | stored
    context |= {"cores": os.cpu_count(), "load_average_before": before}
    click.echo(f"written: {write_result(name, rows, context=context)}")


if __name__ == "__main__":
    run_command(main, again="nothing was written")
