"""Clips on a CPU that are normalised and nothing else: each pixel is read once and each value written once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt
    import torch

    from pipelines.plan import View

    Pixels = npt.NDArray[np.uint8]
    Windows = Sequence[Pixels]  # uint8 [h, w, 3] each
    Values = npt.NDArray[np.float32]

LEAST_SHARE = 1 << 21  # values: a thread costs as much as to write some hundred thousand


def fill_clips(
    clips: torch.Tensor,
    numbers: Sequence[int],
    views: Sequence[View],
    frames: Sequence[Windows],
    *,
    table: Values,
    threads: int,
) -> None:
    """Write the clips `numbers` of [V, T, 3, h, w], whose windows are read as they are, flip apart.

    frames: R windows uint8 [h, w, 3] for each of the plan's reads. Their channels are parted in a buffer that fits
    the cache; to look up what each value becomes, in table float32 [3, 256], is the one pass over the clips.
    """
    out = clips.numpy()
    shares = max(1, min(threads, len(numbers) * out[0].size // LEAST_SHARE))

    def work(share: int) -> None:
        planes = np.empty((3, *out.shape[-2:]), np.uint8)
        for number in numbers[share::shares]:
            _fill(out[number], frames[views[number].reads], views[number], table, planes)

    if shares == 1:
        work(0)
        return
    with ThreadPoolExecutor(shares - 1) as pool:
        tasks = [pool.submit(work, share) for share in range(1, shares)]
        work(0)
        for task in tasks:
            task.result()


def _fill(clip: Values, frames: Windows, view: View, table: Values, planes: Pixels) -> None:
    for image, place in zip(clip, view.indices, strict=True):  # [3, h, w]
        window = frames[place]  # [h, w, 3]
        cv2.split(cv2.flip(window, 1) if view.flip else window, list(planes))
        for channel in range(3):
            cv2.LUT(planes[channel], table[channel], image[channel])
