"""Turn flow (flow rotation augmentation of MSCL, arXiv 2208.06105), and colour it like pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from shards_spec.errors import ConfigError, choice
from shards_spec.pictures import colour_wheel

SMALL = 1e-5  # added to the largest radius, as in the published code


def unit_flow(flow: Tensor) -> Tensor:
    """Divide whole fields [..., 2, h, w], before any crop, by their largest radii."""
    largest = flow.square().sum(dim=-3, keepdim=True).sqrt().amax(dim=(-2, -1), keepdim=True)  # [..., 1, 1, 1]
    return flow / (largest + SMALL)


class FlowColours(nn.Module):
    """Colour code of flow: the direction is a hue, the radius its strength; no motion is white.

    Vectors are not scaled, so a crop keeps the scale of its whole field; those longer than 1 are
    darkened. The numbers are those of the published code (megvii-research/MSCL).  Its wheel is
    open: just before the end colours jump back to the beginning.  Nothing is normalised further.
    """

    wheel: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("wheel", torch.from_numpy(colour_wheel()).float() / 255, persistent=False)

    def forward(self, flow: Tensor) -> Tensor:
        """Colour flow [B, 2, t, h, w], u before v -> RGB [B, 3, t, h, w] in [0, 1].

        Flow is in units of the field's largest radius.
        """
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

STEPS = 8  # angles of 36, 72, ..., 288 degrees; 324 never occurs in the published code


def rotation_angles(steps: Tensor) -> Tensor:
    """Turn whole numbers [B] from 0 to 7 into angles [B] in radians."""
    return (0.2 + 0.2 * steps) * math.pi


def draw_angles(count: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Draw random angles [count] on the CPU, one for all fields of a sample."""
    return rotation_angles(torch.randint(STEPS, (count,), generator=generator))


def rotate_flow(flow: Tensor, angles: Tensor) -> Tensor:
    """Turn the vectors of flow [B, 2, t, h, w], u before v, by each sample's angle [B].

    Turning commutes with cropping and resizing, so it comes after both, on fewer pixels.
    """
    angles = angles.to(flow)[:, None, None, None]
    cos, sin = angles.cos(), angles.sin()
    u, v = flow.unbind(dim=1)  # [B, t, h, w] each
    return torch.stack([cos * u - sin * v, sin * u + cos * v], dim=1)


# View -> the clip of each of its two halves, and True where it is turned.  "released": the
# published code splits the list [q, k, turned q, turned k] in its middle, so that turned flow is
# only ever a key.
LAYOUTS: Mapping[Layout, Mapping[Clip, tuple[tuple[Clip, bool], ...]]] = {
    "intended": {"q": (("q", False), ("q", True)), "k": (("k", False), ("k", True))},
    "released": {"q": (("q", False), ("k", False)), "k": (("q", True), ("k", True))},
}


class FlowViews(nn.Module):
    """The coloured flow of a view: a clip as it is, then one that is contrasted with it.

    Args:
        layout: "intended" contrasts a clip with its own turned flow; "released" with clips of the
            other view, as the published code does by mistake.
        fra: Flow rotation augmentation; without it there is only the first clip.

    Raises:
        ConfigError: there is no such layout, or it is "released" without `fra`.
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
        """Return the clips whose flow must be cut by the view's box."""
        return sorted({clip for clip, _ in self._halves(view)})

    def forward(
        self, view: Clip, crops: Mapping[Clip, Tensor], angles: Tensor, *, mirrored: Tensor | None = None
    ) -> Tensor:
        """Colour the flow of a view -> [B, 3, 2t, h, w]; [B, 3, t, h, w] without FRA.

        Args:
            view: The view.
            crops: Flow [B, 2, t, h, w] of each of `clips(view)`, in the view's crop and flip.  Its
                unit is the largest radius of each field.
            angles: Angles [B] in radians, the same for both views.
            mirrored: Samples [B] that were flipped, whose u changes its sign; None: it never does,
                as in the published code.
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
