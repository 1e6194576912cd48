"""Clips on a CPU that are normalised and nothing else: each pixel is read once and each value written once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from pipelines.plan import View

    Pixels = npt.NDArray[np.uint8]
    Values = npt.NDArray[np.float32]

LEAST_SHARE = 1 << 21  # values: a thread costs as much as to write some hundred thousand


def fill_clips(
    clips: torch.Tensor, numbers: Sequence[int], views: Sequence[View], frames: Sequence[torch.Tensor], table: Values
) -> None:
    """Write the clips `numbers` of [V, T, 3, h, w], whose windows are read as they are, flip apart.

    table: float32 [3, 256], what each value of each channel becomes. Of the frames that the views name, uint8
    [R, h, w, 3], the channels are parted in a buffer that fits the cache; looking up is the one pass over float32.
    Works on as many threads as torch's own operations do.
    """
    out, pixels = clips.numpy(), [each.numpy() for each in frames]
    shares = max(1, min(torch.get_num_threads(), len(numbers), len(numbers) * out[0].size // LEAST_SHARE))

    def work(share: int) -> None:
        planes = np.empty((3, *out.shape[-2:]), np.uint8)
        for number in numbers[share::shares]:
            _fill(out[number], pixels[views[number].reads], views[number], table, planes)

    if shares == 1:
        work(0)
        return
    with ThreadPoolExecutor(shares - 1) as pool:
        tasks = [pool.submit(work, share) for share in range(1, shares)]
        work(0)
        for task in tasks:
            task.result()


def _fill(clip: Values, frames: Pixels, view: View, table: Values, planes: Pixels) -> None:
    for image, place in zip(clip, view.indices, strict=True):  # [3, h, w]
        window = frames[place]  # [h, w, 3]
        cv2.split(cv2.flip(window, 1) if view.flip else window, list(planes))
        for channel in range(3):
            cv2.LUT(planes[channel], table[channel], image[channel])
