"""A small video trunk that learns motion from nothing within minutes on a CPU."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from fsar.trunks.video_base import StagedTrunk, he_init

Three = tuple[int, int, int]

WIDTHS = (16, 24, 48, 64)


def stage(inputs: int, outputs: int, *, kernel: Three, stride: Three) -> nn.Sequential:
    """Convolution that keeps the size but for its stride, norm, ReLU."""
    time, down, across = kernel
    padding = (time // 2, down // 2, across // 2)
    conv = nn.Conv3d(inputs, outputs, kernel, stride=stride, padding=padding, bias=False)
    return nn.Sequential(conv, nn.BatchNorm3d(outputs), nn.ReLU(inplace=True))


class Tiny3D(StagedTrunk):
    """Five convolutions, 131,000 parameters, with R3D-18's strides: 8 in time and 16 in place, 64 channels."""

    channels = WIDTHS[-1]

    def __init__(self, *, clip_frames: int = 8) -> None:
        super().__init__(clip_frames=clip_frames)
        one, two, three, four = WIDTHS
        self.stem = stage(3, one, kernel=(3, 5, 5), stride=(1, 2, 2))
        self.layer1 = stage(one, one, kernel=(1, 3, 3), stride=(1, 1, 1))
        self.layer2 = stage(one, two, kernel=(3, 3, 3), stride=(2, 2, 2))
        self.layer3 = stage(two, three, kernel=(3, 3, 3), stride=(2, 2, 2))
        self.layer4 = stage(three, four, kernel=(3, 3, 3), stride=(2, 2, 2))
        he_init(self)

    def first(self, clips: Tensor) -> Tensor:
        """[N, 3, t, H, W] -> [N, 16, t, H/2, W/2]; each clip's own mean and spread of colour go first."""
        out: Tensor = self.stem(F.instance_norm(clips))
        return out
