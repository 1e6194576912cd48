"""Encoders of colour-coded flow: a quarter of the usual width and no kernel over time (MSCL, arXiv 2208.06105).

Published code: megvii-research/MSCL.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from fsar.trunks.slowonly import stages
from fsar.trunks.video import VideoResNet18
from fsar.trunks.video_base import StagedTrunk, he_init

Three = tuple[int, int, int]


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
