"""Residual video trunks: R3D-18, R(2+1)D-18, SlowOnly-50, and the thin encoders of coloured flow.

Sources: Tran et al. 2018 (arXiv 1711.11248) with torchvision's parameter names; SlowOnly of
Feichtenhofer et al. 2019 (arXiv 1812.03982) with MMAction2's; the thin encoders of MSCL (arXiv
2208.06105, megvii-research/MSCL). Trunks of 18 layers are made of basic blocks, those of 50 layers
of bottlenecks; each kind is followed by its thin one. Two strides are those of time and place.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from fsar.trunks.base import StagedTrunk, Three, convolution3d, he_init, unit3d

ONE: Three = (1, 1, 1)
# inputs, outputs, channels in the middle of a factorised convolution, stride -> a convolution
Convolution = Callable[[int, int, int, Three], nn.Module]
Names = tuple[str, str]  # of a convolution and its norm
DEPTHS = (3, 4, 6, 3)  # blocks of the four stages of a network of 50 layers


class VideoResNet18(StagedTrunk):
    """Four stages of two basic blocks; from the second on with a stride, by default 2."""

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
        inputs = widths[0]
        for number, width in enumerate(widths, start=1):
            first = BasicBlock(inputs, width, stride=ONE if number == 1 else stride, conv=conv)
            self.add_module(f"layer{number}", nn.Sequential(first, BasicBlock(width, width, stride=ONE, conv=conv)))
            inputs = width
        self.channels = widths[-1]
        he_init(self)

    def first(self, clips: Tensor) -> Tensor:
        """[N, 3, t, H, W] -> [N, C, t', H/2, W/2]."""
        out: Tensor = self.stem(clips)
        return out


def r3d18(*, clip_frames: int = 16) -> VideoResNet18:
    """Make R3D-18, no classifier: 33.2 M parameters, 512 channels, strides 8 (time), 16 (place)."""
    stem = nn.Sequential(*unit3d(3, 64, (3, 7, 7), stride=(1, 2, 2)))
    return VideoResNet18(stem, whole, clip_frames=clip_frames)


def r2plus1d18(*, clip_frames: int = 16) -> VideoResNet18:
    """Make R(2+1)D-18, no classifier: 31.3 M parameters, 512 channels, strides 8 and 16."""
    stem = nn.Sequential(*unit3d(3, 45, (1, 7, 7), stride=(1, 2, 2)), *unit3d(45, 64, (3, 1, 1)))
    return VideoResNet18(stem, factorised, clip_frames=clip_frames)


class ThinResNet18(VideoResNet18):
    """The flow encoder for R3D-18: 0.7 M parameters, 128 channels, strides 2 and 16.

    Flow in colours is not normalised. A clip may hold only the fields that the stride in time reads
    (0, 2, 4, ... of its length): with time_stride=1 the results are the same.
    """

    mean = (0.0, 0.0, 0.0)
    std = (1.0, 1.0, 1.0)

    def __init__(self, *, clip_frames: int = 8, time_stride: int = 2) -> None:
        stem = flow_stem(16, time_stride=time_stride)
        super().__init__(stem, flat, clip_frames=clip_frames, widths=(16, 32, 64, 128), stride=(1, 2, 2))


def flow_stem(width: int, *, time_stride: int) -> nn.Sequential:
    """Make a 1x7x7 convolution, norm, ReLU; it reads the first of every `time_stride` fields."""
    return nn.Sequential(*unit3d(3, width, (1, 7, 7), stride=(time_stride, 2, 2)))


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut; `conv` makes the convolutions.

    The channels in the middle of factorised ones give both as many parameters as the block's first
    3x3x3 convolution has.
    """

    def __init__(self, inputs: int, outputs: int, *, stride: Three, conv: Convolution) -> None:
        super().__init__()
        middle = 27 * inputs * outputs // (9 * inputs + 3 * outputs)
        self.conv1 = nn.Sequential(
            conv(inputs, outputs, middle, stride), nn.BatchNorm3d(outputs), nn.ReLU(inplace=True)
        )
        self.conv2 = nn.Sequential(conv(outputs, outputs, middle, ONE), nn.BatchNorm3d(outputs))
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != ONE or inputs != outputs:
            self.downsample = nn.Sequential(convolution3d(inputs, outputs, ONE, stride=stride), nn.BatchNorm3d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, t, h, w] -> [N, outputs, t', h', w']: each side over its stride."""
        identity = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(self.conv2(self.conv1(x)) + identity)
        return out


def whole(inputs: int, outputs: int, _middle: int, stride: Three) -> nn.Module:
    """Make a 3x3x3 convolution: R3D's."""
    return convolution3d(inputs, outputs, (3, 3, 3), stride=stride)


def factorised(inputs: int, outputs: int, middle: int, stride: Three) -> nn.Module:
    """Make a 1x3x3 convolution over place, norm, ReLU, then 3x1x1 over time: R(2+1)D's."""
    over_time, down, across = stride
    return nn.Sequential(
        *unit3d(inputs, middle, (1, 3, 3), stride=(1, down, across)),
        convolution3d(middle, outputs, (3, 1, 1), stride=(over_time, 1, 1)),
    )


def flat(inputs: int, outputs: int, _middle: int, stride: Three) -> nn.Module:
    """Make a 1x3x3 convolution: the thin encoder's."""
    return convolution3d(inputs, outputs, (1, 3, 3), stride=stride)


class SlowOnly50(StagedTrunk):
    """SlowOnly-50, no classifier: 31.7 M parameters, 2048 channels, stride 2 in time, 32 in place.

    Its constants of colour are ImageNet's, as in MSCL's code.
    """

    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)
    channels = 2048

    def __init__(self, *, clip_frames: int = 8) -> None:
        super().__init__(clip_frames=clip_frames)
        names = ("conv", "bn")
        self.conv1 = conv_and_norm(3, 64, (5, 7, 7), stride=(2, 2, 2), names=names)
        add_bottlenecks(self, 64, over_time=(1, 1, 3, 3), names=names)
        he_init(self)
        for module in self.modules():  # each block begins as its shortcut
            if isinstance(module, Bottleneck):
                nn.init.zeros_(module.conv3.get_parameter("bn.weight"))

    def first(self, clips: Tensor) -> Tensor:
        """[N, 3, t, H, W] -> [N, 64, t/2, H/4, W/4]."""
        return pool_places(F.relu(self.conv1(clips), inplace=True))


class ThinResNet50(StagedTrunk):
    """The flow encoder for SlowOnly-50: 0.4 M parameters, 256 channels, strides 2 and 32.

    Constants of colour and `time_stride` as in ThinResNet18.
    """

    mean = (0.0, 0.0, 0.0)
    std = (1.0, 1.0, 1.0)
    channels = 256

    def __init__(self, *, clip_frames: int = 8, time_stride: int = 2) -> None:
        super().__init__(clip_frames=clip_frames)
        self.stem = flow_stem(8, time_stride=time_stride)
        add_bottlenecks(self, 8, over_time=(1, 1, 1, 1), names=("0", "1"))
        he_init(self)

    def first(self, clips: Tensor) -> Tensor:
        """[N, 3, t, H, W] -> [N, 8, t/2, H/4, W/4]."""
        return pool_places(self.stem(clips))


def pool_places(maps: Tensor) -> Tensor:
    """[N, C, t, h, w] -> [N, C, t, h/2, w/2]: the largest value of 3x3 places."""
    return F.max_pool3d(maps, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))


def add_bottlenecks(trunk: nn.Module, width: int, *, over_time: tuple[int, int, int, int], names: Names) -> None:
    """Add `layer1` to `layer4`: stages of bottlenecks, from the second on with a stride of 2.

    Args:
        trunk: What the stages are added to.
        width: Channels into the first stage; each stage doubles those of its bottlenecks.
        over_time: Size in time of the first convolution of each stage's blocks.
        names: The names of convolutions and norms, those of the published weights.
    """
    inputs = width
    for number, (depth, kernel) in enumerate(zip(DEPTHS, over_time, strict=True)):
        blocks = []
        for place in range(depth):
            stride = 2 if number > 0 and place == 0 else 1
            blocks.append(Bottleneck(inputs, width * 2**number, stride=stride, over_time=kernel, names=names))
            inputs = 4 * width * 2**number
        trunk.add_module(f"layer{number + 1}", nn.Sequential(*blocks))


class Bottleneck(nn.Module):
    """1x1x1 or 3x1x1, then 1x3x3, then 1x1x1 to four times the width; the stride is in place."""

    def __init__(self, inputs: int, width: int, *, stride: int, over_time: int, names: Names) -> None:
        super().__init__()
        outputs, steps = 4 * width, (1, stride, stride)
        self.conv1 = conv_and_norm(inputs, width, (over_time, 1, 1), names=names)
        self.conv2 = conv_and_norm(width, width, (1, 3, 3), stride=steps, names=names)
        self.conv3 = conv_and_norm(width, outputs, ONE, names=names)
        self.downsample = None
        if stride > 1 or inputs != outputs:
            self.downsample = conv_and_norm(inputs, outputs, ONE, stride=steps, names=names)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, t, h, w] -> [N, 4 width, t, h/stride, w/stride]."""
        identity = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.conv1(x), inplace=True)
        x = F.relu(self.conv2(x), inplace=True)
        return F.relu(self.conv3(x) + identity, inplace=True)


def conv_and_norm(inputs: int, outputs: int, size: Three, *, stride: Three = ONE, names: Names) -> nn.Sequential:
    """Make a convolution and its norm, under these names."""
    both = nn.Sequential()
    both.add_module(names[0], convolution3d(inputs, outputs, size, stride=stride))
    both.add_module(names[1], nn.BatchNorm3d(outputs))
    return both
