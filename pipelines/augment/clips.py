"""Make clips of decoded frames on the model's device: flip, resize, crop, jitter, normalise.

Colours are float32 in [0, 1], channels RGB at dimension -3. The colour operations follow the
reference code (alibaba-mmai-research/MoLo, `datasets/utils/transformations.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, reduce

from pipelines.augment.on_cpu import Target, Three, Windows, fill_unresized, scale_and_shift
from pipelines.clips.stream import Box
from pipelines.draw import Jitter
from pipelines.episodes.clip_views import View

Factor = float | torch.Tensor


def render(
    frames: Sequence[torch.Tensor],
    views: Sequence[View],
    *,
    mean: Three,
    std: Three,
    crop: int,
    resize: int | tuple[int, int],
    target: Target | None = None,
) -> torch.Tensor:
    """Make the clips of an episode: float32 [V, T, 3, crop, crop], normalised.

    The order is that of the reference: flip, resize, crop, jitter, normalise.

    Args:
        frames: One uint8 [R, h, w, 3] for each of the plan's reads, all on one device.
        views: V clips of one length T.
        mean: Mean of each colour.
        std: Standard deviation of each colour.
        crop: Side of the clips.
        resize: Side, or height and width, before the crop.
        target: Where the clips go; None: fresh memory.
    """
    size = (resize, resize) if isinstance(resize, int) else resize
    device, shape = frames[0].device, (len(views), len(views[0].indices), 3, crop, crop)
    target = target or Target()
    clips = target.empty(shape, device)
    unresized: list[int] = []  # clips on a CPU that are made frame by frame, in threads
    for numbers in _batches(views, device):
        chosen = [views[number] for number in numbers]
        if device.type == "cpu" and len(chosen) == 1 and chosen[0].box is None:
            unresized += numbers
            continue
        batch = _windows(frames[chosen[0].reads], chosen, crop=crop, size=size)  # in [0, 255]
        jitters = [view.jitter for view in chosen if view.jitter is not None]
        if jitters:
            batch = normalise(colour_jitter(batch.div_(255), jitters), mean, std)
        else:
            batch = normalise(batch, mean, std, white=255.0)
        clips.index_copy_(0, torch.tensor(numbers, device=device), batch)
    if unresized:
        pixels: list[Windows] = [list(each.numpy()) for each in frames]
        fill_unresized(clips, unresized, views, pixels, mean=mean, std=std, threads=target.threads)
    return clips


def _batches(views: Sequence[View], device: torch.device) -> Iterator[list[int]]:
    """Yield numbers of views that are worked on together: alike on a GPU, one by one on a CPU."""
    if device.type == "cpu":  # one clip fits the cache, a whole episode does not
        yield from ([number] for number in range(len(views)))
        return
    alike: dict[tuple[int, bool, bool], list[int]] = {}
    for number, view in enumerate(views):
        alike.setdefault((view.reads, view.box is None, view.jitter is None), []).append(number)
    yield from alike.values()


def _windows(frames: torch.Tensor, views: Sequence[View], *, crop: int, size: tuple[int, int]) -> torch.Tensor:
    """Gather, flip, resize and crop alike views: float32 [v, T, 3, crop, crop] in [0, 255]."""
    index = torch.tensor([place for view in views for place in view.indices], device=frames.device)
    clips = rearrange(frames.index_select(0, index), "(v t) h w c -> v t c h w", v=len(views))
    clips = _flip(clips.contiguous().to(torch.float32), [view.flip for view in views])
    boxes = [view.box for view in views if view.box is not None]
    if not boxes:
        return clips
    clips = resize_bilinear(clips, size)
    windows = [clip[..., y : y + crop, x : x + crop] for clip, (y, x) in zip(clips, boxes, strict=True)]
    return torch.stack(windows)


def _flip(clips: torch.Tensor, flips: list[bool]) -> torch.Tensor:
    """Mirror those clips of [v, T, 3, H, W] that `flips` [v] marks."""
    if not any(flips):
        return clips
    if all(flips):
        return clips.flip(-1)
    chosen = torch.tensor(flips, device=clips.device)[:, None, None, None, None]
    return torch.where(chosen, clips.flip(-1), clips)


def resize_bilinear(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize [..., C, H, W] to `size`, bilinear.

    Centres are half-pixel ones, there is no antialiasing, and the aspect is not kept.
    """
    flat = images.reshape(-1, *images.shape[-3:])
    resized = F.interpolate(flat, size, mode="bilinear", align_corners=False, antialias=False)
    return resized.reshape(*images.shape[:-2], *size)


def crop_resize(images: torch.Tensor, box: Box, *, size: int, flip: bool) -> torch.Tensor:
    """Cut `box` out of [..., C, H, W], resize it to size x size, and mirror it if asked.

    It is resized as `resize_bilinear` does.

    Whole numbers become float32 after the cut.
    """
    window = images[..., box.top : box.top + box.height, box.left : box.left + box.width]
    resized = resize_bilinear(window if window.is_floating_point() else window.float(), (size, size))
    return resized.flip(-1) if flip else resized


def greyscale(images: torch.Tensor) -> torch.Tensor:
    """Return the luminance [..., 1, H, W] of RGB images [..., 3, H, W]."""
    red, green, blue = images.unbind(-3)
    return (0.299 * red + 0.587 * green + 0.114 * blue).unsqueeze(-3)


def _blend(images: torch.Tensor, other: torch.Tensor, factor: Factor) -> torch.Tensor:
    """Take `factor` of images and 1 - factor of other, kept in [0, 1]."""
    return torch.lerp(other.expand_as(images), images, factor).clamp_(0, 1)


def brightness(images: torch.Tensor, factor: Factor) -> torch.Tensor:
    """Blend [..., 3, H, W] with black: factor 0 is black, 1 changes nothing."""
    return (factor * images).clamp(0, 1)


def contrast(images: torch.Tensor, factor: Factor) -> torch.Tensor:
    """Blend each frame [..., 3, H, W] with its mean luminance: factor 0 is that grey."""
    return _blend(images, reduce(greyscale(images), "... c h w -> ... c 1 1", "mean"), factor)


def saturation(images: torch.Tensor, factor: Factor) -> torch.Tensor:
    """Blend [..., 3, H, W] with its luminance: factor 0 is the grey image."""
    return _blend(images, greyscale(images), factor)


def hue(images: torch.Tensor, shift: Factor) -> torch.Tensor:
    """Turn the hue of [..., 3, H, W] by `shift` turns, saturation and value (HSV) kept."""
    red, green, blue = (images.narrow(-3, channel, 1) for channel in range(3))  # [..., 1, H, W]
    value, low = images.amax(-3, keepdim=True), images.amin(-3, keepdim=True)
    chroma = value - low
    # Of the six sectors of the colour wheel, two belong to the largest channel. Multiplied by
    # chroma, the place in them needs no division yet; grey has no chroma, and any hue.
    from_green = torch.where(value == green, 2 * chroma + blue - red, 4 * chroma + red - green)
    sector = torch.where(value == red, green - blue, from_green)  # chroma times the hue in sixths of a turn
    sixths = (sector / chroma.clamp(min=torch.finfo(images.dtype).tiny) + 6 * shift) % 6
    parts = [(sixths - 3).abs() - 1, 2 - (sixths - 2).abs(), 2 - (sixths - 4).abs()]
    return torch.cat(parts, -3).clamp_(0, 1).mul_(chroma).add_(low)


OPERATIONS: tuple[Callable[[torch.Tensor, Factor], torch.Tensor], ...] = (
    brightness,
    contrast,
    saturation,
    hue,
)


def colour_jitter(clips: torch.Tensor, jitters: Sequence[Jitter]) -> torch.Tensor:
    """Jitter clips [V, T, 3, H, W], each by its own factors and order, grey first where asked.

    At each of the four steps the clips that take the same operation go through it together.
    """
    clips = clips.clone()
    for number, jitter in enumerate(jitters):
        if jitter.grey:
            clips[number] = greyscale(clips[number])
    for step in range(len(OPERATIONS)):
        for place, operation in enumerate(OPERATIONS):
            numbers = [number for number, jitter in enumerate(jitters) if jitter.order[step] == place]
            if numbers:
                factors = [_factor(jitters[number], place) for number in numbers]
                factor = torch.tensor(factors, device=clips.device)[:, None, None, None, None]
                index = torch.tensor(numbers, device=clips.device)
                clips.index_copy_(0, index, operation(clips.index_select(0, index), factor))
    return clips


def _factor(jitter: Jitter, place: int) -> float:
    return (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)[place]


def normalise(images: torch.Tensor, mean: Three, std: Three, *, white: float = 1.0) -> torch.Tensor:
    """Return (images / white - mean) / std, a channel each.

    The images are [..., 3, H, W] with values in [0, white].
    """
    scale, shift = scale_and_shift(mean, std, white, images)
    return torch.addcmul(shift, images, scale)
