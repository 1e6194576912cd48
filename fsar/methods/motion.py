"""Layers of motion: differences of feature maps, their tokens, and the images that they stand for.

They follow MoLo (Wang et al., CVPR 2023, section 3.3: motion autodecoder) as its code has it
(alibaba-mmai-research/MoLo).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

LEAST_MOTION_CHANNELS = 16
# The names of a model's `motion` (MotionEncoder) and `decoder` in published state dicts.
MOTION_NAMES = {
    "motion.reduce": "motion_reduce",
    "motion.conv": "motion_conv",
    "motion.up": "motion_up",
    "decoder.up1.conv": "up1.conv.double_conv.0",
    "decoder.up1.norm": "up1.conv.double_conv.1",
    "decoder.up2.conv": "up2.conv.double_conv.0",
    "decoder.up2.norm": "up2.conv.double_conv.1",
    "decoder.up3.conv": "up3.conv.double_conv.0",
    "decoder.up3.norm": "up3.conv.double_conv.1",
    "decoder.out": "outc.conv",
}


class MotionEncoder(nn.Module):
    """Differences of the maps of consecutive frames (paper, section 3.3: motion autodecoder)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = max(channels // 8, LEAST_MOTION_CHANNELS)  # M
        self.reduce = nn.Conv3d(channels, self.channels, 3, padding=1)
        self.conv = nn.Conv2d(self.channels, self.channels, 3, padding=1)
        self.up = nn.Conv2d(self.channels, channels, 1)

    def differences(self, maps: Tensor) -> Tensor:
        """[V, T, C, h, w] -> [V, T-1, M, h, w]: the later frame's maps, convolved, less the earlier ones."""
        reduced = rearrange(self.reduce(rearrange(maps, "v t c h w -> v c t h w")), "v m t h w -> v t m h w")
        later = reduced[:, 1:]
        moved = self.conv(rearrange(later, "v t m h w -> (v t) m h w"))
        differences: Tensor = rearrange(moved, "(v t) m h w -> v t m h w", t=later.shape[1]) - reduced[:, :-1]
        return differences

    def tokens(self, differences: Tensor, pool: Callable[[Tensor], Tensor]) -> Tensor:
        """[V, T-1, M, h, w] -> [V, T-1, C]."""
        maps = F.relu(self.up(rearrange(differences, "v t m h w -> (v t) m h w")))  # [V (T-1), C, h, w]
        return rearrange(pool(maps), "(v t) c -> v t c", t=differences.shape[1])


class UpStage(nn.Module):
    """Bilinear up-sampling, convolution, norm, ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """[N, inputs, h, w] -> [N, outputs, *size]."""
        return F.relu(self.norm(self.conv(F.interpolate(x, size, mode="bilinear", align_corners=True))))


class MotionDecoder(nn.Module):
    """Maps of motion -> the frame differences they stand for."""

    def __init__(self, inputs: int, *, memory_format: torch.memory_format = torch.contiguous_format) -> None:
        super().__init__()
        self.memory_format = memory_format
        # 128, 32 and 16 in the reference; less where the maps of motion are narrower than any of its trunks'.
        widths = (min(128, 2 * inputs), min(32, inputs), min(16, inputs // 2))
        self.up1 = UpStage(inputs, widths[0])
        self.up2 = UpStage(widths[0], widths[1])
        self.up3 = UpStage(widths[1], widths[2])
        self.out = nn.Conv2d(widths[2], 3, 1)

    def forward(self, differences: Tensor, size: tuple[int, int]) -> Tensor:
        """[N, M, h, w] -> [N, 3, *size]."""
        heights, widths = (up_sizes(a, b) for a, b in zip(differences.shape[-2:], size, strict=True))
        x = differences.contiguous(memory_format=self.memory_format)
        x = self.up1(x, (heights[0], widths[0]))
        x = self.up2(x, (heights[1], widths[1]))
        out: Tensor = self.out(self.up3(x, size))
        return out


def up_sizes(start: int, end: int) -> tuple[int, int]:
    """Sizes after the first two of three up-samplings from start to end, powers of two times start.

    The factors are 2, 4, 4 from 7 to 224 as in the reference, and 2, 2, 2 from 8 to 64.
    """
    octaves = max(math.log2(end / start), 0.0)
    first, second = (start * 2 ** math.floor(octaves * step / 3 + 1e-9) for step in (1, 2))
    return first, second
