"""Optical flow as pictures, on the model's device."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from shards_spec.colour_wheel import colour_wheel

SMALL = 1e-5  # the published code's, added to the largest radius


def unit_flow(flow: Tensor) -> Tensor:
    """[..., 2, h, w] -> the same, each field divided by its largest radius: on whole fields, before any crop."""
    largest = flow.square().sum(dim=-3, keepdim=True).sqrt().amax(dim=(-2, -1), keepdim=True)  # [..., 1, 1, 1]
    return flow / (largest + SMALL)


class FlowColours(nn.Module):
    """Colour code of flow: direction as a hue of the wheel, radius as its strength; no motion is white.

    Vectors are taken as they are, so a crop keeps the scale of its whole field; those longer than 1 are darkened.
    The numbers are those of the published code (megvii-research/MSCL), for which the wheel is open: just before its
    end colours jump back to its beginning.  They are not normalised further.
    """

    wheel: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("wheel", torch.from_numpy(colour_wheel()).float() / 255, persistent=False)

    def forward(self, flow: Tensor) -> Tensor:
        """[B, 2, t, h, w], u before v, in units of the field's largest radius -> RGB [B, 3, t, h, w] in [0, 1]."""
        u, v = flow.float().unbind(dim=1)  # [B, t, h, w] each
        radius = (u.square() + v.square()).sqrt()[:, None]
        place = (torch.atan2(-v, -u) / math.pi + 1) / 2 * (len(self.wheel) - 1)
        low = place.floor()
        share = (place - low)[:, None]
        entry = low.long()
        here, there = (self.wheel[index].movedim(-1, 1) for index in (entry, (entry + 1) % len(self.wheel)))
        hue = (1 - share) * here + share * there  # [B, 3, t, h, w]
        colour = torch.where(radius <= 1, 1 - radius * (1 - hue), 0.75 * hue)
        return (255 * colour).floor() / 255
