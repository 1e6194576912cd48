"""What every trunk offers: feature maps and a pooled feature for each frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from einops import rearrange
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


@dataclass(frozen=True)
class Features:
    """Output of a trunk for V videos of T frames."""

    maps: Tensor | None  # [V, T, C, h, w]; None where only pooled features are known
    pooled: Tensor  # [V, T, C]


def mean_pool(maps: Tensor) -> Tensor:
    """[N, C, h, w] -> [N, C]: mean over places."""
    return maps.mean(dim=(-2, -1))


class Trunk(nn.Module):
    """Frames in, features out; a trunk defines `frame_maps` and may define its own `pool`.

    `mean` and `std` are the constants its frames are normalised with, `clip_frames` the frames it reads at a time.
    """

    channels: int
    clip_frames: int = 1
    mean: tuple[float, float, float] = (0.45, 0.45, 0.45)
    std: tuple[float, float, float] = (0.225, 0.225, 0.225)
    # Order in memory of maps; channels last is faster on a CPU, but its BatchNorm sums are less exact in training
    # (about 1e-4 at 224 x 224), which trunks that are compared with published results cannot afford.
    memory_format: torch.memory_format = torch.contiguous_format
    # Our name prefix -> its name below "backbone." in published state dicts; empty where none was published.
    REFERENCE_NAMES: ClassVar[Mapping[str, str]] = {}

    def frame_maps(self, frames: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, C, h, w]."""
        raise NotImplementedError

    def pool(self, maps: Tensor) -> Tensor:
        """[N, C, h, w] -> [N, C]; methods pool maps of their own with it too."""
        return mean_pool(maps)

    def forward(self, clips: Tensor) -> Features:
        """[V, T, 3, H, W] -> maps [V, T, C, h, w] and pooled [V, T, C]."""
        steps = clips.shape[1]
        frames = rearrange(clips, "v t c h w -> (v t) c h w")
        maps = self.frame_maps(frames.contiguous(memory_format=self.memory_format))
        pooled = self.pool(maps)
        return Features(
            rearrange(maps, "(v t) c h w -> v t c h w", t=steps),
            rearrange(pooled, "(v t) c -> v t c", t=steps),
        )
