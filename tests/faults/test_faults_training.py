"""Training that is killed at random moments and resumed gives the run that was never killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from folders import ROOT


def kill_training(shards: Path, folder: Path, kills: int, streams: str) -> str:
    """Run the program that kills, in a process of its own, and return its output."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = (Path(__file__).with_name("kill_training.py"), shards, folder, kills, streams)
    call = [sys.executable, *map(str, words)]
    done = subprocess.run(call, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_killed_and_resumed_it_ends_the_same(tiny_path: Path, tmp_path: Path) -> None:
    said = kill_training(tiny_path, tmp_path, 2, "both")
    assert said.startswith("2 of 2 kills: the same losses, weights and episodes")


@pytest.mark.faults
@pytest.mark.parametrize("streams", ["frames", "both"])
def test_100_kills_change_nothing(tiny_path: Path, tmp_path: Path, streams: str) -> None:
    print(f"\ntraining on {streams}: {kill_training(tiny_path, tmp_path, 100, streams)}", end="")
