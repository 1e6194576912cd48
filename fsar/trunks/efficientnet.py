"""EfficientNet-Lite0 (Tan and Le 2019, no squeeze-and-excitation): pretrained, fit for a laptop."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fsar.trunks.base import Trunk

EPSILON = 1e-3  # BatchNorm's
STEM, HEAD = 32, 1280
# (expansion, channels, blocks, stride of the first, kernel)
STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)


class SameConv2d(nn.Conv2d):
    """Convolution padded as TensorFlow does under "SAME": the odd pixel goes right and below."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, h, w] -> [N, D, ceil(h / stride), ceil(w / stride)]."""
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        down, right = (max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[-2:])
        if down % 2 or right % 2:
            return super().forward(F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2)))
        return F.conv2d(x, self.weight, None, self.stride, (down // 2, right // 2), 1, self.groups)


def convolution(inputs: int, outputs: int, *, size: int = 1, stride: int = 1, groups: int = 1) -> SameConv2d:
    """Make a convolution of the network, without bias."""
    return SameConv2d(inputs, outputs, size, stride=stride, groups=groups, bias=False)


def norm(channels: int) -> nn.BatchNorm2d:
    """Make a norm of the network."""
    return nn.BatchNorm2d(channels, eps=EPSILON)


class Block(nn.Module):
    """Inverted bottleneck (Sandler et al. 2018), with the published weights' parameter names."""

    def __init__(self, inputs: int, outputs: int, *, expansion: int, size: int, stride: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.expands, self.residual = expansion > 1, stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv, self._bn0 = convolution(inputs, width), norm(width)
        self._depthwise_conv = convolution(width, width, size=size, stride=stride, groups=width)
        self._bn1 = norm(width)
        self._project_conv, self._bn2 = convolution(width, outputs), norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, h, w] -> [N, outputs, h/stride, w/stride]."""
        out: Tensor = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        out = F.relu6(self._bn1(self._depthwise_conv(out)))
        out = self._bn2(self._project_conv(out))
        if self.residual:
            out = x + out
        return out


class EfficientNetLite0(Trunk):
    """EfficientNet-Lite0 up to its last maps (stride 32, 1280 channels): 3.4 M parameters."""

    channels = HEAD
    memory_format = torch.channels_last  # half the time on a CPU; no published training is compared with it
    # (pixel - 127) / 128, for pixels from 0 to 255
    mean = (127 / 255, 127 / 255, 127 / 255)
    std = (128 / 255, 128 / 255, 128 / 255)

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = convolution(3, STEM, size=3, stride=2), norm(STEM)
        blocks, inputs = [], STEM
        for expansion, outputs, count, stride, size in STAGES:
            for number in range(count):
                first = stride if number == 0 else 1
                blocks.append(Block(inputs, outputs, expansion=expansion, size=size, stride=first))
                inputs = outputs
        self._blocks = nn.Sequential(*blocks)
        self._conv_head, self._bn1 = convolution(inputs, HEAD), norm(HEAD)

    def frame_maps(self, frames: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, 1280, H/32, W/32]."""
        x = F.relu6(self._bn0(self._conv_stem(frames)))
        for number, block in enumerate(self._blocks):
            x = self.part(number, block, x)
        maps: Tensor = F.relu6(self._bn1(self._conv_head(x)))
        return maps
