"""Make many crops at once: boxes of any size, cut out of frames and resized on their device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from einops import rearrange

from pipelines.augment.clips import crop_resize
from pipelines.clips.stream import CropView

TOGETHER = 1 << 27  # values of crops that are made at a time on a GPU: 0.5 GB, and six times that in between


def crop_views(frames: Sequence[torch.Tensor], views: Sequence[CropView], *, size: int) -> torch.Tensor:
    """Make the clips of a plan: float32 [V, T, C, size, size] in the units of the frames.

    Views say which are mirrored. A box is resized by itself, as `resize_bilinear` does it: pixels
    around it have no part in its border.

    Args:
        frames: [R, h, w, C] for each of the plan's reads, all on one device.
        views: V clips of one length T.
        size: Side of the clips.
    """
    first, channels = frames[views[0].reads], frames[views[0].reads].shape[-1]
    steps = len(views[0].indices)
    clips = torch.empty(len(views), steps, channels, size, size, device=first.device)
    if first.device.type == "cpu":  # one clip fits the cache
        for number, view in enumerate(views):
            images = rearrange(frames[view.reads][list(view.indices)], "t h w c -> t c h w")
            clips[number] = crop_resize(images, view.box, size=size, flip=view.flip)
        return clips
    crops_together(frames, views, out=clips)
    return clips


def crops_together(frames: Sequence[torch.Tensor], views: Sequence[CropView], *, out: torch.Tensor) -> None:
    """Fill clips [V, T, C, size, size] in a few operations, however many they are.

    `F.interpolate` takes boxes of one size at a time, and these all differ: so four pixels are
    gathered for each.
    """
    for numbers in _batches(views, TOGETHER // out[0].numel()):
        chosen = [views[number] for number in numbers]
        out.index_copy_(0, _on(out.device, numbers), _gathered(frames[chosen[0].reads], chosen, size=out.shape[-1]))


def _batches(views: Sequence[CropView], most: int) -> Iterator[list[int]]:
    """Yield the numbers of views of the same reads, up to `most` at a time."""
    alike: dict[int, list[int]] = {}
    for number, view in enumerate(views):
        alike.setdefault(view.reads, []).append(number)
    for numbers in alike.values():
        for start in range(0, len(numbers), max(most, 1)):
            yield numbers[start : start + max(most, 1)]


def _gathered(frames: torch.Tensor, views: Sequence[CropView], *, size: int) -> torch.Tensor:
    """Make the clips [v, T, C, size, size] of views of frames [R, h, w, C].

    Four pixels are mixed for each of theirs.
    """
    device = frames.device
    index = _on(device, [view.indices for view in views])[:, :, None, None]  # [v, T, 1, 1]
    boxes = _on(device, [view.box for view in views]).T  # [4, v]
    flips = _on(device, [view.flip for view in views])
    top, bottom, down = _places(boxes[0], boxes[2], size)  # [v, size] each
    left, right, across = (torch.where(flips[:, None], x.flip(1), x) for x in _places(boxes[1], boxes[3], size))

    def corner(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return frames[index, rows[:, None, :, None], columns[:, None, None, :]].float()  # [v, T, size, size, C]

    across, down = across[:, None, None, :, None], down[:, None, :, None, None]
    upper = torch.lerp(corner(top, left), corner(top, right), across)
    lower = torch.lerp(corner(bottom, left), corner(bottom, right), across)
    return rearrange(torch.lerp(upper, lower, down), "v t h w c -> v t c h w")


def _on(device: torch.device, values: Sequence[Any]) -> torch.Tensor:
    """Put numbers on the device, without waiting for it."""
    return torch.tensor(values).to(device, non_blocking=True)


def _places(first: torch.Tensor, length: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
    """Return pixels [v, size] before and after each place along an axis, and the share of the last.

    Args:
        first: [v] first pixel of each box.
        length: [v] its pixels.
        size: Side of the crops.
    """
    scale = (length / size)[:, None]  # [v, 1]
    # half-pixel centres, and no place before the first one: as `F.interpolate` without aligned
    # corners has it
    exact = ((torch.arange(size, device=first.device) + 0.5) * scale - 0.5).clamp(min=0)
    low = exact.long()
    high = torch.minimum(low + 1, length[:, None] - 1)
    return first[:, None] + low, first[:, None] + high, exact - low
