"""The motion decoder of MoLo, and what it can be asked to reconstruct.

Source: Wang et al., CVPR 2023, arXiv 2304.00946, section 3.3 (differences of frames). That frames
are reconstructed in their place is an ablation of the paper. The published code has a branch for
flow too, whose input nothing delivers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fsar.episode import Episode
from fsar.matching import full_precision
from shards_spec.errors import ConfigError

ReconsTarget = Literal["frames", "difference", "flow"]
ReconsNorm = Literal["none", "video"]
CHANNELS: dict[ReconsTarget, int] = {"frames": 3, "difference": 3, "flow": 2}
LEAST_SCALE = 1e-3  # added to a root mean square: a video in which nothing moves has a target of zeros


@dataclass(frozen=True)
class Reconstruction:
    """What the decoder made of V videos beside what it was to make, both in the unit of the input.

    Attributes:
        kind: What is reconstructed.
        target: [V, T-1, c, h, w].
        decoded: The same.
        still: What the target would be if nothing moved: zeros, or of frames the earlier ones.
    """

    kind: ReconsTarget
    target: Tensor
    decoded: Tensor
    still: Tensor

    def errors(self) -> tuple[Tensor, Tensor]:
        """Return the mean squared errors [V] of what was decoded, and of no motion at all."""
        decoded, still = ((made - self.target).square().mean(dim=(1, 2, 3, 4)) for made in (self.decoded, self.still))
        return decoded, still


def inputs_of(kind: ReconsTarget, episode: Episode) -> tuple[Tensor, Tensor]:
    """Take what a target is made of: support videos [S, T, c, h, w] without padding, and queries.

    Raises:
        ConfigError: the episode has no images, or no flow.
    """
    flow = kind == "flow"
    support = episode.support_motion if flow else episode.support
    query = episode.query_motion if flow else episode.query
    if support is None or query is None:
        what = "the flow of the clips (support_motion, query_motion)" if flow else "the images beside the features"
        raise ConfigError(f'recons_target = "{kind}" needs {what}; give them, or set recons_weight to 0')
    return episode.ungroup(support), query


def steps_of(kind: ReconsTarget, videos: Tensor) -> Tensor:
    """Make the target of V videos for the steps between consecutive frames.

    Args:
        kind: "frames": the later frame of a step. "difference": that less the earlier one. "flow":
            the mean displacement of the two segments around the step.
        videos: [V, T, c, h, w]: images, or the displacement of each of T segments.

    Returns:
        [V, T-1, c, h, w].
    """
    videos = full_precision(videos)
    earlier, later = videos[:, :-1], videos[:, 1:]
    if kind == "frames":
        return later
    return later - earlier if kind == "difference" else (earlier + later) / 2


def still_of(kind: ReconsTarget, videos: Tensor) -> Tensor:
    """Make the target [V, T-1, c, h, w] that the same videos had if nothing moved."""
    earlier = full_precision(videos[:, :-1])
    return earlier if kind == "frames" else torch.zeros_like(earlier)


def video_scale(target: Tensor) -> Tensor:
    """Return the root mean square [V, 1, 1, 1, 1] of each video's target, and a little more."""
    scale: Tensor = target.square().mean(dim=(1, 2, 3, 4), keepdim=True).sqrt() + LEAST_SCALE
    return scale


class MotionDecoder(nn.Module):
    """Maps of motion -> what they stand for: frame differences in the paper (section 3.3)."""

    def __init__(
        self, inputs: int, outputs: int = 3, *, memory_format: torch.memory_format = torch.contiguous_format
    ) -> None:
        super().__init__()
        self.memory_format = memory_format
        # 128, 32 and 16 in the reference; less where the maps of motion are narrower than any of
        # its trunks'.
        widths = (min(128, 2 * inputs), min(32, inputs), min(16, inputs // 2))
        self.up1 = UpStage(inputs, widths[0])
        self.up2 = UpStage(widths[0], widths[1])
        self.up3 = UpStage(widths[1], widths[2])
        self.out = nn.Conv2d(widths[2], outputs, 1)

    def forward(self, differences: Tensor, size: tuple[int, int]) -> Tensor:
        """[N, M, h, w] -> [N, outputs, *size]."""
        heights, widths = (up_sizes(a, b) for a, b in zip(differences.shape[-2:], size, strict=True))
        x = differences.contiguous(memory_format=self.memory_format)
        x = self.up1(x, (heights[0], widths[0]))
        x = self.up2(x, (heights[1], widths[1]))
        out: Tensor = self.out(self.up3(x, size))
        return out


class UpStage(nn.Module):
    """Bilinear up-sampling, convolution, norm, ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """[N, inputs, h, w] -> [N, outputs, *size]."""
        return F.relu(self.norm(self.conv(F.interpolate(x, size, mode="bilinear", align_corners=True))))


def up_sizes(start: int, end: int) -> tuple[int, int]:
    """Choose the sizes after the first and second of three up-samplings from `start` to `end`.

    Each is `start` times a power of two.

    The factors are 2, 4, 4 from 7 to 224 as in the reference, and 2, 2, 2 from 8 to 64.
    """
    octaves = max(math.log2(end / start), 0.0)
    # The small number keeps a third of a whole number of octaves from being rounded down by one.
    first, second = (start * 2 ** math.floor(octaves * step / 3 + 1e-9) for step in (1, 2))
    return first, second
