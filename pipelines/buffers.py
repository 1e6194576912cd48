"""Memory of clips that is used again once nobody holds it: on a CPU fresh pages cost as much as filling them."""

from __future__ import annotations

import math
import sys

import numpy as np
import torch

MOST_KEPT = 4  # episodes; a consumer that keeps more of them gets fresh memory
HELD_BY_US = 2  # the list's reference and the one of the call that counts


class ClipBuffers:
    """Gives float32 tensors on the CPU; one whose last view is gone is given again."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray[tuple[int], np.dtype[np.float32]]] = []

    def take(self, *shape: int) -> torch.Tensor:
        """A tensor of that shape, its content undefined."""
        size = math.prod(shape)
        for number in range(len(self._arrays)):
            if self._arrays[number].size == size and sys.getrefcount(self._arrays[number]) == HELD_BY_US:
                return torch.from_numpy(self._arrays[number]).view(shape)
        array = np.empty(size, np.float32)
        if len(self._arrays) == MOST_KEPT:
            self._arrays.pop(0)
        self._arrays.append(array)
        return torch.from_numpy(array).view(shape)
