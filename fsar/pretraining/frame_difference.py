"""Frame differences of clips, as images that a network for RGB can read."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from shards_spec.errors import ConfigError

Wrap = Literal["cyclic", "repeat", "extra_frame"]
WRAPS = ("cyclic", "repeat", "extra_frame")


def frame_difference(clips: Tensor, *, wrap: Wrap = "cyclic", dim: int = -4) -> Tensor:
    """(x[t] - x[t-1] + 1) / 2 along the frames `dim` of clips with values in [0, 1]: 0.5 where nothing changes.

    What stands before the first frame: "cyclic", the clip's last frame, as in the reference code (ZMHH-H/FIMA);
    "repeat", the first frame itself; "extra_frame", a frame of its own that the clips carry in front, so that T + 1
    frames give T differences.  ConfigError for another wrap.
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
    """The frames of which `frame_difference` gives differences: all but the first with "extra_frame", else all."""
    return clips.narrow(dim, 1, clips.shape[dim] - 1) if wrap == "extra_frame" else clips


def check_wrap(wrap: str) -> None:
    """ConfigError unless there is such a wrap."""
    if wrap not in WRAPS:
        raise ConfigError(f'diff_wrap="{wrap}" is not known; choose "cyclic", "repeat" or "extra_frame"')
