"""Trunks: networks from frames to features, by name."""

from __future__ import annotations

from collections.abc import Callable

from fsar.trunks.base import ALL_PARTS, Features, Trunk, VideoTrunk, parts_to_recompute
from fsar.trunks.clip import ClipResNet, ClipViT
from fsar.trunks.efficientnet import EfficientNetLite0
from fsar.trunks.i3d import I3D
from fsar.trunks.resnet import resnet18, resnet34, resnet50
from fsar.trunks.tiny import Tiny3D, TinyTrunk
from fsar.trunks.video import SlowOnly50, ThinResNet18, ThinResNet50, r2plus1d18, r3d18
from shards_spec.errors import ConfigError, suggest

TRUNKS: dict[str, Callable[[], Trunk]] = {
    "clip-rn50": ClipResNet,
    "clip-vit-b16": ClipViT,
    "efficientnet-lite0": EfficientNetLite0,
    "i3d": I3D,
    "r2d18": ThinResNet18,
    "r2d50": ThinResNet50,
    "r2plus1d18": r2plus1d18,
    "r3d18": r3d18,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "slowonly50": SlowOnly50,
    "tiny": TinyTrunk,
    "tiny3d": Tiny3D,
}


def create_trunk(name: str) -> Trunk:
    """Make the trunk of a name, with random weights.

    Raises:
        ConfigError: there is no such trunk; it offers the nearest name.
    """
    if name not in TRUNKS:
        raise ConfigError(f'there is no trunk "{name}"; {suggest(name, TRUNKS)}')
    return TRUNKS[name]()


__all__ = ["ALL_PARTS", "TRUNKS", "Features", "Trunk", "VideoTrunk", "create_trunk", "parts_to_recompute"]
