"""Define what every trunk offers: maps and a pooled feature a frame, or a feature a clip."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from shards_spec.errors import ConfigError

ALL_PARTS = sys.maxsize
Three = tuple[int, int, int]  # time, height, width
Stream = Literal["frames", "motion"]  # what a model reads of a video


@dataclass(frozen=True)
class Features:
    """Output of a trunk for V videos of T frames."""

    maps: Tensor | None  # [V, T, C, h, w]; None where only pooled features are known
    pooled: Tensor  # [V, T, C]


class Trunk(nn.Module):
    """Frames in, features out; a trunk defines `frame_maps` and may define its own `pool`.

    Attributes:
        channels: Width of its features.
        clip_frames: Frames that it reads at a time.
        stream: It reads "frames", or "motion" as displacement maps.
        inputs: Channels of these.
        any_size: It reads pictures of any size.
        has_maps: Its features come with the maps of each frame.
        mean: Constants that its frames are normalised with.
        std: The same.
        memory_format: Order in memory of maps, where no run decides it.
        recomputes: Number of its first parts, which hold the most memory, that compute their inner
            values again for the backward pass instead of keeping them.
        REFERENCE_NAMES: Our name prefix -> its name below "backbone." in published state dicts;
            empty where none was published.
    """

    channels: int
    clip_frames: int = 1
    stream: Stream = "frames"
    inputs: int = 3
    any_size: ClassVar[bool] = True
    has_maps: ClassVar[bool] = True
    mean: tuple[float, float, float] = (0.45, 0.45, 0.45)
    std: tuple[float, float, float] = (0.225, 0.225, 0.225)
    # Channels last is faster on a CPU, but its BatchNorm sums are less exact in training (about
    # 1e-4 at 224 x 224): trunks that are compared with published results value by value are better
    # off without.
    memory_format: torch.memory_format = torch.contiguous_format
    recomputes: int = 0
    REFERENCE_NAMES: ClassVar[Mapping[str, str]] = {}

    def forward(self, clips: Tensor) -> Features:
        """[V, T, 3, H, W] -> maps [V, T, C, h, w] and pooled [V, T, C]."""
        steps = clips.shape[1]
        frames = rearrange(clips, "v t c h w -> (v t) c h w")
        # Channels last makes evaluation on a CPU a third faster or more; BatchNorm adds nothing up
        # there, so nothing is lost.
        fast = frames.device.type == "cpu" and not self.training
        maps = self.frame_maps(frames.contiguous(memory_format=torch.channels_last if fast else self.memory_format))
        pooled = self.pool(maps)
        return Features(
            rearrange(maps, "(v t) c h w -> v t c h w", t=steps),
            rearrange(pooled, "(v t) c -> v t c", t=steps),
        )

    def give_maps(self) -> None:
        """Make maps and pooled features equally wide, for a method that reads maps."""

    def frame_maps(self, frames: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, C, h, w]."""
        raise NotImplementedError

    def pool(self, maps: Tensor) -> Tensor:
        """[N, C, h, w] -> [N, C]; methods pool maps of their own with it too."""
        return mean_pool(maps)

    def part(self, number: int, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Compute part `number` (from 0) at x; see `recomputes`. A part has no dropout."""
        if not (number < self.recomputes and self.training and torch.is_grad_enabled()):
            return function(x)
        out: Tensor = checkpoint(
            function,
            x,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), untracked(self)),
        )
        return out


class VideoTrunk(Trunk):
    """Clips of several frames in, features out; a video trunk defines `levels`.

    `clip_frames` is the length of the clips it is meant for; it reads other lengths too. Its
    constants of colour are those of torchvision's video models, from Kinetics-400, unless a trunk
    says otherwise.

    Raises:
        ConfigError: `clip_frames` is below 1.
    """

    has_maps = False
    any_size = False
    mean = (0.43216, 0.394666, 0.37645)
    std = (0.22803, 0.22145, 0.216989)

    def __init__(self, *, clip_frames: int) -> None:
        super().__init__()
        if clip_frames < 1:
            raise ConfigError(f"clip_frames={clip_frames}: a clip has one frame at least")
        self.clip_frames = clip_frames

    def forward(self, clips: Tensor) -> Features:
        """[V, S, clip, 3, H, W] -> pooled [V, S, C], a vector a segment.

        It offers no maps: its maps are those of a clip, and methods that use maps expect those of a
        frame.

        Raises:
            ConfigError: frames are not in clips.
        """
        if clips.ndim != 6:
            raise ConfigError(
                f"{type(self).__name__} reads clips [V, S, clip, 3, H, W], not {list(clips.shape)}; choose the frame "
                f"rule segment_clips, or a trunk that reads single frames"
            )
        segments = clips.shape[1]
        pooled = volume_mean(self.clip_maps(rearrange(clips, "v s t c h w -> (v s) c t h w")))
        return Features(None, rearrange(pooled, "(v s) c -> v s c", s=segments))

    def clip_maps(self, clips: Tensor) -> Tensor:
        """[N, 3, t, H, W] -> the last maps [N, C, t', h, w]."""
        return self.levels(clips)[-1]

    def levels(self, clips: Tensor) -> list[Tensor]:
        """[N, 3, t, H, W] -> the maps [N, C, t', h, w] of four stages, the finest first."""
        raise NotImplementedError


class StagedTrunk(VideoTrunk):
    """A residual video trunk: `first` and then `layer1` to `layer4`."""

    def levels(self, clips: Tensor) -> list[Tensor]:
        """[N, 3, t, H, W] -> the maps [N, C, t', h, w] of the four stages."""
        x = self.part(0, self.first, clips)
        found = []
        for stage in (1, 2, 3, 4):
            x = self.part(stage, self.get_submodule(f"layer{stage}"), x)
            found.append(x)
        return found

    def first(self, clips: Tensor) -> Tensor:
        """[N, 3, t, H, W] -> [N, C, t', h, w]: the layers before the first residual stage."""
        raise NotImplementedError


def convolution3d(inputs: int, outputs: int, size: Three, *, stride: Three = (1, 1, 1)) -> nn.Conv3d:
    """Make a 3D convolution without bias that keeps the size at stride 1."""
    padding = (size[0] // 2, size[1] // 2, size[2] // 2)
    return nn.Conv3d(inputs, outputs, size, stride=stride, padding=padding, bias=False)


def unit3d(inputs: int, outputs: int, size: Three, *, stride: Three = (1, 1, 1)) -> list[nn.Module]:
    """Make a 3D convolution, its norm, and a ReLU."""
    conv = convolution3d(inputs, outputs, size, stride=stride)
    return [conv, nn.BatchNorm3d(outputs), nn.ReLU(inplace=True)]


def he_init(module: nn.Module) -> None:
    """Draw the weights of all 3D convolutions: Kaiming normal, fan-out; biases are 0."""
    for part in module.modules():
        if isinstance(part, nn.Conv3d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def mean_pool(maps: Tensor) -> Tensor:
    """[N, C, h, w] -> [N, C]: mean over places."""
    return maps.mean(dim=(-2, -1))


def volume_mean(maps: Tensor) -> Tensor:
    """[N, C, t, h, w] -> [N, C]: mean over times and places."""
    return maps.mean(dim=(-3, -2, -1))


def parts_to_recompute(*, all_parts: bool, first_parts: int) -> int:
    """Choose `Trunk.recomputes`: a configuration's number of first parts, else all or none."""
    return first_parts or (ALL_PARTS if all_parts else 0)


@contextmanager
def untracked(module: nn.Module) -> Iterator[None]:
    """Leave running statistics of BatchNorm as they are, while it normalises by the batch.

    A part that is computed again would update them twice. They are updated with a momentum of 0 and
    not switched off: otherwise autograd would keep fewer tensors than the first time, and refuse.
    """
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches
