"""The contract of a pre-training method: a batch of views without labels -> a loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fsar.trunks import Trunk


@dataclass
class Output:
    """Losses and accuracies of a pre-training method on a batch."""

    loss: Tensor  # [], the weighted sum
    losses: dict[str, Tensor]  # [] each: every term by its name, unweighted
    accuracy: dict[str, Tensor] = field(default_factory=dict)  # [] each: share of right answers, by the term's name


class PretrainingMethod(nn.Module):
    """The contract of a pre-training method, which defines `forward` and `encoder`.

    In training mode a call moves the momentum encoder, the queues and the clock.  In evaluation
    mode it changes nothing.  The state dict holds all that a resumed run must know, the clock
    included.
    """

    @property
    def encoder(self) -> Trunk:
        """The trunk that is kept when pre-training is over."""
        raise NotImplementedError

    def forward(self, batch: Any) -> Output:  # noqa: ANN401  # each method's own dataclass of views
        """Compute the loss of a batch."""
        raise NotImplementedError
