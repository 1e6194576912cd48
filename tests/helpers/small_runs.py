"""Small runs of the commands."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fsar.pretraining.config import build_pretrain_config, read_pretrain_recipe
from shards_spec.cli.console import run_command

SMALL = {
    "way": 2, "test_way": 2, "queries": 1, "episodes": 16, "episodes_per_step": 2, "val_every": 8, "val_episodes": 3,
    "test_episodes": 4, "checkpoint_every": 4, "log_every": 4, "resize": 64, "crop": 32, "random_crop": True,
    "threads": 1, "executor": "portable",
}  # fmt: skip


def call(cli, *words: str) -> int:
    """Run a command in this process; its exit code."""
    argv, sys.argv = sys.argv, ["command", *words]
    try:
        with pytest.raises(SystemExit) as leave:
            run_command(cli)
        return int(leave.value.code or 0)
    finally:
        sys.argv = argv


def words(shards: Path, run: Path, **changes) -> list[str]:
    """The words after `fsar-train` for a small run."""
    pairs = [(f"--{k.replace('_', '-')}", str(v).lower()) for k, v in (SMALL | changes).items()]
    return ["--shards", str(shards), "--recipe", "demo", "--run", str(run), *(w for pair in pairs for w in pair)]


FEW = {"batch": 4, "epochs": 2, "queue": 8, "checkpoint_every": 2, "log_every": 2, "threads": 1, "device": "cpu"}


SMALL_PRETRAINING = {
    "moco": FEW | {"clip_frames": 4, "crop": 32},
    "fima": FEW | {"clip_frames": 10, "crop": 32},  # two feature frames, of windows of 20
    "mscl": FEW | {"clip_frames": 4, "crop": 32, "flow_series": "flow1", "motion_filter": False},
}


def small_config(method: str, **changes):
    return build_pretrain_config(read_pretrain_recipe(f"{method}-tiny") | SMALL_PRETRAINING[method] | changes)
