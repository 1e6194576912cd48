"""Clips on a CPU that are not resized: each frame is made in the cache, and each of its values written once."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np
import numpy.typing as npt

from pipelines.augment.colours import jitter_frame
from pipelines.draw import Jitter
from pipelines.episodes.stream import View

Pixels = npt.NDArray[np.uint8]
Windows = Sequence[Pixels]  # uint8 [h, w, 3] each
Values = npt.NDArray[np.float32]

if TYPE_CHECKING:
    import torch

LEAST_SHARE = 1 << 21  # values: a thread costs as much as to write some hundred thousand
TOGETHER = 4  # frames whose channels are parted at a time: pixels and planes fit the cache of a core
COLOURS = (np.arange(256, dtype=np.float32) / np.float32(255))[None]  # [1, 256]


@dataclass(frozen=True)
class Look:
    """How colours become values: table float32 [3, 256] of bytes, matrix float32 [3, 4] of colours in [0, 1]."""

    table: Values
    matrix: Values


def fill_clips(
    clips: torch.Tensor,
    numbers: Sequence[int],
    views: Sequence[View],
    frames: Sequence[Windows],
    *,
    look: Look,
    threads: int,
) -> None:
    """Write the clips `numbers` of [V, T, 3, h, w], in whichever order in memory, whose windows are not resized.

    frames: R windows uint8 [h, w, 3] for each of the plan's reads.
    """
    colours_last = clips.stride(2) == 1
    out = clips.movedim(2, -1).numpy() if colours_last else clips.numpy()
    shares = max(1, min(threads, len(numbers) * out[0].size // LEAST_SHARE))

    def work(share: int) -> None:
        painter = _Painter(clips.shape[-2:], look, colours_last=colours_last)
        for number in numbers[share::shares]:
            painter.paint(out[number], frames[views[number].reads], views[number])

    if shares == 1:
        work(0)
        return
    with ThreadPoolExecutor(shares - 1) as pool:
        tasks = [pool.submit(work, share) for share in range(1, shares)]
        work(0)
        for task in tasks:
            task.result()


class _Painter:
    """Makes one clip after the other in memory of its own, which stays in the cache."""

    def __init__(self, size: Sequence[int], look: Look, *, colours_last: bool) -> None:
        self._look, self._colours_last = look, colours_last
        same = bool((look.table == look.table[0]).all())
        # OpenCV's table of one channel, for all three, is the faster one
        self._table = look.table[0] if same else np.ascontiguousarray(look.table.T)[None]  # [256] or [1, 256, 3]
        self._pixels = np.empty((TOGETHER, *size, 3), np.uint8)
        self._planes = np.empty((3, TOGETHER, *size), np.uint8)
        self._colours = np.empty((0, *size, 3), np.float32)

    def paint(self, clip: Values, windows: Windows, view: View) -> None:
        """Write a clip [T, 3, h, w], or [T, h, w, 3] where colours come last, from its windows [h, w, 3]."""
        chosen = [windows[place] for place in view.indices]
        if view.jitter is None and not self._colours_last:
            for start in range(0, len(chosen), TOGETHER):
                self._parted(clip[start : start + TOGETHER], chosen[start : start + TOGETHER], flip=view.flip)
            return
        for image, window in zip(clip, chosen, strict=True):
            pixels = cv2.flip(window, 1, self._pixels[0]) if view.flip else window
            if view.jitter is None:
                cv2.LUT(pixels, self._table, image)
            else:
                self._jittered(image, pixels, view.jitter)

    def _parted(self, images: Values, windows: Windows, *, flip: bool) -> None:
        """Write frames [k, 3, h, w] in few calls, for each of which another thread may have to wait."""
        count, _, height, width = images.shape
        pixels = self._pixels[:count]
        if flip:
            for window, out in zip(windows, pixels, strict=True):
                cv2.flip(window, 1, out)
        else:  # a window of a frame is parted six times slower than its copy
            cv2.vconcat(windows, pixels.reshape(count * height, width, 3))
        planes = self._planes[:, :count].reshape(3, count * height, width)
        cv2.split(pixels.reshape(count * height, width, 3), list(planes))
        for channel, table in enumerate(self._look.table):
            out = images[:, channel].reshape(count, -1)  # a view: the planes of a frame are whole
            cv2.LUT(planes[channel].reshape(count, -1), table, out)

    def _jittered(self, image: Values, pixels: Pixels, jitter: Jitter) -> None:
        if not len(self._colours):
            self._colours = np.empty((2, *pixels.shape), np.float32)
        colours, spare = self._colours
        cv2.LUT(pixels, COLOURS, colours)
        jitter_frame(colours, spare, jitter)
        if self._colours_last:
            cv2.transform(colours, self._look.matrix, image)
        else:
            cv2.split(cv2.transform(colours, self._look.matrix, spare), list(image))
