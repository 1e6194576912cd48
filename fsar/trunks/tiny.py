"""Small trunks, for frames and for clips, that learn from nothing within minutes on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fsar.trunks.base import StagedTrunk, Trunk, he_init, unit3d

GRID = 4  # cells a side of the pooled grid
WIDTHS = (16, 24, 48, 64)  # channels of the stages of Tiny3D


class TinyTrunk(Trunk):
    """Three convolutions of stride 2; 64x64 frames give 8x8 maps of 128 channels.

    The pooled feature keeps place: a 4x4 grid of means, flattened, and one linear map. With a mean
    over all places a network this small does not learn from scratch to tell one motion from
    another.
    """

    memory_format = torch.channels_last

    def __init__(self, channels: int = 128) -> None:
        super().__init__()
        self.channels = channels
        self.stages = nn.Sequential(
            stage(3, channels // 4), stage(channels // 4, channels // 2), stage(channels // 2, channels)
        )
        self.grid = nn.Linear(channels * GRID * GRID, channels)

    def frame_maps(self, frames: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, C, H/8, W/8]."""
        # Each frame's own mean and spread of colour go first: they differ between videos far more
        # than the moving things do, and without this the first hundreds of episodes teach nothing.
        return self.part(0, self.stages, F.instance_norm(frames) if self.stream == "frames" else frames)

    def pool(self, maps: Tensor) -> Tensor:
        """[N, C, h, w] -> [N, C]."""
        cells = F.adaptive_avg_pool2d(maps, GRID)  # [N, C, 4, 4]
        pooled: Tensor = self.grid(cells.flatten(1))
        return pooled


def stage(inputs: int, outputs: int) -> nn.Sequential:
    """Make a 3x3 convolution of stride 2, its norm, and a ReLU."""
    conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class Tiny3D(StagedTrunk):
    """Five convolutions, 131,000 parameters, 64 channels; R3D-18's strides of 8 and 16."""

    channels = WIDTHS[-1]

    def __init__(self, *, clip_frames: int = 8) -> None:
        super().__init__(clip_frames=clip_frames)
        one, two, three, four = WIDTHS
        self.stem = nn.Sequential(*unit3d(3, one, (3, 5, 5), stride=(1, 2, 2)))
        self.layer1 = nn.Sequential(*unit3d(one, one, (1, 3, 3)))
        self.layer2 = nn.Sequential(*unit3d(one, two, (3, 3, 3), stride=(2, 2, 2)))
        self.layer3 = nn.Sequential(*unit3d(two, three, (3, 3, 3), stride=(2, 2, 2)))
        self.layer4 = nn.Sequential(*unit3d(three, four, (3, 3, 3), stride=(2, 2, 2)))
        he_init(self)

    def first(self, clips: Tensor) -> Tensor:
        """[N, 3, t, H, W] -> [N, 16, t, H/2, W/2]; each clip's mean and spread go first."""
        out: Tensor = self.stem(F.instance_norm(clips))
        return out
