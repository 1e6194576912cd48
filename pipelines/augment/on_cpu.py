"""Make clips on a CPU frame by frame, with OpenCV, in memory that is used again.

A frame goes through all of its operations while it is in the cache, and each of its values is
written once. The operations are those of `pipelines.augment.clips`; a frame of 224 x 224 takes a
fifth of torch's time for them.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipelines.draw import Jitter
from pipelines.episodes.clip_views import View

Three = tuple[float, float, float]
Pixels = npt.NDArray[np.uint8]
Windows = Sequence[Pixels]  # uint8 [h, w, 3] each
Values = npt.NDArray[np.float32]
Matrix = npt.NDArray[np.float64]

MOST_KEPT = 8  # buffers; a consumer that keeps more episodes than that gets fresh memory
HELD_BY_US = 2  # references to a free buffer: the list's, and that of the call that counts
LEAST_SHARE = 1 << 21  # values a thread: to start one costs as much as to write some hundred thousand
LEAST_COLOURS = 1 << 20  # the same where colours are jittered or blurred, which takes longer a value
TOGETHER = 4  # frames whose channels are parted at a time: their bytes fit the cache of a core
COLOURS = (np.arange(256, dtype=np.float32) / np.float32(255))[None]  # [1, 256] the colour of each byte
LUMINANCE = np.array([0.299, 0.587, 0.114])
TURN = 360.0  # OpenCV's hue is in degrees
FAINT = 1e-8  # taps of a blur below this are no more than rounding


class ClipBuffers:
    """Memory of tensors of one type on the CPU, reused once nobody holds a view of it.

    Fresh pages cost as much as filling them: the system clears each of them first. Several threads
    may take memory at a time.
    """

    def __init__(self, dtype: npt.DTypeLike = np.float32) -> None:
        self._dtype = dtype
        self._arrays: list[np.ndarray[tuple[int], Any]] = []
        self._lock = threading.Lock()

    def take(self, *shape: int) -> Tensor:
        """Return a tensor of that shape; its content is undefined."""
        size = math.prod(shape)
        with self._lock:
            for number in range(len(self._arrays)):  # by number: a loop variable would be one more reference
                fits = size <= self._arrays[number].size <= 2 * size
                # every tensor made of an array, and every view of that tensor, holds a reference to
                # the array
                if fits and sys.getrefcount(self._arrays[number]) == HELD_BY_US:
                    return torch.from_numpy(self._arrays[number])[:size].view(shape)
            array = np.empty(size, self._dtype)
            if len(self._arrays) == MOST_KEPT:
                self._arrays.pop(0)
            self._arrays.append(array)
            return torch.from_numpy(array).view(shape)


@dataclass(frozen=True)
class Target:
    """Destination of clips.

    Attributes:
        buffers: What memory on the CPU is taken from; None: fresh memory.
        memory_format: Order of a frame in memory; with `torch.channels_last` its colours lie side
            by side.
        threads: Threads that fill it on a CPU; 0: as many as torch has.
    """

    buffers: ClipBuffers | None = None
    memory_format: torch.memory_format = torch.contiguous_format
    threads: int = 0

    def empty(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Return clips [V, T, 3, h, w] whose content is undefined."""
        last = self.memory_format == torch.channels_last
        stored = (*shape[:2], *shape[3:], shape[2]) if last else shape
        own = self.buffers and device.type == "cpu"
        clips = self.buffers.take(*stored) if self.buffers and own else torch.empty(stored, device=device)
        return clips.movedim(-1, 2) if last else clips


@dataclass(frozen=True)
class Look:
    """Conversion of colours to values.

    Attributes:
        table: float32 [3, 256], the value of each byte of each channel.
        matrix: float32 [3, 4], from colours in [0, 1] and a 1 below them to values.
    """

    table: Values
    matrix: Values


def fill_clips(
    clips: Tensor,
    numbers: Sequence[int],
    views: Sequence[View],
    frames: Sequence[Windows],
    *,
    look: Look,
    threads: int,
) -> None:
    """Write those clips of [V, T, 3, h, w] that have these numbers; their windows are not resized.

    Args:
        clips: In either order in memory.
        numbers: Places of the clips in V.
        views: [V] all views.
        frames: Windows uint8 [h, w, 3], R of them for each of the plan's reads.
        look: How colours become values.
        threads: Most threads to use.
    """
    colours_last = clips.stride(2) == 1
    out = clips.movedim(2, -1).numpy() if colours_last else clips.numpy()

    def work(share: int, shares: int) -> None:
        painter = _Painter(clips.shape[-2:], look, colours_last=colours_last)
        for number in numbers[share::shares]:
            painter.paint(out[number], frames[views[number].reads], views[number])

    in_shares(work, min(threads, len(numbers) * out[0].size // LEAST_SHARE))


def in_shares(work: Callable[[int, int], None], shares: int) -> None:
    """Do `work(share, shares)` for every share, each in a thread.

    The first one is the caller's own.
    """
    if shares <= 1:
        work(0, 1)
        return
    with ThreadPoolExecutor(shares - 1) as pool:
        tasks = [pool.submit(work, share, shares) for share in range(1, shares)]
        work(0, shares)
        for task in tasks:
            task.result()


class _Painter:
    """Makes one clip after the other in scratch memory of its own, which stays in the cache."""

    def __init__(self, size: Sequence[int], look: Look, *, colours_last: bool) -> None:
        self._look, self._colours_last = look, colours_last
        same = bool((look.table == look.table[0]).all())
        # OpenCV's table of one channel, for all three, is the faster one
        self._table = look.table[0] if same else np.ascontiguousarray(look.table.T)[None]  # [256] or [1, 256, 3]
        self._pixels = np.empty((TOGETHER, *size, 3), np.uint8)
        self._channels = np.empty((3, TOGETHER, *size), np.uint8)
        self._colours = np.empty((0, *size, 3), np.float32)

    def paint(self, clip: Values, windows: Windows, view: View) -> None:
        """Write a clip of windows [h, w, 3].

        It is [T, 3, h, w], or [T, h, w, 3] where colours come last.
        """
        chosen = [windows[place] for place in view.indices]
        if view.jitter is None and not self._colours_last:
            for start in range(0, len(chosen), TOGETHER):
                self._part(clip[start : start + TOGETHER], chosen[start : start + TOGETHER], flip=view.flip)
            return
        for image, window in zip(clip, chosen, strict=True):
            pixels = cv2.flip(window, 1, self._pixels[0]) if view.flip else window
            if view.jitter is None:
                cv2.LUT(pixels, self._table, image)
            else:
                self._jitter(image, pixels, view.jitter)

    def _part(self, images: Values, windows: Windows, *, flip: bool) -> None:
        """Write frames [k, 3, h, w] in few calls: each may have to wait for another thread."""
        count, _, height, width = images.shape
        pixels = self._pixels[:count]
        if flip:
            for window, out in zip(windows, pixels, strict=True):
                cv2.flip(window, 1, out)
        else:  # a window of a frame is parted six times slower than its copy
            cv2.vconcat(windows, pixels.reshape(count * height, width, 3))
        channels = self._channels[:, :count].reshape(3, count * height, width)
        cv2.split(pixels.reshape(count * height, width, 3), list(channels))
        # A byte has 256 values: a table gives each its normalised one, in place of conversion,
        # division and addition.
        for channel, table in enumerate(self._look.table):
            out = images[:, channel].reshape(count, -1)  # a view, not a copy: each channel of a frame is whole
            cv2.LUT(channels[channel].reshape(count, -1), table, out)

    def _jitter(self, image: Values, pixels: Pixels, jitter: Jitter) -> None:
        if not len(self._colours):  # most clips need none
            self._colours = np.empty((2, *pixels.shape), np.float32)
        colours, spare = self._colours
        cv2.LUT(pixels, COLOURS, colours)
        jitter_frame(colours, spare, jitter)
        if self._colours_last:
            cv2.transform(colours, self._look.matrix, image)
        else:
            cv2.split(cv2.transform(colours, self._look.matrix, spare), list(image))


def augment_clips(
    clips: Tensor, jitters: Sequence[Jitter | None], kernels: Sequence[Values | None], matrix: Tensor
) -> Tensor:
    """Jitter, then blur, then normalise clips [N, T, 3, H, W] of colours in [0, 1].

    Clips of the same shape are returned.

    Args:
        clips: float32 on the CPU.
        jitters: [N]; None leaves a clip's colours.
        kernels: [N] taps of the blur along both axes; None leaves a clip sharp.
        matrix: [3, 4] of the normalisation, from colours and a 1 below them to values.
    """
    out = torch.empty(clips.shape)
    source, made, last = clips.numpy(), out.numpy(), matrix.numpy()
    frames = [(n, t) for n in range(clips.shape[0]) for t in range(clips.shape[1])]

    def work(share: int, shares: int) -> None:
        colours, spare = np.empty((2, *clips.shape[-2:], 3), np.float32)
        for n, t in frames[share::shares]:
            cv2.merge(list(source[n, t]), colours)
            if (jitter := jitters[n]) is not None:
                jitter_frame(colours, spare, jitter)
            if (kernel := kernels[n]) is not None:
                blur_frame(colours, kernel, out=colours)
            cv2.split(cv2.transform(colours, last, spare), list(made[n, t]))

    in_shares(work, min(torch.get_num_threads(), clips.numel() // LEAST_COLOURS))
    return out


def blur_clips(clips: Tensor, kernels: Sequence[Values | None]) -> Tensor:
    """Return a copy of clips float32 [N, T, 3, H, W], where those with a kernel are blurred."""
    out = clips.clone(memory_format=torch.contiguous_format)
    made = out.flatten(1, 2).numpy()  # [N, T 3, H, W]
    images = [
        (image, kernel) for clip, kernel in zip(made, kernels, strict=True) if kernel is not None for image in clip
    ]

    def work(share: int, shares: int) -> None:
        for image, kernel in images[share::shares]:
            blur_frame(image, kernel, out=image)

    in_shares(work, min(torch.get_num_threads(), len(images) * made[0, 0].size // LEAST_COLOURS))
    return out


def blur_frame(frame: Values, kernel: Values, *, out: Values) -> None:
    """Write a frame [h, w] or [h, w, 3], blurred along both axes by a kernel [taps].

    The border is mirrored.
    """
    faint = int((kernel[: len(kernel) // 2] < FAINT).sum())  # a kernel is symmetric: as many fall at its end
    taps = kernel[faint : len(kernel) - faint]
    cv2.sepFilter2D(frame, -1, taps, taps, out, borderType=cv2.BORDER_REFLECT_101)


def jitter_frame(frame: Values, spare: Values, jitter: Jitter) -> None:
    """Jitter a frame [h, w, 3] of colours in [0, 1] where it lies.

    `spare` is memory of the same shape.
    """
    if jitter.grey:
        _saturation(frame, spare, 0.0)
    factors = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    for place in jitter.order:
        _OPERATIONS[place](frame, spare, factors[place])


def _brightness(frame: Values, spare: Values, factor: float) -> None:
    np.multiply(frame, np.float32(factor), out=spare)
    cv2.threshold(spare, 1.0, 0.0, cv2.THRESH_TRUNC, frame)


def _contrast(frame: Values, spare: Values, factor: float) -> None:
    mean = LUMINANCE @ cv2.mean(frame)[:3]
    _mix(frame, spare, factor * np.eye(3), np.full((3, 1), (1 - factor) * mean))


def _saturation(frame: Values, spare: Values, factor: float) -> None:
    _mix(frame, spare, factor * np.eye(3) + (1 - factor) * LUMINANCE, np.zeros((3, 1)))


def _mix(frame: Values, spare: Values, matrix: Matrix, shift: Matrix) -> None:
    """Replace every colour by matrix [3, 3] times it plus shift [3, 1], kept in [0, 1]."""
    cv2.transform(frame, np.hstack([matrix, shift]).astype(np.float32), spare)
    np.clip(spare, np.float32(0), np.float32(1), out=frame)


def _hue(frame: Values, spare: Values, shift: float) -> None:
    cv2.cvtColor(frame, cv2.COLOR_RGB2HSV, spare)
    # from 0 to two turns: OpenCV takes off whole ones, of positive hues only
    spare[..., 0] += np.float32(TURN * (shift % 1))
    cv2.cvtColor(spare, cv2.COLOR_HSV2RGB, frame)


_OPERATIONS = (_brightness, _contrast, _saturation, _hue)  # each as its namesake of `pipelines.augment.clips`


def render_windows(
    windows: Sequence[Windows], views: Sequence[View], *, mean: Three, std: Three, target: Target
) -> Tensor:
    """Do as `render` on the CPU for views without box, from windows [h, w, 3] in any memory."""
    shape = (len(views), len(views[0].indices), 3, *windows[0][0].shape[:2])
    clips = target.empty(shape, torch.device("cpu"))
    fill_unresized(clips, range(len(views)), views, windows, mean=mean, std=std, threads=target.threads)
    return clips


def fill_unresized(
    clips: Tensor,
    numbers: Sequence[int],
    views: Sequence[View],
    windows: Sequence[Windows],
    *,
    mean: Three,
    std: Three,
    threads: int,
) -> None:
    """Fill the clips [V, T, 3, H, W] of these numbers from their windows, normalised."""
    levels = torch.arange(256.0).expand(3, 1, 256)
    scale, shift = scale_and_shift(mean, std, 255.0, levels)
    table = (levels * scale + shift)[:, 0].numpy()  # [3, 256] the value of each byte: torch rounds it as `normalise`
    look = Look(table, colour_matrix(mean, std).numpy())
    fill_clips(clips, numbers, views, windows, look=look, threads=threads or torch.get_num_threads())


def colour_matrix(mean: Three, std: Three) -> Tensor:
    """Return the matrix [3, 4] that normalises colours in [0, 1] with a 1 below them."""
    scale, shift = scale_and_shift(mean, std, 1.0, torch.empty(0))
    return torch.cat([torch.diag(scale.flatten()), shift.flatten(1)], 1)


def scale_and_shift(mean: Three, std: Three, white: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return factor and summand [3, 1, 1] that normalise values in [0, white], of the type of `like`."""
    means, stds = (torch.tensor(three, device=like.device, dtype=like.dtype)[:, None, None] for three in (mean, std))
    return 1 / (white * stds), -means / stds
