"""Make the views of FIMA: two windows of each video as RGB and as frame differences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from shards_spec.errors import ConfigError

Wrap = Literal["cyclic", "repeat", "extra_frame"]
WRAPS = ("cyclic", "repeat", "extra_frame")


def frame_difference(clips: Tensor, *, wrap: Wrap = "cyclic", dim: int = -4) -> Tensor:
    """Return (x[t] - x[t-1] + 1) / 2 along the frames `dim` of clips in [0, 1]; 0.5 is no change.

    The frame before the first one is, by `wrap`:
    - "cyclic": the clip's last frame, as in the reference code (ZMHH-H/FIMA);
    - "repeat": the first frame itself;
    - "extra_frame": a further frame in front of each clip, so that T + 1 frames give T differences.

    Raises:
        ConfigError: there is no such wrap.
    """
    check_wrap(wrap)
    frames = clips.shape[dim]
    if wrap == "extra_frame":
        later, earlier = clips.narrow(dim, 1, frames - 1), clips.narrow(dim, 0, frames - 1)
    elif wrap == "repeat":
        later, earlier = clips, torch.cat([clips.narrow(dim, 0, 1), clips.narrow(dim, 0, frames - 1)], dim)
    else:
        later, earlier = clips, clips.roll(1, dim)
    return (later - earlier).add_(1).mul_(0.5)


def without_extra_frame(clips: Tensor, *, wrap: Wrap, dim: int = -4) -> Tensor:
    """Return the frames that have a difference: with "extra_frame" all but the first, else all."""
    return clips.narrow(dim, 1, clips.shape[dim] - 1) if wrap == "extra_frame" else clips


def check_wrap(wrap: str) -> None:
    """Check the name of a wrap; ConfigError if there is no such wrap."""
    if wrap not in WRAPS:
        raise ConfigError(f'diff_wrap="{wrap}" is not known; choose "cyclic", "repeat" or "extra_frame"')


@dataclass(frozen=True)
class MotionViews:
    """Windows m and n of B videos, augmented and normalised; clips are [B, 3, T, S, S].

    The differences of a window are those of its whole span, then of each of its parts.  It has as
    many parts as the trunk gives feature frames.
    """

    rgb: tuple[Tensor, Tensor]
    differences: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
    coordinates: tuple[Tensor, Tensor]  # [B, 4] (x1, y1, x2, y2) of the crop of the whole span


def motion_views(
    clips: Tensor, coordinates: Tensor, *, augment: Callable[[Tensor], Tensor], wrap: Wrap = "cyclic"
) -> MotionViews:
    """Take differences of the cropped clips, then augment each clip that a network reads by itself.

    Args:
        clips: [B, V, T, 3, S, S] in [0, 1], neither augmented nor normalised.  The views are window
            m whole, its parts in their order, and the same of n; V is 6 for two parts.  With
            wrap="extra_frame" each clip begins with the frame before it.
        coordinates: [B, 2, 4] corners of the crops of the whole spans of m and n.
        augment: [B, T, 3, S, S] in [0, 1] -> the same shape, normalised.  It is called for one clip
            of each sample at a time, and makes its own draws.
        wrap: As in `frame_difference`.

    Raises:
        ConfigError: two windows cannot have this number of views.
    """
    count = clips.shape[1]
    if count < 4 or count % 2:
        raise ConfigError(f"{count} views are not two windows with as many parts; give 6: m, m's 2 parts, n, n's 2")

    def ready(view: Tensor) -> Tensor:
        return rearrange(augment(view), "b t c h w -> b c t h w")

    def moved(number: int) -> Tensor:
        return ready(frame_difference(clips[:, number], wrap=wrap))

    def rgb(number: int) -> Tensor:
        return ready(without_extra_frame(clips[:, number], wrap=wrap))

    half = count // 2
    m, n = (tuple(moved(first + place) for place in range(half)) for first in (0, half))
    return MotionViews((rgb(0), rgb(half)), (m, n), (coordinates[:, 0], coordinates[:, 1]))
