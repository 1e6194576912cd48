"""Read ten thousand changed files of every kind, or refuse them with one sentence.

`make faults` runs a hundred thousand.
"""

from __future__ import annotations

import os
import resource
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzz_targets import every_target
from mutations import Mutator

SLOW, MUCH = 5.0, 600_000  # seconds that one file may take, KB that all may


def fuzz(folder: Path, count: int, *, seed: int) -> int:
    """Change and read `count` files; returns how many were."""
    targets = every_target(folder)
    total, done = sum(target.share for target in targets), 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    failed: dict[str, str] = {}
    for target in targets:
        for n in range(-int(-count * target.share // total)):
            start = time.perf_counter()
            mutate = Mutator(zlib.crc32(f"{seed} {target.name} {n}".encode()))
            try:
                target.run(mutate)
            except Exception as error:  # noqa: BLE001 -- any but ours is what is looked for
                what = f"{target.name}: {type(error).__name__}"
                failed.setdefault(what, f"mutation {n} of seed {seed}: {error!r:.300}")
            if time.perf_counter() - start > SLOW:
                failed[f"{target.name}: slow"] = f"mutation {n} of seed {seed}"
            done += 1
    assert not failed, "\n".join(f"{what}: {how}" for what, how in failed.items())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MUCH
    return done


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Make a folder in memory, where that is possible: a disk would take most of the time."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


@pytest.mark.filterwarnings("ignore")  # torch's, about files that are not its own
def test_changed_files_are_read_or_refused(place: Path) -> None:
    assert fuzz(place / "fuzz", 10_000, seed=0) >= 10_000


@pytest.mark.faults
@pytest.mark.filterwarnings("ignore")
def test_a_hundred_thousand_changed_files(place: Path) -> None:
    done = sum(fuzz(place / str(seed), 20_000, seed=seed) for seed in range(1, 6))
    print(f"{done:,} of {done:,} changed files were read or refused with one sentence")
    assert done >= 100_000
