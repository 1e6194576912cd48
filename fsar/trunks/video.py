"""R3D-18 and R(2+1)D-18 with torchvision's parameter names (Tran et al. 2018, arXiv 1711.11248)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fsar.trunks.video_base import StagedTrunk, he_init

Three = tuple[int, int, int]
# inputs, outputs, channels between the two convolutions of a factorised one, stride -> a convolution
Convolution = Callable[[int, int, int, Three], nn.Module]


def whole(inputs: int, outputs: int, middle: int, stride: Three) -> nn.Module:
    """3x3x3 convolution: R3D's."""
    del middle
    return nn.Conv3d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


def factorised(inputs: int, outputs: int, middle: int, stride: Three) -> nn.Module:
    """1x3x3 convolution over place, norm, ReLU, then 3x1x1 over time: R(2+1)D's."""
    over_time, down, across = stride
    return nn.Sequential(
        nn.Conv3d(inputs, middle, (1, 3, 3), stride=(1, down, across), padding=(0, 1, 1), bias=False),
        nn.BatchNorm3d(middle),
        nn.ReLU(inplace=True),
        nn.Conv3d(middle, outputs, (3, 1, 1), stride=(over_time, 1, 1), padding=(1, 0, 0), bias=False),
    )


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut; `conv` makes the convolutions.

    The channels in the middle of factorised ones give both as many parameters as the block's first 3x3x3 one has.
    """

    def __init__(self, inputs: int, outputs: int, *, stride: Three, conv: Convolution) -> None:
        super().__init__()
        middle = 27 * inputs * outputs // (9 * inputs + 3 * outputs)
        self.conv1 = nn.Sequential(
            conv(inputs, outputs, middle, stride), nn.BatchNorm3d(outputs), nn.ReLU(inplace=True)
        )
        self.conv2 = nn.Sequential(conv(outputs, outputs, middle, (1, 1, 1)), nn.BatchNorm3d(outputs))
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != (1, 1, 1) or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv3d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm3d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, t, h, w] -> [N, outputs, t', h', w']: each side over its stride."""
        identity = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(self.conv2(self.conv1(x)) + identity)
        return out


def stage(inputs: int, outputs: int, *, stride: Three, conv: Convolution) -> nn.Sequential:
    """Two basic blocks, the stride on the first."""
    first = BasicBlock(inputs, outputs, stride=stride, conv=conv)
    return nn.Sequential(first, BasicBlock(outputs, outputs, stride=(1, 1, 1), conv=conv))


class VideoResNet18(StagedTrunk):
    """Four stages of two basic blocks; stages 2 to 4 have a stride, which halves time and place if none is given."""

    def __init__(
        self,
        stem: nn.Sequential,
        conv: Convolution,
        *,
        clip_frames: int,
        widths: tuple[int, int, int, int] = (64, 128, 256, 512),
        stride: Three = (2, 2, 2),
    ) -> None:
        super().__init__(clip_frames=clip_frames)
        self.stem = stem
        self.layer1 = stage(widths[0], widths[0], stride=(1, 1, 1), conv=conv)
        self.layer2 = stage(widths[0], widths[1], stride=stride, conv=conv)
        self.layer3 = stage(widths[1], widths[2], stride=stride, conv=conv)
        self.layer4 = stage(widths[2], widths[3], stride=stride, conv=conv)
        self.channels = widths[-1]
        he_init(self)

    def first(self, clips: Tensor) -> Tensor:
        """[N, 3, t, H, W] -> [N, C, t', H/2, W/2]."""
        out: Tensor = self.stem(clips)
        return out


def r3d18(*, clip_frames: int = 16) -> VideoResNet18:
    """R3D-18 without its classifier: 33.2 M parameters, 512 channels, stride 8 in time and 16 in place."""
    stem = nn.Sequential(
        nn.Conv3d(3, 64, (3, 7, 7), stride=(1, 2, 2), padding=(1, 3, 3), bias=False),
        nn.BatchNorm3d(64),
        nn.ReLU(inplace=True),
    )
    return VideoResNet18(stem, whole, clip_frames=clip_frames)


def r2plus1d18(*, clip_frames: int = 16) -> VideoResNet18:
    """R(2+1)D-18 without its classifier: 31.3 M parameters, 512 channels, stride 8 in time and 16 in place."""
    stem = nn.Sequential(
        nn.Conv3d(3, 45, (1, 7, 7), stride=(1, 2, 2), padding=(0, 3, 3), bias=False),
        nn.BatchNorm3d(45),
        nn.ReLU(inplace=True),
        nn.Conv3d(45, 64, (3, 1, 1), padding=(1, 0, 0), bias=False),
        nn.BatchNorm3d(64),
        nn.ReLU(inplace=True),
    )
    return VideoResNet18(stem, factorised, clip_frames=clip_frames)
