"""What the C library does with memory that PyTorch frees on the CPU."""

from __future__ import annotations

import ctypes
import platform
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Parameters of mallopt(3), from glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory(device: torch.device) -> bool:
    """Let the process keep the memory that it frees, for its next tensors; says whether that could be asked for.

    PyTorch has no cache of CPU memory.  glibc maps every block above 32 MiB anew, and its pages are zeroed and mapped
    again one by one at their first use: in a training step of a ResNet-50 on 40 frames of 224 x 224 that is three
    million page faults and most of the time.  Kept, a step after the first two has next to none.  The price is what
    lies between blocks in use: the most memory in use grew by about a tenth there.

    Commands call it once, at their start, as it changes the whole process.  It does nothing for another device than
    the CPU, or without glibc.
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # No block is mapped on its own (a higher M_MMAP_THRESHOLD would do, but glibc accepts none above 32 MiB), and the
    # heap is never shortened.
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
