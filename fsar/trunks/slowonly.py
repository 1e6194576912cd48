"""SlowOnly-50 (Feichtenhofer et al. 2019, arXiv 1812.03982), with the parameter names of MMAction2."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from fsar.trunks.video_base import StagedTrunk, he_init

Three = tuple[int, int, int]
Names = tuple[str, str]  # of a convolution and its norm

DEPTHS = (3, 4, 6, 3)  # blocks of the four stages of a network of 50 layers


def unit(inputs: int, outputs: int, size: Three, *, stride: Three = (1, 1, 1), names: Names) -> nn.Sequential:
    """Convolution without bias that keeps the size at stride 1, and its norm."""
    padding = (size[0] // 2, size[1] // 2, size[2] // 2)
    both = nn.Sequential()
    both.add_module(names[0], nn.Conv3d(inputs, outputs, size, stride=stride, padding=padding, bias=False))
    both.add_module(names[1], nn.BatchNorm3d(outputs))
    return both


class Bottleneck(nn.Module):
    """1x1x1 or 3x1x1, then 1x3x3, then 1x1x1 to four times the width; the stride is one of place alone."""

    def __init__(self, inputs: int, width: int, *, stride: int, over_time: int, names: Names) -> None:
        super().__init__()
        outputs, steps = 4 * width, (1, stride, stride)
        self.conv1 = unit(inputs, width, (over_time, 1, 1), names=names)
        self.conv2 = unit(width, width, (1, 3, 3), stride=steps, names=names)
        self.conv3 = unit(width, outputs, (1, 1, 1), names=names)
        self.downsample = None
        if stride > 1 or inputs != outputs:
            self.downsample = unit(inputs, outputs, (1, 1, 1), stride=steps, names=names)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, t, h, w] -> [N, 4 width, t, h/stride, w/stride]."""
        identity = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.conv1(x), inplace=True)
        x = F.relu(self.conv2(x), inplace=True)
        return F.relu(self.conv3(x) + identity, inplace=True)


def stages(width: int, *, over_time: tuple[int, int, int, int], names: Names) -> list[nn.Sequential]:
    """Four stages of bottlenecks, the first of a stage with the stride; `over_time`: kernel of each stage's conv1."""
    made, inputs = [], width
    for number, (depth, kernel) in enumerate(zip(DEPTHS, over_time, strict=True)):
        blocks = []
        for place in range(depth):
            stride = 2 if number > 0 and place == 0 else 1
            blocks.append(Bottleneck(inputs, width * 2**number, stride=stride, over_time=kernel, names=names))
            inputs = 4 * width * 2**number
        made.append(nn.Sequential(*blocks))
    return made


class SlowOnly50(StagedTrunk):
    """SlowOnly-50 without its classifier: 31.7 M parameters, 2048 channels, stride 2 in time and 32 in place.

    Its constants of colour are ImageNet's, as in MSCL's code.
    """

    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)
    channels = 2048

    def __init__(self, *, clip_frames: int = 8) -> None:
        super().__init__(clip_frames=clip_frames)
        names = ("conv", "bn")
        self.conv1 = unit(3, 64, (5, 7, 7), stride=(2, 2, 2), names=names)
        for number, stage in enumerate(stages(64, over_time=(1, 1, 3, 3), names=names), start=1):
            self.add_module(f"layer{number}", stage)
        he_init(self)
        for module in self.modules():  # each block begins as its shortcut
            if isinstance(module, Bottleneck):
                nn.init.zeros_(module.conv3.get_parameter("bn.weight"))

    def first(self, clips: Tensor) -> Tensor:
        """[N, 3, t, H, W] -> [N, 64, t/2, H/4, W/4]."""
        x = F.relu(self.conv1(clips), inplace=True)
        return F.max_pool3d(x, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))
