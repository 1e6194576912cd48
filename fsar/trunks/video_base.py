"""What every video trunk offers: maps over time and place of short clips, one clip a segment."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from fsar.trunks.base import Features, Trunk
from shards_spec.errors import ConfigError


def volume_mean(maps: Tensor) -> Tensor:
    """[N, C, t, h, w] -> [N, C]: mean over times and places."""
    return maps.mean(dim=(-3, -2, -1))


def he_init(module: nn.Module) -> None:
    """Weights of all 3D convolutions below a module from Kaiming's normal distribution, fan-out, and biases 0."""
    for part in module.modules():
        if isinstance(part, nn.Conv3d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)


class VideoTrunk(Trunk):
    """Clips of several frames in, features out; a video trunk defines `levels`.

    `clip_frames` is the length of the clips it is meant for; it reads other lengths too.  The constants of colour are
    those of torchvision's video models, from Kinetics-400, unless a trunk says otherwise.
    """

    has_maps = False
    mean = (0.43216, 0.394666, 0.37645)
    std = (0.22803, 0.22145, 0.216989)

    def __init__(self, *, clip_frames: int) -> None:
        super().__init__()
        if clip_frames < 1:
            raise ConfigError(f"clip_frames={clip_frames}: a clip has one frame at least")
        self.clip_frames = clip_frames

    def levels(self, clips: Tensor) -> list[Tensor]:
        """[N, 3, t, H, W] -> the maps [N, C, t', h, w] of four stages, the finest first."""
        raise NotImplementedError

    def clip_maps(self, clips: Tensor) -> Tensor:
        """[N, 3, t, H, W] -> the last maps [N, C, t', h, w]."""
        return self.levels(clips)[-1]

    def forward(self, clips: Tensor) -> Features:
        """[V, S, clip, 3, H, W] -> pooled [V, S, C], a vector a segment; ConfigError for frames without clips.

        It offers no maps: theirs are of a clip, and methods that use maps expect those of a frame.
        """
        if clips.ndim != 6:
            raise ConfigError(
                f"{type(self).__name__} reads clips [V, S, clip, 3, H, W], not {list(clips.shape)}; choose the frame "
                f"rule segment_clips, or a trunk that reads single frames"
            )
        segments = clips.shape[1]
        pooled = volume_mean(self.clip_maps(rearrange(clips, "v s t c h w -> (v s) c t h w")))
        return Features(None, rearrange(pooled, "(v s) c -> v s c", s=segments))


class StagedTrunk(VideoTrunk):
    """A residual video trunk: `first` and then `layer1` to `layer4`."""

    def first(self, clips: Tensor) -> Tensor:
        """[N, 3, t, H, W] -> [N, C, t', h, w]: what comes before the first residual stage."""
        raise NotImplementedError

    def levels(self, clips: Tensor) -> list[Tensor]:
        """[N, 3, t, H, W] -> the maps [N, C, t', h, w] of the four stages."""
        x = self.part(0, self.first, clips)
        found = []
        for stage in (1, 2, 3, 4):
            x = self.part(stage, self.get_submodule(f"layer{stage}"), x)
            found.append(x)
        return found
