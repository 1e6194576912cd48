"""The contract of a pre-training method: a batch of views without labels -> a loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fsar.trunks import Trunk


@dataclass
class Output:
    """What a pre-training method says about a batch."""

    loss: Tensor  # the weighted sum, a scalar
    losses: dict[str, Tensor]  # every term by its name, unweighted scalars
    accuracy: dict[str, Tensor] = field(default_factory=dict)  # share in [0, 1] of right answers, by the term's name


class PretrainingMethod(nn.Module):
    """A trunk, what it learns from, and all that the learning needs; a method defines `forward` and `encoder`.

    In training mode a call moves the momentum encoder, the queues and the clock; in evaluation mode it changes
    nothing.  What a resumed run must know is in the state dict, the clock included.
    """

    @property
    def encoder(self) -> Trunk:
        """The trunk that is kept when pre-training is over."""
        raise NotImplementedError

    def forward(self, batch: Any) -> Output:  # noqa: ANN401  # each method's own dataclass of views
        """The loss of a batch."""
        raise NotImplementedError
