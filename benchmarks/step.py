"""A training step of MoLo with ResNet-50: what is usual against ours, in time, memory and operations.

    python -m benchmarks.step [--device cuda]

The usual way is float32 in the usual order of memory, run as it comes, with a look at the loss after every episode.
Ours are bfloat16 with channels last, the same with the trunk's stages recomputed, on a GPU also as a CUDA graph;
channels last alone stands beside them, to tell the two apart.  Each run is forward and backward of one episode.

Operations, and the memory of an episode of the papers' size, are counted on tensors without values.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import click
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.bounds import synchronise
from benchmarks.environment import load_average, write_result
from benchmarks.methods import gflop, matmul_rate
from benchmarks.timing import Contestant, markdown_table, time_in_turn
from fsar.episode import Episode
from fsar.methods import METHODS, create_method, method_options
from fsar.step import EpisodeStep
from fsar.trunks import create_trunk

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fsar.methods import FewShotMethod

FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Sizes:
    """An episode: 5-way 1-shot with 6 queries a class in the papers."""

    way: int = 5
    queries: int = 30  # of all classes together
    frames: int = 8
    size: int = 224

    @property
    def count(self) -> int:
        """Frames of all videos together."""
        return (self.way + self.queries) * self.frames


@dataclass(frozen=True)
class Side:
    """One way of computing the step."""

    name: str
    precision: str = "fp32"
    memory_format: str = "contiguous"
    recomputes: bool = False
    graph: bool = False
    looks: bool = False  # at the loss, after every episode


USUAL = Side("usual", looks=True)
SIDES = [
    USUAL,
    Side("channels last", memory_format="channels-last"),
    Side("bf16, channels last", "bf16", "channels-last"),
    Side("bf16, channels last, recomputed", "bf16", "channels-last", recomputes=True),
]
GRAPHED = Side("bf16, channels last, CUDA graph", "bf16", "channels-last", graph=True)


def make_model(side: Side, method: str = "molo") -> FewShotMethod:
    """A method with ResNet-50 and random weights, in training mode."""
    trunk = create_trunk("resnet50")
    trunk.memory_format, trunk.recomputes = FORMATS[side.memory_format], side.recomputes
    options = {"num_classes": 64} if "num_classes" in method_options(method) else {}
    return create_method(method, trunk=trunk, **options).train()


def make_episode(sizes: Sizes) -> Episode:
    """Noise in the place of frames."""
    shape = (sizes.frames, 3, sizes.size, sizes.size)
    return Episode(
        support=torch.randn(sizes.way, 1, *shape),
        query=torch.randn(sizes.queries, *shape),
        query_labels=torch.arange(sizes.queries) % sizes.way,
        class_ids=torch.arange(sizes.way),
        base_ids=torch.arange(sizes.way),
    )


class Work:
    """The step of one side, on copies of the same weights."""

    def __init__(self, side: Side, episode: Episode, device: torch.device) -> None:
        torch.manual_seed(0)
        self.side, self.episode, self.device = side, episode, device
        self.model = make_model(side).to(device)
        self.step = EpisodeStep(self.model, precision=side.precision, graph=side.graph)

    def run(self, count: int) -> None:
        """Forward and backward, `count` times."""
        for _ in range(count):
            if self.side.looks:
                loss = self.model(self.episode).loss
                loss.backward()
                loss.item()
            else:
                self.step(self.episode, seed=0)
        synchronise(self.device)

    def peak_mib(self) -> float | None:
        """Most memory that a step had allocated; None where the device does not say."""
        if self.device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        self.run(1)
        return torch.cuda.max_memory_allocated(self.device) / 2**20


class Zeros(TorchDispatchMode):
    """Answers 0 where a value is asked for: the checks of labels pass, and nothing else asks."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Called for every operation."""
        return 0 if func is torch.ops.aten._local_scalar_dense.default else func(*args, **(kwargs or {}))


def without_values(function: Callable[[], Any]) -> Any:  # noqa: ANN401 -- what the function returns
    """Call a function whose tensors have shapes alone: nothing is computed or allocated."""
    with FakeTensorMode(), Zeros():
        return function()


def counted_gflop(side: Side, sizes: Sizes, method: str = "molo") -> tuple[float, float]:
    """Operations in 1e9 of the forward pass and of the whole step, recomputation included."""
    model, episode = make_model(side, method), make_episode(sizes)
    return gflop(partial(model, episode)), gflop(partial(EpisodeStep(model).run, episode))


def counted_peak_gib(side: Side, sizes: Sizes) -> float:
    """Most memory in use during a step, in GiB: weights, gradients, episode, inner values; no buffers of libraries."""
    model, episode = make_model(side), make_episode(sizes)
    step = EpisodeStep(model, precision=side.precision)
    tracker = MemTracker()
    tracker.track_external(model, episode.support, episode.query)
    with tracker:
        step.run(episode)
    peak = tracker.get_tracker_snapshot("peak")
    return sum(values["Total"] for values in peak.values()) / 2**30


def measure(
    sides: Sequence[Side], sizes: Sizes, device: torch.device, rates: dict[str, float], *, rounds: int
) -> list[dict[str, Any]]:
    """One row a side."""
    torch.manual_seed(0)
    episode = make_episode(sizes).to(device)
    works = [Work(side, copy.copy(episode), device) for side in sides]
    for work in works:
        work.run(2 if work.side.graph else 1)  # the second captures the graph
    contestants = [Contestant(work.side.name, work.run) for work in works]
    timings = time_in_turn(contestants, rounds=rounds, counts=[1] * len(works))
    rows = []
    for work in works:
        timing, side = timings[work.side.name], work.side
        _, operations = without_values(partial(counted_gflop, side, sizes))
        rate, seconds = rates[side.precision], 1 / timing.rate
        row: dict[str, Any] = asdict(side) | {"ms": round(1000 * seconds, 1)}
        row |= {"least_ms": round(1000 * min(timing.wall), 1), "most_ms": round(1000 * max(timing.wall), 1)}
        row |= {"cpu_seconds": round(timing.core_seconds, 2), "frames_per_second": round(sizes.count / seconds, 2)}
        row |= {"gflop": round(operations, 1), "part_of_matmul_rate": round(operations / seconds / rate, 3)}
        row["ratio"] = round(timing.rate / timings[USUAL.name].rate, 2)
        row["peak_mib"] = work.peak_mib()
        row["papers_gib"] = round(without_values(partial(counted_peak_gib, side, Sizes())), 2)
        rows.append(row)
    return rows


def methods_row(method: str) -> dict[str, Any]:
    """Parameters of a method with ResNet-50, and the operations of its forward pass on the papers' episode."""

    def count() -> tuple[float, tuple[float, float]]:
        model = make_model(USUAL, method)
        return sum(p.numel() for p in model.parameters()) / 1e6, counted_gflop(USUAL, Sizes(), method)

    parameters, (forward, step) = without_values(count)
    return {
        "method": method,
        "parameters_m": round(parameters, 2),
        "forward_gflop": round(forward, 1),
        "step_gflop": round(step, 1),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The sides as Markdown."""
    head = ["side", "ms", "frames/s", "ratio", "part of matmul rate", "papers' episode"]
    lines = [
        [
            row["name"],
            f"{row['ms']:.0f}",
            f"{row['frames_per_second']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['part_of_matmul_rate']:.0%}",
            f"{row['papers_gib']:.1f} GiB",
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


@click.command()
@click.option("--device", default="cpu", show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--way", type=click.IntRange(2), help="[default: 2 on a CPU, 5 elsewhere]")
@click.option("--queries", type=click.IntRange(1), help="Of all classes.  [default: 3 on a CPU, 30 elsewhere]")
@click.option("--size", type=click.IntRange(32), default=224, show_default=True, help="Of a frame.")
@click.option("--save/--no-save", default=True, show_default=True, help="Write the result's file.")
def main(device: str, rounds: int, way: int | None, queries: int | None, *, size: int, save: bool) -> None:
    """Time the sides in turn; print and store a table, and one of all methods."""
    place, before = torch.device(device), load_average()
    small = place.type == "cpu"
    sizes = Sizes(way=way or (2 if small else 5), queries=queries or (3 if small else 30), size=size)
    rates = {name: matmul_rate(place, dtype=dtype) for name, dtype in DTYPES.items()}
    rows = measure([*SIDES, *([] if small else [GRAPHED])], sizes, place, rates, rounds=rounds)
    methods = [methods_row(method) for method in METHODS]
    click.echo(f"{sizes.count} frames of {sizes.size} x {sizes.size}\n{table(rows)}\n\n{methods_table(methods)}")
    context = {"episode": asdict(sizes), "device": device, "threads": torch.get_num_threads(), "rounds": rounds}
    context |= {"matmul_gflop_per_second": {name: round(rate, 1) for name, rate in rates.items()}}
    context |= {"methods_on_the_papers_episode": methods, "load_average_before": before}
    if save:
        click.echo(f"written: {write_result(f'step-{place.type}', rows, context=context)}")


if __name__ == "__main__":
    main()
