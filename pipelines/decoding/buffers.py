"""Memory of clips that is used again once nobody holds it: on a CPU fresh pages cost as much as filling them."""

from __future__ import annotations

import math
import sys
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

MOST_KEPT = 8  # episodes; a consumer that keeps more of them gets fresh memory
HELD_BY_US = 2  # the list's reference and the one of the call that counts


class ClipBuffers:
    """Gives tensors of one type on the CPU; memory whose last view is gone is given again; safe in threads."""

    def __init__(self, dtype: npt.DTypeLike = np.float32) -> None:
        self._dtype = dtype
        self._arrays: list[np.ndarray[tuple[int], Any]] = []
        self._lock = threading.Lock()

    def take(self, *shape: int) -> torch.Tensor:
        """A tensor of that shape, its content undefined."""
        size = math.prod(shape)
        with self._lock:
            for number in range(len(self._arrays)):
                fits = size <= self._arrays[number].size <= 2 * size
                if fits and sys.getrefcount(self._arrays[number]) == HELD_BY_US:
                    return torch.from_numpy(self._arrays[number])[:size].view(shape)
            array = np.empty(size, self._dtype)
            if len(self._arrays) == MOST_KEPT:
                self._arrays.pop(0)
            self._arrays.append(array)
            return torch.from_numpy(array).view(shape)
