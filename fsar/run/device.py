"""Choose the device and the precision of a run, and keep freed memory."""

from __future__ import annotations

import ctypes
import platform
import resource
from pathlib import Path

import torch

from fsar.run import ranks
from shards_spec.errors import ConfigError

# Parameters of mallopt(3), from glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
# Factor of the peak for unused gaps between blocks of kept memory.  They took 12 % in a training
# step of ResNet-50 on 24 frames, and 19 % on 40.
ROOM = 1.35


def choose_device(name: str) -> torch.device:
    """Choose the device of that name; `auto` is CUDA if there is a GPU.

    Each of several processes on a machine takes a GPU of its own, which becomes its current one.

    Raises:
        ConfigError: there is no such device, or there are fewer GPUs than processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks.count() > 1 and name.startswith("cuda"):
        return _own_gpu(name)
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f'device "{name}" is not to be had here: {str(error).splitlines()[0]}') from error
    return device


def _own_gpu(name: str) -> torch.device:
    own, there = ranks.local_rank(), torch.cuda.device_count()
    if name != "cuda" or there <= own:
        raise ConfigError(
            f'device "{name}" and {there} GPUs on this machine do not fit its processes, of which each needs one: '
            "start as many as there are GPUs with --device cuda, or choose --device cpu"
        )
    torch.cuda.set_device(own)
    return torch.device("cuda", own)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Make a context in which the model computes in bfloat16 where that is safe.

    For fp32 it changes nothing.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def keep_freed_memory(device: torch.device) -> bool:
    """Let the process keep the memory that it frees, for its next tensors.

    Returns whether it does from now on.

    PyTorch has no cache of CPU memory.  glibc maps every block above 32 MiB anew.  Its pages are
    zeroed and mapped again one by one at their first use.  A training step of a ResNet-50 on 40
    frames of 224 x 224 spends most of its time in three million page faults.  With kept memory, a
    step after the first two has almost none.

    This changes the whole process.  A loop calls it after its first step, episode or batch, when
    the peak of its memory is known.  Nothing is changed if that peak would not fit with room to
    spare, for another device than the CPU, or without glibc.
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return False
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes
    if ROOM * peak > memory_limit():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # No block is mapped on its own (a higher M_MMAP_THRESHOLD would do, but glibc accepts none
    # above 32 MiB), and the heap is never shortened.
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))


def memory_limit() -> int:
    """Count the bytes that this process can have.

    They are its own and those free on the machine, within its control group.
    """
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    own = pages * resource.getpagesize()
    limits = [own + 1024 * int(fields["MemAvailable"].split()[0])]
    group = Path("/sys/fs/cgroup/memory.max")  # a container has its own limit
    if group.exists() and (text := group.read_text().strip()).isdigit():
        limits.append(int(text))
    return min(limits)
