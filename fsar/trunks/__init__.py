"""Trunks: networks from frames to features, by name."""

from __future__ import annotations

from collections.abc import Callable

from fsar.trunks.base import ALL_PARTS, Features, Stream, Trunk, VideoTrunk, parts_to_recompute
from fsar.trunks.clip import ClipResNet, ClipViT
from fsar.trunks.efficientnet import EfficientNetLite0
from fsar.trunks.i3d import I3D
from fsar.trunks.motion import FlowGrid, TinyFlow, reading_motion
from fsar.trunks.resnet import resnet18, resnet34, resnet50
from fsar.trunks.tiny import Tiny3D, TinyTrunk
from fsar.trunks.video import SlowOnly50, ThinResNet18, ThinResNet50, r2plus1d18, r3d18
from shards_spec.errors import ConfigError, suggest

TRUNKS: dict[str, Callable[[], Trunk]] = {
    "clip-rn50": ClipResNet,
    "clip-vit-b16": ClipViT,
    "efficientnet-lite0": EfficientNetLite0,
    "flow-grid": FlowGrid,
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
    "tiny-flow": TinyFlow,
    "tiny3d": Tiny3D,
}
# Trunks that are made for motion; their argument is the number of its channels
MOTION_TRUNKS: dict[str, Callable[[int], Trunk]] = {"flow-grid": FlowGrid, "tiny-flow": TinyFlow}


def create_trunk(name: str) -> Trunk:
    """Make the trunk of a name, with random weights.

    Raises:
        ConfigError: there is no such trunk; it offers the nearest name.
    """
    if name not in TRUNKS:
        raise ConfigError(f'there is no trunk "{name}"; {suggest(name, TRUNKS)}')
    return TRUNKS[name]()


def create_motion_trunk(name: str, inputs: int = 2) -> Trunk:
    """Make the trunk of a name that reads motion of `inputs` channels, with random weights.

    A trunk for pictures is changed by `reading_motion`; load its weights of pictures before that.

    Raises:
        ConfigError: there is no such trunk, or it cannot read motion.
    """
    if name in MOTION_TRUNKS:
        return MOTION_TRUNKS[name](inputs)
    return reading_motion(create_trunk(name), name, inputs)


__all__ = [
    "ALL_PARTS",
    "MOTION_TRUNKS",
    "TRUNKS",
    "Features",
    "Stream",
    "Trunk",
    "VideoTrunk",
    "create_motion_trunk",
    "create_trunk",
    "parts_to_recompute",
    "reading_motion",
]
