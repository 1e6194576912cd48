"""ResNet-18, -34 and -50 (He et al. 2016) with torchvision's parameter names, no classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from fsar.trunks.base import Trunk


def convolution(inputs: int, outputs: int, *, size: int, stride: int = 1) -> nn.Conv2d:
    """Make a convolution without bias that keeps the size at stride 1."""
    return nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False)


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    """Make the projection of a block's input; None where its shape does not change."""
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(convolution(inputs, outputs, size=1, stride=stride), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions: the block of ResNet-18 and -34."""

    expansion: ClassVar[int] = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = convolution(inputs, width, size=3, stride=stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = convolution(width, width, size=3)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, h, w] -> [N, width, h/stride, w/stride]."""
        identity = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        out: Tensor = self.relu(self.bn2(self.conv2(x)) + identity)
        return out


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride: "version 1.5") and 1x1 convolutions: the block of ResNet-50."""

    expansion: ClassVar[int] = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = convolution(inputs, width, size=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = convolution(width, width, size=3, stride=stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = convolution(width, 4 * width, size=1)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(inputs, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, h, w] -> [N, 4 width, h/stride, w/stride]."""
        identity = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        out: Tensor = self.relu(self.bn3(self.conv3(x)) + identity)
        return out


class ResNet(Trunk):
    """Residual network up to its last maps (stride 32), pooled by the mean."""

    REFERENCE_NAMES: ClassVar[Mapping[str, str]] = {
        "conv1": "0",
        "bn1": "1",
        "layer1": "4",
        "layer2": "5",
        "layer3": "6",
        "layer4": "7",
    }

    def __init__(self, block: type[BasicBlock | Bottleneck], depths: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        widths = [64, *(64 * 2**stage * block.expansion for stage in range(4))]  # channels into and out of the stages
        for stage, depth in enumerate(depths):
            first = block(widths[stage], 64 * 2**stage, 1 if stage == 0 else 2)
            rest = [block(widths[stage + 1], 64 * 2**stage, 1) for _ in range(depth - 1)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(first, *rest))
        self.channels = widths[-1]
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def frame_maps(self, frames: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, C, H/32, W/32]."""
        x = self.part(0, self.stem, frames)
        for stage in (1, 2, 3, 4):
            x = self.part(stage, self.get_submodule(f"layer{stage}"), x)
        return x

    def stem(self, frames: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, 64, H/4, W/4]."""
        out: Tensor = self.maxpool(self.relu(self.bn1(self.conv1(frames))))
        return out


def resnet18() -> ResNet:
    """Make ResNet-18: 512 channels."""
    return ResNet(BasicBlock, (2, 2, 2, 2))


def resnet34() -> ResNet:
    """Make ResNet-34: 512 channels."""
    return ResNet(BasicBlock, (3, 4, 6, 3))


def resnet50() -> ResNet:
    """Make ResNet-50: 2048 channels."""
    return ResNet(Bottleneck, (3, 4, 6, 3))
