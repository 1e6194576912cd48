"""Class-agnostic activation maps of a trunk: where in a clip it responds, and pictures of that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import cv2
import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F

from fsar.probing.loader import ProbeLoader
from fsar.trunks import Trunk, VideoTrunk
from pipelines.augment.clips import normalise
from pipelines.clips.labelled import ProbeRules, uniform_clips
from shards_spec import ShardSet
from shards_spec.errors import ConfigError
from shards_spec.peek.sheet import Block, Row, draw_sheet
from shards_spec.pictures import segment_centres

Pixels = NDArray[np.uint8]

CLIPS, MIDDLE = 3, 1  # of three uniform clips of a video the middle one is shown
SHOWN = 8  # frames of a clip
STRENGTH = 0.5  # weight of the colours over the frame


@torch.no_grad()
def activation_maps(trunk: Trunk, clips: Tensor) -> Tensor:
    """Compute how strongly a trunk responds at each place of a clip.

    The map is the mean over channels of the trunk's last maps, in the size of the clip. It is
    scaled so that each clip has a 0 and a 1.

    Source: Baek et al., PsyNet, AAAI 2020 (class-agnostic activation map). FIMA (ACM Multimedia
    2023) shows its trunks so.

    Args:
        trunk: The trunk; it is left in the mode it had.
        clips: [N, T, 3, H, W] normalised frames.

    Returns:
        [N, T, H, W] in [0, 1].

    Raises:
        ConfigError: the trunk has no maps.
    """
    was_training = trunk.training
    trunk.eval()
    if isinstance(trunk, VideoTrunk):
        last = trunk.clip_maps(rearrange(clips, "n t c h w -> n c t h w"))  # [N, C, t, h, w]
        strength = last.float().mean(dim=1)
    else:
        maps = trunk(clips).maps  # [N, T, C, h, w]
        if maps is None:
            raise ConfigError(f"{type(trunk).__name__} has no maps to show: choose another trunk")
        strength = maps.float().mean(dim=2)
    trunk.train(was_training)
    size = clips.shape[1], *clips.shape[-2:]
    strength = F.interpolate(strength[:, None], size, mode="trilinear", align_corners=False)[:, 0]
    low, high = (each[:, None, None, None] for each in strength.flatten(1).aminmax(dim=1))
    return (strength - low) / (high - low).clamp(min=torch.finfo(strength.dtype).tiny)


def overlay(frame: Pixels, strength: NDArray[np.float32]) -> Pixels:
    """Colour a frame [h, w, 3] by a map [h, w]: 0 is blue, the weakest response, and 1 is red."""
    levels = np.rint(255 * strength).astype(np.uint8)
    colours = cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_TURBO), cv2.COLOR_BGR2RGB)
    mixed: Pixels = np.asarray(cv2.addWeighted(colours, STRENGTH, frame, 1 - STRENGTH, 0), dtype=np.uint8)
    return mixed


def activation_sheet(
    title: str,
    shards: ShardSet,
    rows: Sequence[int],
    trunks: Mapping[str, Trunk],
    rules: ProbeRules,
    *,
    device: torch.device,
) -> Image:
    """Draw the middle clip of each video, and under it the map of each trunk.

    Args:
        title: Title of the sheet.
        shards: The opened shard set.
        rows: Catalogue rows of the videos.
        trunks: Name that the sheet shows -> trunk on the device.
        rules: How clips are cut.
        device: The device of the trunks.

    Raises:
        ConfigError: a trunk has no maps; ShardError: a frame cannot be read.
    """
    rules = replace(rules, clips=CLIPS)
    stream = uniform_clips(shards, rows, rules)
    first = next(iter(trunks.values()))
    blocks = []
    with ProbeLoader(shards, rules, first, device=device, executor="portable") as loader:
        for place, clips in enumerate(loader.uniform(rows)):
            # The loader normalises for the first trunk, and others may normalise otherwise:
            # colours are restored here and normalised again for each.
            mean, std = (torch.tensor(three, device=device)[:, None, None] for three in (first.mean, first.std))
            clip = (clips[MIDDLE : MIDDLE + 1] * std + mean).clamp(0, 1)  # [1, T, 3, S, S]
            plan = stream.plan(place)
            numbers = plan.reads[0].frames[list(plan.views[MIDDLE].indices)].tolist()
            blocks.append(_block(shards, rows[place], clip, numbers, trunks))
    lines = ("mean over channels of the last maps, from the weakest (blue) to the strongest (red) of each clip",)
    return draw_sheet(title, lines, blocks)


def _block(shards: ShardSet, row: int, clip: Tensor, numbers: Sequence[int], trunks: Mapping[str, Trunk]) -> Block:
    shown = segment_centres(clip.shape[1], SHOWN).tolist()
    frames = rearrange(255 * clip[0, shown], "t c h w -> t h w c").round().byte().cpu().numpy()
    under = [str(numbers[place]) for place in shown]
    sheet_rows = [Row(("frames",), list(frames), under)]
    for name, trunk in trunks.items():
        maps = activation_maps(trunk, normalise(clip, trunk.mean, trunk.std))[0, shown].cpu().numpy()
        sheet_rows.append(Row(tuple(name.split()), list(_overlaid(frames, maps)), under))
    label = shards.dataset.classes[int(shards.labels[row])]
    return Block(shards.name(row), f"class {label}", (1, 1), sheet_rows)


def _overlaid(frames: Pixels, maps: NDArray[np.float32]) -> Iterator[Pixels]:
    return (overlay(frame, strength) for frame, strength in zip(frames, maps, strict=True))


def choose_by_class(shards: ShardSet, rows: NDArray[np.int64], count: int, *, seed: int) -> list[int]:
    """Choose `count` of the videos `rows` at random, one of each class before a second of any."""
    shuffled = np.random.default_rng(seed).permutation(rows)
    turns: dict[int, int] = {}
    order = []
    for label in shards.labels[shuffled].tolist():
        turns[label] = turns.get(label, -1) + 1
        order.append(turns[label])
    chosen: list[int] = shuffled[np.argsort(order, kind="stable")][:count].tolist()
    return chosen
