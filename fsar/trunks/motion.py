"""Trunks that read motion: displacement maps [V, T, c, 32, 32] of T segments of each video."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from fsar.trunks.base import Features, Trunk
from fsar.trunks.tiny import GRID
from shards_spec.errors import ConfigError

STILL = 0.02  # pixels of the stored field: added to a clip's size, so that noise of a still one stays small
WIDTHS = (32, 64, 64)  # channels of the maps of TinyFlow
ENLARGED = 4  # factor from motion maps to the input of a trunk made for pictures: 128 x 128


def unit_motion(clips: Tensor) -> Tensor:
    """Divide clips [V, T, c, h, w] by the root mean square of each whole clip."""
    size = clips.square().mean(dim=(1, 2, 3, 4), keepdim=True).sqrt()
    return clips / (size + STILL)


def grid_means(clips: Tensor) -> Tensor:
    """Average clips [V, T, c, h, w] over a 4 x 4 grid: [V, T, 16 c], channel by channel."""
    steps = clips.shape[1]
    cells = F.adaptive_avg_pool2d(rearrange(clips, "v t c h w -> (v t) c h w"), GRID)
    return rearrange(cells, "(v t) c h w -> v t (c h w)", t=steps)


class FlowGrid(Trunk):
    """The displacement itself, as 4 x 4 means of each segment: nothing to learn.

    Args:
        inputs: Channels of the motion: 2 of flow, 3 of differences.
    """

    stream = "motion"
    has_maps = False

    def __init__(self, inputs: int = 2) -> None:
        super().__init__()
        self.inputs, self.channels = inputs, inputs * GRID * GRID
        self.register_buffer("place", torch.zeros(0), persistent=False)  # tells the device

    def forward(self, clips: Tensor) -> Features:
        """[V, T, c, h, w] -> pooled [V, T, 16 c]."""
        return Features(None, grid_means(clips))


class TinyFlow(Trunk):
    """Half-waves of the motion, three convolutions, a 4 x 4 grid of means, and a linear map.

    A half-wave is the positive or the negative part of a channel.  A clip is divided by its root
    mean square.  Its grid of displacements stands beside what is learned, each at the same length
    over the clip.  So kinds of motion that training has not seen are not lost.

    Args:
        inputs: Channels of the motion: 2 of flow, 3 of differences.
    """

    stream = "motion"

    def __init__(self, inputs: int = 2) -> None:
        super().__init__()
        self.inputs, self.learned = inputs, WIDTHS[-1]
        self.channels = self.learned + inputs * GRID * GRID
        one, two, three = WIDTHS
        self.stages = nn.Sequential(
            *unit(2 * inputs, one, stride=2), *unit(one, two, stride=2), *unit(two, three, stride=1)
        )
        self.grid = nn.Linear(three * GRID * GRID, self.learned)

    def give_maps(self) -> None:
        """Leave the displacements out: features are then as wide as the maps."""
        self.channels = self.learned

    def forward(self, clips: Tensor) -> Features:
        """[V, T, c, h, w] -> maps [V, T, 64, 4, 4] and pooled [V, T, C]."""
        steps = clips.shape[1]
        maps = self.frame_maps(rearrange(unit_motion(clips), "v t c h w -> (v t) c h w"))
        tokens = rearrange(self.pool(maps), "(v t) c -> v t c", t=steps)
        parts = [tokens] if self.channels == self.learned else [tokens, grid_means(clips)]
        pooled = torch.cat([equal_length(part, self.channels / len(parts)) for part in parts], dim=2)
        return Features(rearrange(maps, "(v t) c h w -> v t c h w", t=steps), pooled)

    def frame_maps(self, frames: Tensor) -> Tensor:
        """[N, c, h, w] -> [N, 64, 4, 4]."""
        waves = torch.cat([frames.clamp(min=0), (-frames).clamp(min=0)], dim=1)
        return F.adaptive_avg_pool2d(self.part(0, self.stages, waves), GRID)

    def pool(self, maps: Tensor) -> Tensor:
        """[N, 64, h, w] -> [N, 64]."""
        pooled: Tensor = self.grid(F.adaptive_avg_pool2d(maps, GRID).flatten(1))
        return pooled


def unit(inputs: int, outputs: int, *, stride: int) -> list[nn.Module]:
    """Make a 3x3 convolution, its norm, and a ReLU."""
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


def equal_length(tokens: Tensor, width: float) -> Tensor:
    """Scale tokens [V, T, C] so that their mean square over the clip is `width` / C; zeros stay."""
    squares = tokens.square().sum(dim=(1, 2), keepdim=True)
    wanted = width * tokens.shape[1]
    return tokens * (wanted / (squares + 1e-6)).sqrt()


def reading_motion(trunk: Trunk, name: str, inputs: int) -> Trunk:
    """Make a trunk of pictures read motion: its first convolution gets `inputs` channels.

    Its weights become their mean over colours, times 3 / inputs, so that responses keep their size
    (cross-modality initialisation, Wang et al., ECCV 2016, section 3.2).

    Raises:
        ConfigError: it reads clips, or begins otherwise.
    """
    first = next(((path, m) for path, m in trunk.named_modules() if isinstance(m, nn.Conv2d)), None)
    if first is None or not trunk.any_size:
        raise ConfigError(f"trunk {name} cannot read motion: choose tiny-flow, tiny or a ResNet")
    path, old = first
    geometry: dict[str, Any] = {name: getattr(old, name) for name in ("kernel_size", "stride", "padding")}
    new = nn.Conv2d(inputs, old.out_channels, **geometry, bias=old.bias is not None)
    with torch.no_grad():
        new.weight.copy_(old.weight.mean(dim=1, keepdim=True).expand_as(new.weight) * (old.in_channels / inputs))
        if old.bias is not None and new.bias is not None:
            new.bias.copy_(old.bias)
    trunk.set_submodule(path, new)
    trunk.stream, trunk.inputs = "motion", inputs
    trunk.register_forward_pre_hook(_as_pictures)
    return trunk


def _as_pictures(_trunk: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """Make what a trunk of pictures reads of clips [V, T, c, h, w]: of unit size, and enlarged."""
    clips = unit_motion(inputs[0])
    steps, size = clips.shape[1], tuple(ENLARGED * side for side in clips.shape[-2:])
    flat = rearrange(clips, "v t c h w -> (v t) c h w")
    large = F.interpolate(flat, size, mode="bilinear", align_corners=False)
    return rearrange(large, "(v t) c h w -> v t c h w", t=steps)
