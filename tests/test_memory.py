"""Memory that was freed is kept for the next tensors, where the C library can be asked to."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from fsar.memory import keep_freed_memory

FAULTS = """
import resource, sys, torch
from fsar.memory import keep_freed_memory
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
