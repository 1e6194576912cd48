"""Run one training step: batches in, gradients and counters out.  Nothing waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fsar.episode import Episode
from fsar.evaluation.logits import decide
from fsar.methods import Output
from fsar.run import ranks
from fsar.training.graphs import Graphed
from shards_spec.errors import ConfigError


class RunningStatistics:
    """The BatchNorm statistics of a model, merged over the processes of a run.

    Episodes are computed whole, each by one process.  Merged statistics are then those of one
    process that computes all of them, in the order of the processes.  A call multiplies old
    statistics by 1 - momentum and adds its own share.  So the calls of one process after those of
    another give (what the other left) * decay + (what the first adds by itself).

    Where the processes share one batch, the merged statistics are the mean of theirs.

    Args:
        model: The same in all processes.
        shared: The processes share each batch.

    Raises:
        ConfigError: a norm keeps plain averages (momentum=None).
    """

    def __init__(self, model: nn.Module, *, shared: bool) -> None:
        tracked = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        if any(norm.momentum is None for norm in tracked):
            raise ConfigError("a BatchNorm with momentum=None cannot be trained by several processes: give it a number")
        self.shared = shared
        twice = [norm for norm in tracked for _ in range(2)]  # for its mean and its variance
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
        """Repeat one value for each list of statistics [k] to one for each statistic [n]."""
        # Without output_size the host would wait for the device to learn the length.
        return values.repeat_interleave(self._repeats, output_size=sum(self._widths))

    def _now(self) -> Tensor:
        """Return [2, n]: all statistics in float64, and the number of batches behind each."""
        return torch.stack([torch.cat(self._values).double(), self._spread(torch.stack(self._counts).double())])

    @torch.no_grad()
    def merge(self) -> None:
        """Give all processes the same statistics."""
        if not self._values:
            return
        everyone = ranks.gather(self._now()[None])  # [processes, 2, n]: one flat message for all norms
        self._before = everyone.mean(dim=0) if self.shared else self._in_turn(everyone)
        for tensors, row in ((self._values, self._before[0]), (self._counts, self._before[1])):
            for old, new in zip(tensors, torch.split(row, self._widths), strict=True):
                old.copy_(new if old.ndim else new[0])

    def _in_turn(self, everyone: Tensor) -> Tensor:
        """Chain the statistics of all processes [processes, 2, n] as one process would: [2, n]."""
        before, batches_before = self._before
        value, batches = before, batches_before
        for own, own_batches in everyone:
            decay = self._keeps ** (own_batches - batches_before)
            value = value * decay + (own - before * decay)
            batches = batches + own_batches - batches_before
        return torch.stack([value, batches])


# Places in the counters: batches with a finite loss since the last update; skipped batches; skipped
# batches in a row, now and at most; updates left out.
GROUP, SKIPPED, IN_ROW, LONGEST, SKIPPED_STEPS = range(5)


@dataclass(frozen=True)
class Reading:
    """The counts of a step since its last reading.

    Attributes:
        totals: Terms of the loss, the loss and accuracies by name, summed over the batches that
            counted.
        counted: Weight of the totals: batches with a finite loss.
        skipped: Batches whose loss was not finite; they changed nothing.
        longest: The longest row of batches whose loss was not finite; it may have begun before the
            last reading.
        skipped_steps: Updates left out: a gradient was not finite, or no batch counted.
    """

    totals: dict[str, float]
    counted: int
    skipped: int = 0
    longest: int = 0
    skipped_steps: int = 0


Accuracies = Callable[[Any, Any], dict[str, Tensor]]  # output and batch of a model -> shares of right answers by name


def episode_accuracy(output: Output, episode: Episode) -> dict[str, Tensor]:
    """Return the share of an episode's queries that were given their class; a tie counts as wrong."""
    said = decide(output.logits, episode.query_labels)
    return {"accuracy": (said == episode.query_labels).double().mean()}


class TrainingStep:
    """Forward and backward of one batch at a time, into the gradients of a model.

    A batch whose loss is not finite leaves gradients, totals and buffers, such as the statistics of
    BatchNorm, as they were.  The device decides that.  Parameters, gradients and optimiser are
    float32 with either precision.

    Dropout is a function of the seed of a batch, bit for bit on a CPU.  On a GPU a replayed graph
    reads seed and offset of the device's generator anew.  Kernels with atomic additions may still
    differ in their last bits between runs.

    Of several processes each computes batches of its own, or with `shared` its part of every batch.
    An update and a reading are of all processes.  There is no DistributedDataParallel around the
    model.  One sum of all gradients before an update needs no hooks in backward, keeps the names of
    the state dict, and lies outside a CUDA graph.

    Args:
        model: In training mode, on the device; the same in all processes.
        precision: "fp32", or "bf16" for autocast.
        per_update: Batches, of all processes, whose gradients make one step of the optimiser.  Each
            loss is divided by it.
        processes: Processes of the run; each makes a step of its own.
        shared: The processes share each batch, in equal parts.
        graph: Replay the step as a CUDA graph, of episodes only; without effect on a CPU.
        accuracies: Shares of right answers that a reading sums too; by default those of an
            episode's queries.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        precision: str = "fp32",
        per_update: int = 1,
        processes: int = 1,
        shared: bool = False,
        graph: bool = False,
        accuracies: Accuracies = episode_accuracy,
    ) -> None:
        self.model, self.precision, self.shared, self.accuracies = model, precision, shared, accuracies
        self.processes, self.per_update = processes, per_update * processes if shared else per_update
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.device = next(model.parameters()).device
        self.names: list[str] = []  # of the totals; known after the first batch
        self._totals = torch.zeros(0, dtype=torch.float64, device=self.device)  # the last one counts the batches
        self._counters = torch.zeros(5, dtype=torch.int64, device=self.device)
        graphed = graph and self.device.type == "cuda"
        self._run: Callable[[Any], None] = Graphed(self.run, self.state, self.device) if graphed else self.run
        self._statistics: RunningStatistics | None = None

    def __call__(self, batch: Any, *, seed: int) -> None:  # noqa: ANN401 -- what the model reads
        """Add the gradients of one batch; `seed` decides its dropout."""
        if self.processes > 1 and self._statistics is None:  # it takes the values before the first batch
            self._statistics = RunningStatistics(self.model, shared=self.shared)
        torch.manual_seed(seed)
        self._run(batch)

    def state(self) -> list[Tensor]:
        """Return every tensor that a batch changes; complete after the first batch."""
        return [*self.model.buffers(), *self.gradients(), self._totals, self._counters]

    def gradients(self) -> list[Tensor]:
        """Return the accumulated gradients, in the order of the parameters that have one."""
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def run(self, batch: Any) -> None:  # noqa: ANN401 -- what the model reads
        """Compute the step itself, as it may be captured: a fixed list of kernels for one shape."""
        before = [buffer.clone() for buffer in self.model.buffers()]  # a NaN in a running statistic would never leave
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            output = self.model(batch)
        gradients = torch.autograd.grad(output.loss / self.per_update, self.parameters, allow_unused=True)
        with torch.no_grad():
            finite = output.loss.isfinite()  # [], on the device: to read it here would stop the queue of kernels
            if self.shared:  # one answer for the whole batch
                finite = ~ranks.anywhere(~finite)
            for buffer, old in zip(self.model.buffers(), before, strict=True):
                buffer.copy_(torch.where(finite, buffer, old))
            self._accumulate(gradients, finite)
            self._count(output, self.accuracies(output, batch), finite)

    def _accumulate(self, gradients: tuple[Tensor | None, ...], finite: Tensor) -> None:
        """Add the gradients of a batch, or zeros where its loss is not finite."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.add_(torch.where(finite, gradient, 0))  # no product: NaN times 0 is NaN

    def _count(self, output: Any, accuracies: dict[str, Tensor], finite: Tensor) -> None:  # noqa: ANN401 -- the model's
        terms = {**output.losses, "loss": output.loss, **accuracies}
        if not self.names:
            self.names = list(terms)
            self._totals = self._totals.new_zeros(len(terms) + 1)
        figures = torch.stack([*(term.double() for term in terms.values()), torch.ones_like(output.loss).double()])
        self._totals.add_(torch.where(finite, figures, 0))
        counters = self._counters
        counters[GROUP].add_(finite)
        counters[SKIPPED].add_(finite.logical_not())
        counters[IN_ROW].add_(1).mul_(finite.logical_not())
        counters[LONGEST].copy_(torch.maximum(counters[LONGEST], counters[IN_ROW]))

    def update(self, optimizer: torch.optim.Optimizer, rate: float, *, clip_norm: float = 0.0) -> None:
        """Take the optimiser's step with the gradients so far, and set them to zero.

        The device leaves the step out where a gradient is not finite or no batch counted.
        Gradients whose norm is above `clip_norm` are scaled down to it; 0: none are.
        """
        if self._statistics is not None:
            self._add_up()
            self._statistics.merge()
        gradients = self.gradients()
        norm = torch.nn.utils.get_total_norm(gradients).to(self.device)
        if clip_norm:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, clip_norm, norm)
        good = norm.isfinite() & (self._counters[GROUP] > 0)  # one NaN makes the norm NaN
        guarded_step(optimizer, rate, good)
        for gradient in gradients:  # in place: a graph adds to these very tensors
            gradient.zero_()
        self._counters[GROUP].zero_()
        self._counters[SKIPPED_STEPS].add_(good.logical_not())

    def _add_up(self) -> None:
        """Sum gradients and the number of their batches over all processes."""
        # A parameter may have a gradient in one process only; all must send tensors of the same
        # shapes.
        held = ranks.anywhere(torch.tensor([parameter.grad is not None for parameter in self.parameters]))
        for parameter, elsewhere in zip(self.parameters, held.tolist(), strict=True):
            if elsewhere and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        ranks.add_up([*self.gradients(), self._counters[GROUP]])  # one flat all-reduce

    def read(self) -> Reading:
        """Return the counts of all processes since the last reading; this waits for the device."""
        figures = ranks.gather(torch.cat([self._totals, self._counters.double()])[None])  # [processes, n]
        summed, most = torch.stack([figures.sum(dim=0), figures.amax(dim=0)]).tolist()  # one wait for all numbers
        totals, first = summed[: -len(self._counters)], len(self._totals)
        self._totals.zero_()
        for place in (SKIPPED, LONGEST, SKIPPED_STEPS):
            self._counters[place].zero_()
        return Reading(
            totals=dict(zip(self.names, totals, strict=False)),
            counted=int(totals[-1]) if totals else 0,
            skipped=int((most if self.shared else summed)[first + SKIPPED]),  # all skip a shared batch
            longest=int(most[first + LONGEST]),
            skipped_steps=int(most[first + SKIPPED_STEPS]),
        )


def guarded_step(optimizer: torch.optim.Optimizer, rate: float, good: Tensor) -> None:
    """Take one step at a learning rate, or none where `good` [] is False; nothing waits."""
    for group in optimizer.param_groups:
        group["lr"].fill_(rate)  # a tensor on the device, which a captured or fused step reads anew
    # Fused optimisers leave a step out where `found_inf` is set, as by torch.amp.GradScaler.
    optimizer.found_inf = good.logical_not().float()  # type: ignore[attr-defined]  # no type stub has it
    optimizer.step()
