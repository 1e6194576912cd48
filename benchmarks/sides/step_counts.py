"""Operations and memory of a training step, counted on tensors without values: nothing is computed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure.bounds import gflop
from benchmarks.sides.step_side import PARTS, Side, Sizes, make_episode, make_model
from fsar.methods import METHODS
from fsar.training.step import TrainingStep

FIVE_SHOT = Sizes(shot=5, queries=25)


class Zeros(TorchDispatchMode):
    """Answers 0 where a value is asked for: the checks of labels pass, and nothing else asks."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Called for every operation."""
        return 0 if func is torch.ops.aten._local_scalar_dense.default else func(*args, **(kwargs or {}))


def without_values(function: Callable[[], Any]) -> Any:  # noqa: ANN401 -- what the function returns
    """Call a function whose tensors have shapes but no values: nothing is computed or allocated."""
    with FakeTensorMode(), Zeros():
        return function()


@dataclass(frozen=True)
class Counts:
    """Counts: operations in 1e9 of a step by the parts that it recomputes; GiB; rows of the methods."""

    gflop: dict[int, float]
    papers_gib: dict[tuple[str, int], float]  # by precision and recomputed parts
    methods: list[dict[str, Any]]
    five_shot_gib: dict[str, float] = field(default_factory=dict)  # of FIVE_SHOT, recomputed, by precision


def count(sides: Sequence[Side], sizes: Sizes, methods: Sequence[str] = tuple(METHODS)) -> Counts:
    """Count each thing once, in as many processes as cores: the order in memory changes no count."""
    recomputes, precisions = sorted({side.recomputes for side in sides}), sorted({side.precision for side in sides})
    kinds = sorted({(side.precision, side.recomputes) for side in sides})
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("spawn")) as pool:
        peaks = pool.map(peak_gib, *zip(*kinds, strict=True))  # the longest first
        five_shot = pool.map(partial(peak_gib, recomputes=PARTS, sizes=FIVE_SHOT), precisions)
        operations = pool.map(step_gflop, recomputes, [sizes] * len(recomputes))
        rows = list(pool.map(methods_row, methods))
        gflop = dict(zip(recomputes, operations, strict=True))
        papers, five = dict(zip(kinds, peaks, strict=True)), dict(zip(precisions, five_shot, strict=True))
        return Counts(gflop, papers, rows, five)


def step_gflop(recomputes: int, sizes: Sizes) -> float:
    """Operations in 1e9 of a whole step; the precision changes nothing."""

    def whole() -> float:
        model = make_model(Side("counted", recomputes=recomputes))
        return gflop(partial(TrainingStep(model).run, make_episode(sizes)))

    return float(without_values(whole))


def peak_gib(precision: str, recomputes: int, sizes: Sizes = Sizes()) -> float:  # noqa: B008 -- frozen; mapped
    """Most memory in use during a step, in GiB: weights, gradients, episode, inner values; no buffers of libraries."""

    def peak() -> float:
        model, episode = make_model(Side("counted", recomputes=recomputes)), make_episode(sizes)
        step = TrainingStep(model, precision=precision)
        tracker = MemTracker()
        tracker.track_external(model, episode.support, episode.query)
        with tracker:
            step.run(episode)
        found = tracker.get_tracker_snapshot("peak")
        return sum(values["Total"] for values in found.values()) / 2**30

    return float(without_values(peak))


def methods_row(method: str) -> dict[str, Any]:
    """Parameters of a method with ResNet-50, and the operations of forward pass and step on the papers' episode."""

    def counted() -> tuple[float, float, float]:
        model, episode = make_model(Side("counted"), method), make_episode(Sizes())
        forward = gflop(partial(model, episode))
        parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        return parameters, forward, gflop(partial(TrainingStep(model).run, episode))

    parameters, forward, step = without_values(counted)
    return {
        "method": method,
        "parameters_m": round(parameters, 2),
        "forward_gflop": round(forward, 1),
        "step_gflop": round(step, 1),
    }
