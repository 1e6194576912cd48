"""I3D: Inception-v1 inflated to video, as FIMA's code has it.

Source: Carreira and Zisserman 2017, arXiv 1705.07750.
"""

from __future__ import annotations

from itertools import count

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fsar.trunks.base import Three, VideoTrunk

# Kernels and strides of the poolings, in time, height and width.
POOLS: dict[str, tuple[Three, Three]] = {
    "maxPool3d_2a_3x3": ((1, 3, 3), (1, 2, 2)),
    "maxPool3d_3a_3x3": ((1, 3, 3), (1, 2, 2)),
    "maxPool3d_4a_3x3": ((3, 3, 3), (2, 2, 2)),
    "maxPool3d_5a_2x2": ((2, 2, 2), (2, 2, 2)),
}
# Channels of each block: its 1x1x1 branch, the two steps of each 3x3x3 branch, the branch behind a
# pooling.
MIXED = {
    "mixed_3b": (64, 96, 128, 16, 32, 32),
    "mixed_3c": (128, 128, 192, 32, 96, 64),
    "mixed_4b": (192, 96, 208, 16, 48, 64),
    "mixed_4c": (160, 112, 224, 24, 64, 64),
    "mixed_4d": (128, 128, 256, 24, 64, 64),
    "mixed_4e": (112, 144, 288, 32, 64, 64),
    "mixed_4f": (256, 160, 320, 32, 128, 128),
    "mixed_5b": (256, 160, 320, 32, 128, 128),
    "mixed_5c": (384, 192, 384, 48, 128, 128),
}
# The steps of each level; what follows the last step of one opens the next.
LEVELS = (
    ("conv3d_1a_7x7", "maxPool3d_2a_3x3", "conv3d_2b_1x1", "conv3d_2c_3x3"),
    ("maxPool3d_3a_3x3", "mixed_3b", "mixed_3c"),
    ("maxPool3d_4a_3x3", "mixed_4b", "mixed_4c", "mixed_4d", "mixed_4e", "mixed_4f"),
    ("maxPool3d_5a_2x2", "mixed_5b", "mixed_5c"),
)


def padded(x: Tensor, kernel: Three, stride: Three) -> Tensor:
    """Pad [N, C, t, h, w] by kernel - stride zeros an axis, whatever its size; the odd one last."""
    totals = [max(k - s, 0) for k, s in zip(kernel, stride, strict=True)]
    sides = [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    return F.pad(x, sides) if any(sides) else x


class Unit(nn.Module):
    """Convolution without bias, norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, *, size: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.size, self.stride = (size,) * 3, (stride,) * 3
        self.even = (size - stride) % 2 == 0  # then the convolution pads for itself
        padding = (size - stride) // 2 if self.even else 0
        self.conv3d = nn.Conv3d(inputs, outputs, size, stride=stride, padding=padding, bias=False)
        self.batch3d = nn.BatchNorm3d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, t, h, w] -> [N, outputs, t/stride, h/stride, w/stride]."""
        x = x if self.even else padded(x, self.size, self.stride)
        return F.relu(self.batch3d(self.conv3d(x)), inplace=True)


class Mixed(nn.Module):
    """Four branches side by side."""

    def __init__(self, inputs: int, channels: tuple[int, int, int, int, int, int]) -> None:
        super().__init__()
        one, reduced, three, reduced_again, three_again, pooled = channels
        self.branch_0 = Unit(inputs, one)
        self.branch_1 = nn.Sequential(Unit(inputs, reduced), Unit(reduced, three, size=3))
        self.branch_2 = nn.Sequential(Unit(inputs, reduced_again), Unit(reduced_again, three_again, size=3))
        self.branch_3 = nn.Sequential(nn.MaxPool3d(3, stride=1, padding=1), Unit(inputs, pooled))

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, t, h, w] -> [N, outputs, t, h, w]."""
        return torch.cat([self.branch_0(x), self.branch_1(x), self.branch_2(x), self.branch_3(x)], dim=1)


class Pool(nn.Module):
    """Largest value under a kernel, with zeros around the map; after a ReLU none is below them."""

    def __init__(self, kernel: Three, stride: Three) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, t, h, w] -> [N, C, ceil(t/stride), ceil(h/stride), ceil(w/stride)]."""
        return F.max_pool3d(padded(x, self.kernel, self.stride), self.kernel, self.stride, ceil_mode=True)


class I3D(VideoTrunk):
    """I3D up to its last maps: 12.3 M parameters, 1024 channels, stride 8 in time and 32 in place.

    Parameter names are those of FIMA's code; weights start as PyTorch makes them.
    """

    channels = 1024

    def __init__(self, *, clip_frames: int = 16) -> None:
        super().__init__(clip_frames=clip_frames)
        self.conv3d_1a_7x7 = Unit(3, 64, size=7, stride=2)
        self.conv3d_2b_1x1 = Unit(64, 64)
        self.conv3d_2c_3x3 = Unit(64, 192, size=3)
        for name, (kernel, stride) in POOLS.items():
            self.add_module(name, Pool(kernel, stride))
        inputs = 192
        for name, channels in MIXED.items():
            self.add_module(name, Mixed(inputs, channels))
            one, _, three, _, three_again, pooled = channels
            inputs = one + three + three_again + pooled

    def levels(self, clips: Tensor) -> list[Tensor]:
        """[N, 3, t, H, W] -> maps of 192, 480, 832, 1024 channels, strides 4, 8, 16, 32."""
        found, x, numbers = [], clips, count()
        for steps in LEVELS:
            for step in steps:
                x = self.part(next(numbers), self.get_submodule(step), x)
            found.append(x)
        return found
