"""Memory that was freed is kept for the next tensors, where the C library can be asked to."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fsar.run.device import keep_freed_memory, memory_limit

FAULTS = """
import resource, sys, torch
from fsar.run.device import keep_freed_memory, memory_limit
assert keep_freed_memory(torch.device(sys.argv[1])) == (sys.argv[1] == "cpu")
torch.ones(1 << 24)  # 64 MiB; what else was allocated may lie behind it, so the next is smaller
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(1 << 23)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_a_second_tensor_takes_the_memory_of_the_first():
    done = [subprocess.run([sys.executable, "-c", FAULTS, device], capture_output=True, text=True, check=True)
            for device in ("cpu", "meta")]  # fmt: skip
    kept, mapped_anew = (int(each.stdout) for each in done)
    assert kept < 100
    assert kept < mapped_anew


def test_without_glibc_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory(torch.device("cpu"))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_nothing_is_kept_where_the_memory_is_too_small_for_what_lies_between_blocks(monkeypatch):
    had = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    monkeypatch.setattr("fsar.run.device.memory_limit", lambda: int(1.2 * had))
    assert not keep_freed_memory(torch.device("cpu"))


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="not Linux")
def test_the_limit_is_less_than_the_machine_has():
    assert 0 < memory_limit() <= os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()
