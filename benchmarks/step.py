"""A training step of MoLo with ResNet-50: what is usual against ours, in time, memory and operations.

    python -m benchmarks.step [--device cuda]

The usual way is float32 in PyTorch's order of memory, with a look at the loss after every episode.  On a CPU ours is
channels last in a process that keeps its freed memory, as in fsar-train.  On a GPU it is bfloat16 with channels last
as a CUDA graph.  Sides between tell what each of these gives.  A run is forward and
backward of one episode; each side has a process of its own.

Operations, and the memory of an episode of the papers' size, are counted on tensors without values.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click
import torch

from benchmarks.measure.bounds import matmul_rate
from benchmarks.measure.environment import load_average, write_result
from benchmarks.measure.timing import markdown_table
from benchmarks.sides.step_counts import FIVE_SHOT, Counts, count
from benchmarks.sides.step_side import PARTS, Job, Side, Sizes, measure_apart
from shards_spec.cli.console import run_command
from shards_spec.errors import ConfigError, suggest

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAST = "channels-last"
USUAL = Side("usual", looks=True)
ON_CPU = [
    USUAL,
    Side("channels last", memory_format=LAST),
    Side("channels last, kept memory", memory_format=LAST, keeps=True),
    Side("channels last, kept memory, stem and one stage recomputed", memory_format=LAST, keeps=True, recomputes=2),
    Side("channels last, kept memory, recomputed", memory_format=LAST, keeps=True, recomputes=PARTS),
    Side("bf16, channels last, kept memory", "bf16", LAST, keeps=True),
]
ON_GPU = [
    USUAL,
    Side("channels last", memory_format=LAST),
    Side("bf16, channels last", "bf16", LAST),
    Side("bf16, channels last, recomputed", "bf16", LAST, recomputes=PARTS),
    Side("bf16, channels last, CUDA graph", "bf16", LAST, graph=True),
]
OURS = {"cpu": ON_CPU[2].name, "cuda": ON_GPU[-1].name}  # what fsar-train does


def matmul_rates(device: torch.device) -> dict[str, float]:
    """GFLOP a second of products of square matrices by precision; in TF32 on a GPU, as convolutions of float32 are."""
    if device.type != "cuda":
        return {name: matmul_rate(device, dtype=dtype) for name, dtype in DTYPES.items()}
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        return {name: matmul_rate(device, dtype=dtype, size=8192) for name, dtype in DTYPES.items()}
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def measure(
    sides: Sequence[Side], sizes: Sizes, device: str, rates: dict[str, float], counts: Counts, *, rounds: int
) -> list[dict[str, Any]]:
    """One row a side, the usual first."""
    rows: list[dict[str, Any]] = []
    roles = {USUAL.name: "usual", OURS[torch.device(device).type]: "ours"}
    for side in sides:
        # A graph has no operations to tell apart: its profile is that of the side before it.
        profiled = side.keeps or (device != "cpu" and not side.graph)
        found = measure_apart(Job(side, sizes, device, rounds, profiled=profiled))
        rows.append(_row(side, sizes, found, counts, rates[side.precision]))
        rows[-1]["side"] = roles.get(side.name, "between")
        rows[-1]["ratio"] = round(rows[0]["ms"] / rows[-1]["ms"], 2)
    return rows


def _row(side: Side, sizes: Sizes, found: dict[str, Any], counts: Counts, rate: float) -> dict[str, Any]:
    walls = [each["wall"] for each in found["rounds"]]
    seconds, gflop = statistics.median(walls), counts.gflop[side.recomputes]
    row: dict[str, Any] = asdict(side) | {"ms": round(1000 * seconds, 1)}
    row |= {"least_ms": round(1000 * min(walls), 1), "most_ms": round(1000 * max(walls), 1)}
    for key, name in (("cpu", "cpu_seconds"), ("system", "system_seconds"), ("faults", "page_faults")):
        row[name] = round(statistics.median(each[key] for each in found["rounds"]), 2)
    row |= {"frames_per_second": round(sizes.count / seconds, 2), "gflop": round(gflop, 1)}
    row |= {"bound_ms": round(1000 * gflop / rate, 1), "part_of_bound": round(gflop / rate / seconds, 3)}
    row["bound_frames_per_second"] = round(sizes.count * rate / gflop, 2)
    row |= {"peak_mib": round(found["peak_mib"]), "kept": found["kept"]}
    if counts.papers_gib:
        row["papers_gib"] = round(counts.papers_gib[side.precision, side.recomputes], 2)
    return row | ({"profile_seconds": found["profile"]} if "profile" in found else {})


def table(rows: list[dict[str, Any]]) -> str:
    """The sides as Markdown."""
    head = ["side", "ms (least-most)", "frames/s", "ratio", "of bound", "system s", "peak MiB", "papers' episode"]
    lines = [
        [
            row["name"],
            f"{row['ms']:.0f} ({row['least_ms']:.0f}-{row['most_ms']:.0f})",
            f"{row['frames_per_second']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['part_of_bound']:.0%}",
            f"{row['system_seconds']:.1f}",
            f"{row['peak_mib']:,}",
            f"{row['papers_gib']:.1f} GiB" if "papers_gib" in row else "",
        ]
        for row in rows
    ]
    return markdown_table(head, lines)


def methods_table(rows: list[dict[str, Any]]) -> str:
    """The methods as Markdown."""
    head = ["method", "parameters", "forward", "step"]
    lines = [
        [
            row["method"],
            f"{row['parameters_m']:.1f} M",
            f"{row['forward_gflop']:.0f} GFLOP",
            f"{row['step_gflop']:.0f} GFLOP",
        ]
        for row in rows
    ]
    return markdown_table(head, lines)


def choose_sides(device: str, names: Sequence[str]) -> list[Side]:
    """The sides of a device, or those named, the usual first.

    Raises:
        ConfigError: there is no such side.
    """
    sides = {side.name: side for side in (ON_CPU if device == "cpu" else ON_GPU)}
    for name in names:
        if name not in sides:
            raise ConfigError(f'no side "{name}" on {device}: {suggest(name, sides)}')
    return [side for name, side in sides.items() if not names or side is USUAL or name in names]


@click.command()
@click.option("--device", default="cpu", show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--way", type=click.IntRange(2), help="[default: 2 on a CPU, 5 elsewhere]")
@click.option("--queries", type=click.IntRange(1), help="Of all classes.  [default: 1 on a CPU, 30 elsewhere]")
@click.option("--size", type=click.IntRange(32), default=224, show_default=True, help="Of a frame.")
@click.option("--side", "names", multiple=True, help="Only these and the usual.  [default: all of the device]")
@click.option("--name", help="Of the file below benchmarks/results.  [default: step-DEVICE]")
def main(
    device: str, rounds: int, way: int | None, queries: int | None, *, size: int, names: tuple[str, ...], name: str
) -> None:
    """Time the sides one after another; print and store a table, and one of all methods."""
    place, before = torch.device(device), load_average()
    small = place.type == "cpu"
    sizes = Sizes(way=way or (2 if small else 5), queries=queries or (1 if small else 30), size=size)
    sides = choose_sides(place.type, names)
    rates = matmul_rates(place)
    counts = count(sides, sizes)
    rows = measure(sides, sizes, device, rates, counts, rounds=rounds)
    methods = counts.methods
    click.echo(f"{sizes.count} frames of {sizes.size} x {sizes.size}\n{table(rows)}\n\n{methods_table(methods)}")
    context = {"episode": asdict(sizes), "frames": sizes.count, "device": device, "threads": torch.get_num_threads()}
    context |= {"rounds": rounds, "cores": os.cpu_count(), "ours": OURS[place.type], "load_average_before": before}
    context |= {"matmul_gflop_per_second": {name: round(rate, 1) for name, rate in rates.items()}}
    context |= {"methods_on_the_papers_episode": methods}
    five = {precision: round(gib, 2) for precision, gib in counts.five_shot_gib.items()}
    context |= {"five_shot_recomputed_gib": {"clips": FIVE_SHOT.count // FIVE_SHOT.frames, **five}}
    click.echo(f"5-way 5-shot with {FIVE_SHOT.queries} queries, recomputed: {five} GiB")
    click.echo(f"written: {write_result(name or f'step-{place.type}', rows, context=context)}")


if __name__ == "__main__":
    run_command(main, again="nothing was written")
