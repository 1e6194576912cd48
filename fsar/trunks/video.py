"""Video trunks: R3D-18, R(2+1)D-18, SlowOnly-50, and the thin encoders of coloured flow.

Sources: Tran et al. 2018 (arXiv 1711.11248) with torchvision's parameter names; SlowOnly of Feichtenhofer et al. 2019
(arXiv 1812.03982) with MMAction2's; the thin encoders of MSCL (arXiv 2208.06105, megvii-research/MSCL).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from fsar.trunks.base import StagedTrunk, he_init

Three = tuple[int, int, int]
# inputs, outputs, channels between the two convolutions of a factorised one, stride -> a convolution
Convolution = Callable[[int, int, int, Three], nn.Module]
Names = tuple[str, str]  # of a convolution and its norm

DEPTHS = (3, 4, 6, 3)  # blocks of the four stages of a network of 50 layers


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


def flat(inputs: int, outputs: int, middle: int, stride: Three) -> nn.Module:
    """1x3x3 convolution."""
    del middle
    return nn.Conv3d(inputs, outputs, (1, 3, 3), stride=stride, padding=(0, 1, 1), bias=False)


def flow_stem(width: int, *, time_stride: int) -> nn.Sequential:
    """Convolution of 1x7x7, norm, ReLU; of every `time_stride` fields of flow the first is looked at alone."""
    return nn.Sequential(
        nn.Conv3d(3, width, (1, 7, 7), stride=(time_stride, 2, 2), padding=(0, 3, 3), bias=False),
        nn.BatchNorm3d(width),
        nn.ReLU(inplace=True),
    )


class ThinResNet18(VideoResNet18):
    """The encoder beside R3D-18: 0.7 M parameters, 128 channels, stride 2 in time and 16 in place.

    Flow in colours is not normalised.  With time_stride=1 the clip holds only the fields that the other stride would
    look at: 0, 2, 4, ... of its length, and the results are the same.
    """

    mean = (0.0, 0.0, 0.0)
    std = (1.0, 1.0, 1.0)

    def __init__(self, *, clip_frames: int = 8, time_stride: int = 2) -> None:
        stem = flow_stem(16, time_stride=time_stride)
        super().__init__(stem, flat, clip_frames=clip_frames, widths=(16, 32, 64, 128), stride=(1, 2, 2))


class ThinResNet50(StagedTrunk):
    """The encoder beside SlowOnly-50: 0.4 M parameters, 256 channels, stride 2 in time and 32 in place.

    Constants of colour and `time_stride` as in the smaller one.
    """

    mean = (0.0, 0.0, 0.0)
    std = (1.0, 1.0, 1.0)
    channels = 256

    def __init__(self, *, clip_frames: int = 8, time_stride: int = 2) -> None:
        super().__init__(clip_frames=clip_frames)
        self.stem = flow_stem(8, time_stride=time_stride)
        for number, stage in enumerate(stages(8, over_time=(1, 1, 1, 1), names=("0", "1")), start=1):
            self.add_module(f"layer{number}", stage)
        he_init(self)

    def first(self, clips: Tensor) -> Tensor:
        """[N, 3, t, H, W] -> [N, 8, t/2, H/4, W/4]."""
        return F.max_pool3d(self.stem(clips), (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))
