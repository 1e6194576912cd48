"""Turn flow by an angle (flow rotation augmentation of MSCL, arXiv 2208.06105), and colour it as pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from shards_spec.errors import ConfigError, choice
from shards_spec.pictures import colour_wheel

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


Clip = Literal["q", "k"]
Layout = Literal["intended", "released"]

STEPS = 8  # angles of 36, 72, ... 288 degrees; 324 never occurs in the published code


def rotation_angles(steps: Tensor) -> Tensor:
    """Whole numbers [B] from 0 to 7 -> angles [B] in radians."""
    return (0.2 + 0.2 * steps) * math.pi


def draw_angles(count: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Random angles [count] on the CPU: one for a sample, whose fields all turn alike."""
    return rotation_angles(torch.randint(STEPS, (count,), generator=generator))


def rotate_flow(flow: Tensor, angles: Tensor) -> Tensor:
    """[B, 2, t, h, w], u before v, with the vectors of each sample turned by its angle [B]; places stay.

    It commutes with cropping and resizing, so it comes after both.
    """
    angles = angles.to(flow)[:, None, None, None]
    cos, sin = angles.cos(), angles.sin()
    u, v = flow.unbind(dim=1)  # [B, t, h, w] each
    return torch.stack([cos * u - sin * v, sin * u + cos * v], dim=1)


# View -> the clips of its two halves, and whether they are turned.  Released: the published code splits the list
# [q, k, turned q, turned k] in its middle, so that turned flow is only ever a key.
LAYOUTS: Mapping[Layout, Mapping[Clip, tuple[tuple[Clip, bool], ...]]] = {
    "intended": {"q": (("q", False), ("q", True)), "k": (("k", False), ("k", True))},
    "released": {"q": (("q", False), ("k", False)), "k": (("q", True), ("k", True))},
}


class FlowViews(nn.Module):
    """The flow of a view as the model reads it: coloured, the clip as it is and then what is set against it.

    Args:
        layout: "intended" sets the turned flow of the view's own clip against it; "released" what the published
            code does by mistake, clips of the other view.
        fra: Off: the clip alone.
    """

    def __init__(self, *, layout: Layout = "intended", fra: bool = True) -> None:
        super().__init__()
        choice("layout", layout, tuple(LAYOUTS))
        if layout == "released" and not fra:
            raise ConfigError('layout="released" orders turned flow; choose "intended" with fra off')
        self.halves = LAYOUTS[layout]
        self.fra = fra
        self.colours = FlowColours()

    def clips(self, view: Clip) -> list[Clip]:
        """Which clips' flow must be cut by the view's box."""
        return sorted({clip for clip, _ in self._halves(view)})

    def forward(
        self, view: Clip, crops: Mapping[Clip, Tensor], angles: Tensor, *, mirrored: Tensor | None = None
    ) -> Tensor:
        """Coloured flow [B, 3, 2t, h, w] of a view; [B, 3, t, h, w] without FRA.

        Args:
            view: Which one.
            crops: Flow [B, 2, t, h, w] of `clips(view)` in the view's crop and flip, in units of each field's largest
                radius.
            angles: [B] radians, the same for both views.
            mirrored: [B] bool, samples that were flipped, whose u then changes sign; None: it never does, as in the
                published code.
        """
        parts = []
        for clip, turned in self._halves(view):
            flow = crops[clip]
            if mirrored is not None:
                sign = 1 - 2 * mirrored.to(flow)
                flow = flow * torch.stack([sign, torch.ones_like(sign)], dim=1)[..., None, None, None]
            parts.append(rotate_flow(flow, angles) if turned else flow)
        coloured: Tensor = self.colours(torch.cat(parts, dim=2))
        return coloured

    def _halves(self, view: Clip) -> tuple[tuple[Clip, bool], ...]:
        return self.halves[view] if self.fra else self.halves[view][:1]
