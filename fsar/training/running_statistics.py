"""Running statistics of BatchNorm where several processes train one model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fsar.run import ranks
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
