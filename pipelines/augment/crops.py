"""Many crops at once: boxes of any size, cut out of decoded frames and resized on their device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from einops import rearrange

from pipelines.augment.clips import crop_resize
from pipelines.clips.stream import CropView

TOGETHER = 1 << 27  # values of crops that are made at a time on a GPU: 0.5 GB, and six times that in between


def crop_views(frames: Sequence[torch.Tensor], views: Sequence[CropView], *, size: int) -> torch.Tensor:
    """Make the clips of a plan: float32 [V, T, C, size, size] in the units of the frames, flipped as the views say.

    frames: [R, h, w, C] for each of the plan's reads, all on one device; views: of one length T.  A box is resized as
    `resize_bilinear` does it, by itself: what lies beside it has no part in its border.
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
    """Fill clips [V, T, C, size, size] with those of the views, in a few operations however many they are."""
    for numbers in _batches(views, TOGETHER // out[0].numel()):
        chosen = [views[number] for number in numbers]
        out.index_copy_(0, _on(out.device, numbers), _gathered(frames[chosen[0].reads], chosen, size=out.shape[-1]))


def _batches(views: Sequence[CropView], most: int) -> Iterator[list[int]]:
    """Numbers of views of the same reads, up to `most` at a time."""
    alike: dict[int, list[int]] = {}
    for number, view in enumerate(views):
        alike.setdefault(view.reads, []).append(number)
    for numbers in alike.values():
        for start in range(0, len(numbers), max(most, 1)):
            yield numbers[start : start + max(most, 1)]


def _gathered(frames: torch.Tensor, views: Sequence[CropView], *, size: int) -> torch.Tensor:
    """The clips [v, T, C, size, size] of views of frames [R, h, w, C]: four pixels are mixed for each of theirs."""
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
    """Numbers on the device, without waiting for it."""
    return torch.tensor(values).to(device, non_blocking=True)


def _places(first: torch.Tensor, length: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
    """Boxes' first pixels [v] and lengths [v] along an axis -> the pixels [v, size] before and after, and the share."""
    scale = (length / size)[:, None]  # [v, 1]
    exact = ((torch.arange(size, device=first.device) + 0.5) * scale - 0.5).clamp(min=0)
    low = exact.long()
    high = torch.minimum(low + 1, length[:, None] - 1)
    return first[:, None] + low, first[:, None] + high, exact - low
