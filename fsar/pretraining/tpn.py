"""The neck of MSCL (Ni et al. 2022, arXiv 2208.06105): a feature pyramid and its convolutions.

Parameter names are those of the published code (megvii-research/MSCL).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Three = tuple[int, int, int]

WIDTH = 128  # channels of all levels


class NamedConv(nn.Module):
    """Convolution with bias that keeps the size, below the published name `conv`."""

    def __init__(self, inputs: int, *, side: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inputs, WIDTH, (1, side, side), padding=(0, side // 2, side // 2))

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, t, h, w] -> [N, 128, t, h, w]."""
        out: Tensor = self.conv(x)
        return out


class FeaturePyramid(nn.Module):
    """Levels of one width, each coarser one added to the next finer (Lin et al. 2017).

    Here they have three axes.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(NamedConv(inputs, side=1) for inputs in channels)
        self.fpn_convs = nn.ModuleList(NamedConv(WIDTH, side=3) for _ in channels)

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Maps [N, C, t, h, w], the finest first -> as many of 128 channels and the same sizes."""
        maps = [lateral(x) for lateral, x in zip(self.lateral_convs, levels, strict=True)]
        for fine in range(len(maps) - 2, -1, -1):
            maps[fine] = maps[fine] + F.interpolate(maps[fine + 1], size=maps[fine].shape[2:], mode="nearest")
        return [smooth(x) for smooth, x in zip(self.fpn_convs, maps, strict=True)]


class PyramidConvolution(nn.Module):
    """One convolution over a level and its two neighbours; all levels share the weights."""

    def __init__(self, stride: Three) -> None:
        super().__init__()
        strides = ((1, 1, 1), (1, 1, 1), stride)  # from the coarser level, the same, the finer
        self.Pconv = nn.ModuleList(nn.Conv3d(WIDTH, WIDTH, 3, stride=each, padding=1) for each in strides)

    def level(self, maps: Sequence[Tensor], number: int) -> Tensor:
        """Compute one level [N, 128, t, h, w] of the output."""
        from_coarser, same, from_finer = self.Pconv
        out: Tensor = same(maps[number])
        if number > 0:
            out = out + from_finer(maps[number - 1])
        if number < len(maps) - 1:
            coarser = from_coarser(maps[number + 1])
            out = out + F.interpolate(coarser, size=out.shape[2:], mode="trilinear", align_corners=False)
        return F.relu(out)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Compute all levels of the output."""
        return [self.level(maps, number) for number in range(len(maps))]


class PyramidConvolutions(nn.Module):
    """Pyramid convolutions in a row."""

    def __init__(self, count: int, stride: Three) -> None:
        super().__init__()
        self.Pconvs = nn.ModuleList(PyramidConvolution(stride) for _ in range(count))

    def forward(self, maps: Sequence[Tensor], *, finest: bool = False) -> list[Tensor]:
        """Compute all levels [N, 128, t, h, w] of the last output, or only the finest."""
        *before, last = self.Pconvs
        for convolution in before:
            maps = convolution(maps)
        assert isinstance(last, PyramidConvolution)
        return [last.level(maps, 0)] if finest else last(maps)


class TemporalPyramid(nn.Module):
    """The neck: from the last three levels of a video trunk to levels of 128 channels.

    Args:
        channels: Of the trunk's last three levels, the finest first.
        convolutions: Pyramid convolutions in a row: 2 for R3D-18, 1 for SlowOnly-50.
        stride: From a finer level to the next: (2, 2, 2) for R3D-18, (1, 2, 2) for SlowOnly-50.
    """

    def __init__(self, channels: Sequence[int], *, convolutions: int = 2, stride: Three = (2, 2, 2)) -> None:
        super().__init__()
        self.tpn = nn.ModuleDict({"fpn": FeaturePyramid(channels), "sepc": PyramidConvolutions(convolutions, stride)})
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.constant_(module.get_parameter("bias"), 0)

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Turn the last three levels of a trunk into maps [N, 128, t, h, w], the finest first."""
        maps: list[Tensor] = self.tpn["sepc"](self.tpn["fpn"](levels[-3:]))
        return maps

    def finest(self, levels: Sequence[Tensor]) -> Tensor:
        """Compute only the finest map [N, 128, t, h, w]; the last convolution omits the others."""
        (finest,) = self.tpn["sepc"](self.tpn["fpn"](levels[-3:]), finest=True)
        assert isinstance(finest, torch.Tensor)
        return finest
