"""One way of computing a training step of MoLo with ResNet-50, measured in a process of its own.

`benchmarks.step` calls python -m benchmarks.sides.step_side JOB. The settings of the process and its peak of memory
are then those of one side.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

import click
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure.bounds import synchronise
from fsar.episode import Episode
from fsar.methods import FewShotMethod, create_method, method_options
from fsar.run.device import keep_freed_memory
from fsar.training.step import TrainingStep
from fsar.trunks import create_trunk

FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
# Kinds of work in a profile, by what the names of its operations have
KINDS = {
    "convolutions": ("conv",),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "batch norm": ("batch_norm",),
}
REST = "elementwise and the rest"
PARTS = 5  # of ResNet-50: its stem and four stages


@dataclass(frozen=True)
class Sizes:
    """An episode: 5-way 1-shot with 6 queries a class in the papers."""

    way: int = 5
    shot: int = 1
    queries: int = 30  # of all classes together
    frames: int = 8
    size: int = 224

    @property
    def count(self) -> int:
        """Frames of all videos together."""
        return (self.way * self.shot + self.queries) * self.frames


@dataclass(frozen=True)
class Side:
    """One way of computing the step."""

    name: str
    precision: str = "fp32"
    memory_format: str = "contiguous"
    recomputes: int = 0  # parts of the trunk
    graph: bool = False
    looks: bool = False  # at the loss, after every episode
    keeps: bool = False  # freed memory, as the commands do on a CPU


@dataclass(frozen=True)
class Job:
    """Task of a process."""

    side: Side
    sizes: Sizes
    device: str
    rounds: int
    threads: int = 0  # 0: as PyTorch has it
    profiled: bool = False

    def to_json(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Read what `to_json` wrote."""
        table = json.loads(text)
        return cls(**table | {"side": Side(**table["side"]), "sizes": Sizes(**table["sizes"])})


def make_model(side: Side, method: str = "molo", trunk_name: str = "resnet50") -> FewShotMethod:
    """A method with a trunk and random weights, in training mode."""
    trunk = create_trunk(trunk_name)
    trunk.memory_format, trunk.recomputes = FORMATS[side.memory_format], side.recomputes
    options = {"num_classes": 64} if "num_classes" in method_options(method) else {}
    return create_method(method, trunk=trunk, **options).train()


def make_episode(sizes: Sizes) -> Episode:
    """Noise in the place of frames."""
    shape = (sizes.frames, 3, sizes.size, sizes.size)
    return Episode(
        support=torch.randn(sizes.way, sizes.shot, *shape),
        query=torch.randn(sizes.queries, *shape),
        query_labels=torch.arange(sizes.queries) % sizes.way,
        class_ids=torch.arange(sizes.way),
        base_ids=torch.arange(sizes.way),
    )


class Work:
    """The step of one side; the weights of all sides are the same."""

    def __init__(self, side: Side, sizes: Sizes, device: torch.device) -> None:
        torch.manual_seed(0)
        self.side, self.device = side, device
        self.model, self.episode = make_model(side).to(device), make_episode(sizes).to(device)
        self.step = TrainingStep(self.model, precision=side.precision, graph=side.graph)

    def run(self) -> None:
        """Forward and backward once."""
        if self.side.looks:
            loss = self.model(self.episode).loss
            loss.backward()
            loss.item()
        else:
            self.step(self.episode, seed=0)
        synchronise(self.device)

    def warm_up(self) -> bool:
        """A graph is captured at the second step; says whether memory is kept, which is complete after two more."""
        self.run()
        kept = self.side.keeps and keep_freed_memory(self.device)
        for _ in range(2 if kept else self.side.graph):
            self.run()
        return kept

    def timed(self) -> dict[str, float]:
        """Wall, CPU and system seconds and page faults of one step."""
        before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        self.run()
        wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
        system = after.ru_stime - before.ru_stime
        cpu = after.ru_utime - before.ru_utime + system
        return {"wall": wall, "cpu": cpu, "system": system, "faults": after.ru_minflt - before.ru_minflt}

    def peak_mib(self) -> float:
        """Most memory so far: allocated on a GPU, resident on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

    def profile(self) -> dict[str, float]:
        """Seconds of each kind of work in one step: of the processor, or of kernels on a GPU."""
        on_gpu = self.device.type == "cuda"
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as found:
            self.run()
        seconds: dict[str, float] = defaultdict(float)
        for event in found.key_averages():
            if event.device_type != DeviceType.CPU:  # a kernel, which counts with the operation that started it
                continue
            spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            seconds[kind_of(event.key)] += spent / 1e6
        return {kind: round(value, 3) for kind, value in sorted(seconds.items())}


def kind_of(operation: str) -> str:
    """Kind of an operation of a profile, by its name."""
    if operation.startswith("autograd::"):  # what it calls is counted itself
        return REST
    return next((kind for kind, parts in KINDS.items() if any(part in operation for part in parts)), REST)


def measure(job: Job) -> dict[str, Any]:
    """Figures of one side, in this process."""
    if job.threads:
        torch.set_num_threads(job.threads)
    work = Work(job.side, job.sizes, torch.device(job.device))
    kept = work.warm_up()
    found: dict[str, Any] = {"rounds": [work.timed() for _ in range(job.rounds)], "peak_mib": work.peak_mib()}
    found["kept"] = kept
    return found | ({"profile": work.profile()} if job.profiled else {})


def measure_apart(job: Job) -> dict[str, Any]:
    """Measure in a fresh process.

    Raises:
        click.ClickException: it failed; with its last line.
    """
    command = [sys.executable, "-m", "benchmarks.sides.step_side", job.to_json()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise click.ClickException(f"{job.side.name}: {last}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    print(json.dumps(measure(Job.from_json(sys.argv[1]))))
