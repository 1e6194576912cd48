"""Run one training step: batches in, gradients and counters out. Nothing of it waits for the device."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fsar.episode import Episode
from fsar.methods import FewShotMethod, Output
from fsar.run import ranks
from fsar.run.device import autocast
from fsar.training.graphs import Graphed
from fsar.training.optim import guarded_step
from shards_spec.errors import ConfigError


class RunningStatistics:
    """Makes one of what each process has counted since the last time.

    Where processes compute whole batches in turn, as episodes are, the result is that of one process that computes
    all of them in the order of the processes: a call multiplies old statistics by 1 - momentum and adds its own share,
    so that one process's calls after another's are (what the other left) * decay + (what the first alone would add).
    Where they share out one batch, it is the mean of theirs.

    Args:
        model: The same in all processes.
        shared: Whether a batch is shared out.

    Raises:
        ConfigError: a norm keeps plain averages (momentum=None).
    """

    def __init__(self, model: nn.Module, *, shared: bool) -> None:
        tracked = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        if any(norm.momentum is None for norm in tracked):
            raise ConfigError("a BatchNorm with momentum=None cannot be trained by several processes: give it a number")
        self.shared = shared
        twice = [norm for norm in tracked for _ in range(2)]
        both = [value for norm in tracked for value in (norm.running_mean, norm.running_var)]
        self._values: list[Tensor] = [value for value in both if value is not None]
        self._counts = [norm.num_batches_tracked for norm in twice if norm.num_batches_tracked is not None]
        self._widths = [len(value) for value in self._values]
        if tracked:
            device = self._values[0].device
            self._repeats = torch.tensor(self._widths, device=device)
            keeps = torch.tensor([1 - (norm.momentum or 0.0) for norm in twice], dtype=torch.float64, device=device)
            self._keeps = self._spread(keeps)
            self._before = self._now()

    def _spread(self, values: Tensor) -> Tensor:
        """One value for each list of statistics -> one for each statistic."""
        return values.repeat_interleave(self._repeats, output_size=sum(self._widths))

    def _now(self) -> Tensor:
        """[2, n]: all statistics in float64, and how many batches each has seen."""
        return torch.stack([torch.cat(self._values).double(), self._spread(torch.stack(self._counts).double())])

    @torch.no_grad()
    def merge(self) -> None:
        """Give all processes the same statistics."""
        if ranks.count() == 1 or not self._values:
            return
        everyone = ranks.gather(self._now()[None])  # [processes, 2, n]
        self._before = everyone.mean(dim=0) if self.shared else self._in_turn(everyone)
        for tensors, row in ((self._values, self._before[0]), (self._counts, self._before[1])):
            for old, new in zip(tensors, torch.split(row, self._widths), strict=True):
                old.copy_(new if old.ndim else new[0])

    def _in_turn(self, everyone: Tensor) -> Tensor:
        """[processes, 2, n] -> [2, n], as of one process."""
        before, seen_before = self._before
        value, seen = before, seen_before
        for own, seen_by_own in everyone:
            decay = self._keeps ** (seen_by_own - seen_before)
            value = value * decay + (own - before * decay)
            seen = seen + seen_by_own - seen_before
        return torch.stack([value, seen])


# Places in the counters: batches with a finite loss since the last update; skipped ones; those in a row now, and
# at most; updates left out.
GROUP, SKIPPED, IN_ROW, LONGEST, SKIPPED_STEPS = range(5)


@dataclass(frozen=True)
class Reading:
    """What happened since the last reading.

    Attributes:
        sums: Terms of the loss, the loss and accuracies by name, summed over the batches that counted.
        counted: Batches with a finite loss.
        skipped: Batches without: they changed nothing.
        longest: The longest row of skipped batches, those before the last reading included.
        skipped_steps: Updates left out, since a gradient was not finite or no batch counted.
    """

    sums: dict[str, float]
    counted: int
    skipped: int
    longest: int
    skipped_steps: int


class TrainingStep:
    """Forward and backward of one batch at a time into the gradients of a model.

    A batch whose loss is not finite leaves gradients, sums and buffers, such as the statistics of BatchNorm, as they
    were; that is decided on the device.  Parameters, their gradients and the optimiser are float32 with either
    precision.

    Dropout is a function of the seed given with a batch, bit for bit on a CPU.

    Of several processes each computes batches of its own, or with `shared` its part of every batch; an update, and a
    reading, is of all of them.  There is no DistributedDataParallel around the model: one sum of all gradients before
    an update needs no hooks in backward, leaves the names of the state dict alone, and lies outside a CUDA graph.

    Args:
        model: In training mode, on the device; the same in all processes.
        precision: "fp32", or "bf16" for autocast.
        per_update: Batches, of all processes, whose gradients make one step of the optimiser: what a loss is divided
            by.
        shared: Whether the processes share out one batch, in equal parts.
    """

    def __init__(self, model: nn.Module, *, precision: str = "fp32", per_update: int = 1, shared: bool = False) -> None:
        self.model, self.precision, self.shared = model, precision, shared
        self.per_update = per_update * ranks.count() if shared else per_update
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.device = next(model.parameters()).device
        self.names: list[str] = []  # of the sums; known after the first batch
        self._sums = torch.zeros(0, dtype=torch.float64, device=self.device)  # the last one counts
        self._counters = torch.zeros(5, dtype=torch.int64, device=self.device)
        self._run: Callable[[Any], None] = self.run
        self._statistics: RunningStatistics | None = None

    def __call__(self, batch: Any, *, seed: int) -> None:  # noqa: ANN401 -- what the model reads
        """Add the gradients of one batch; `seed` decides its dropout."""
        if ranks.count() > 1 and self._statistics is None:  # what they are before the first batch
            self._statistics = RunningStatistics(self.model, shared=self.shared)
        torch.manual_seed(seed)
        self._run(batch)

    def accuracies(self, output: Any, batch: Any) -> dict[str, Tensor]:  # noqa: ANN401 -- what the model says and reads
        """Shares of right answers by name, of which a reading has the sums too."""
        raise NotImplementedError

    def state(self) -> list[Tensor]:
        """Every tensor that a batch changes; complete after the first batch."""
        return [*self.model.buffers(), *self.gradients(), self._sums, self._counters]

    def gradients(self) -> list[Tensor]:
        """The accumulated gradients, in the order of the parameters that have one."""
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def run(self, batch: Any) -> None:  # noqa: ANN401 -- what the model reads
        """The step itself, as it may be captured: a fixed list of kernels for batches of one shape."""
        before = [buffer.clone() for buffer in self.model.buffers()]  # a NaN in BatchNorm's would be for good
        with autocast(self.device, self.precision):
            output = self.model(batch)
        gradients = torch.autograd.grad(output.loss / self.per_update, self.parameters, allow_unused=True)
        with torch.no_grad():
            finite = output.loss.isfinite()  # []
            if self.shared:  # as of the whole batch
                finite = ~ranks.anywhere(~finite)
            for buffer, old in zip(self.model.buffers(), before, strict=True):
                buffer.copy_(torch.where(finite, buffer, old))
            self._accumulate(gradients, finite)
            self._count(output, self.accuracies(output, batch), finite)

    def _accumulate(self, gradients: tuple[Tensor | None, ...], finite: Tensor) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.add_(torch.where(finite, gradient, 0))

    def _count(self, output: Any, accuracies: dict[str, Tensor], finite: Tensor) -> None:  # noqa: ANN401 -- the model's
        terms = {**output.losses, "loss": output.loss, **accuracies}
        if not self.names:
            self.names = list(terms)
            self._sums = self._sums.new_zeros(len(terms) + 1)
        figures = torch.stack([*(term.double() for term in terms.values()), torch.ones_like(output.loss).double()])
        self._sums.add_(torch.where(finite, figures, 0))
        counters = self._counters
        counters[GROUP].add_(finite)
        counters[SKIPPED].add_(finite.logical_not())
        counters[IN_ROW].add_(1).mul_(finite.logical_not())
        counters[LONGEST].copy_(torch.maximum(counters[LONGEST], counters[IN_ROW]))

    def update(self, optimizer: torch.optim.Optimizer, rate: float, *, clip_norm: float = 0.0) -> None:
        """The optimiser's step with the gradients so far, which are then zero.

        It is left out, on the device, where a gradient is not finite or no batch counted.  Gradients whose norm is
        above `clip_norm` are scaled down to it; 0: none are.
        """
        if self._statistics is not None:
            self._add_up()
            self._statistics.merge()
        gradients = self.gradients()
        norm = torch.nn.utils.get_total_norm(gradients).to(self.device)
        if clip_norm:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, clip_norm, norm)
        good = norm.isfinite() & (self._counters[GROUP] > 0)
        guarded_step(optimizer, rate, good)
        for gradient in gradients:  # in place: a graph adds to these very tensors
            gradient.zero_()
        self._counters[GROUP].zero_()
        self._counters[SKIPPED_STEPS].add_(good.logical_not())

    def _add_up(self) -> None:
        """Make gradients, and how many batches they are of, those of all processes."""
        held = ranks.anywhere(torch.tensor([parameter.grad is not None for parameter in self.parameters]))
        for parameter, elsewhere in zip(self.parameters, held.tolist(), strict=True):
            if elsewhere and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        ranks.add_up([*self.gradients(), self._counters[GROUP]])

    def read(self) -> Reading:
        """What happened since the last reading, in all processes; waits for the device."""
        figures = ranks.gather(torch.cat([self._sums, self._counters.double()])[None])  # [processes, n]
        summed, most = torch.stack([figures.sum(dim=0), figures.amax(dim=0)]).tolist()
        sums, first = summed[: -len(self._counters)], len(self._sums)
        self._sums.zero_()
        for place in (SKIPPED, LONGEST, SKIPPED_STEPS):
            self._counters[place].zero_()
        return Reading(
            sums=dict(zip(self.names, sums, strict=False)),
            counted=int(sums[-1]) if sums else 0,
            skipped=int((most if self.shared else summed)[first + SKIPPED]),  # all skip a shared batch
            longest=int(most[first + LONGEST]),
            skipped_steps=int(most[first + SKIPPED_STEPS]),
        )


class EpisodeStep(TrainingStep):
    """The step of an episode of a few-shot method.

    On a GPU dropout is a function of the seed too: a replayed graph reads seed and offset of the device's
    generator anew.  Sums of kernels with atomic additions may differ in their last bits between runs on a GPU, with a
    graph or without.

    Args:
        model: In training mode, on the device.
        precision: "fp32", or "bf16" for autocast.
        episodes_per_step: What a loss is divided by.
        graph: Replay the step as a CUDA graph; on a CPU there is none, and this changes nothing.
    """

    def __init__(
        self, model: FewShotMethod, *, precision: str = "fp32", episodes_per_step: int = 1, graph: bool = False
    ) -> None:
        super().__init__(model, precision=precision, per_update=episodes_per_step)
        if graph and self.device.type == "cuda":
            self._run = Graphed(self.run, self.state, self.device)

    def accuracies(self, output: Output, batch: Episode) -> dict[str, Tensor]:
        """The share of queries that were given their class."""
        return {"accuracy": (output.logits.argmax(1) == batch.query_labels).double().mean()}


class Meter:
    """Counts what a loop did; `unit` names what the rate counts, such as "episodes"."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, float] = {}
        self._counted = self._units = 0
        self._wait, self._start = 0.0, time.perf_counter()

    def wait(self, seconds: float, *, units: int = 1) -> None:
        """Count what one step reads, and the wait for it."""
        self._units += units
        self._wait += seconds

    def add(self, reading: Reading) -> None:
        """Add what the step has counted."""
        self._counted += reading.counted
        for name, value in reading.sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def record(self) -> dict[str, float]:
        """The means, and start anew."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        means = {name: value / self._counted for name, value in self._sums.items() if self._counted}
        means |= {f"{self._unit}_per_s": self._units / seconds, "data_wait": self._wait / seconds}
        means["memory_mb"] = (
            torch.cuda.max_memory_allocated() / 1e6
            if torch.cuda.is_available()
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        )
        self._reset()
        return {name: round(value, 6) for name, value in means.items()}
