"""The folder of a run: begun once, then only gone on with in the same configuration and on the same data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fsar.run.flat_config import FlatConfig
from shards_spec.errors import ConfigError
from shards_spec.files import disk_errors, json_bytes, read_json, write_whole


def last_checkpoint(run: Path) -> Path:
    """The checkpoint to resume from."""
    return run / "checkpoints" / "last.safetensors"


def begin_run(run: Path, config: FlatConfig, data: dict[str, Any], *, option: str = "--run") -> None:
    """Make the folder with `config.toml` and `data.json`, what the run reads.

    Raises:
        ConfigError: it holds a run already, or is a file; `option` is how a command names it.
        DiskError: the disk is full.
    """
    if last_checkpoint(run).exists():
        raise ConfigError(f"{run} holds a run already; go on with --resume, or choose another folder with {option}")
    if run.exists() and not run.is_dir():
        raise ConfigError(f"{option} {run} is a file; name a folder")
    with disk_errors(run):
        run.mkdir(parents=True, exist_ok=True)
    write_whole(run / "data.json", json_bytes(data))
    write_whole(run / "config.toml", config.to_toml().encode())


def check_is_run(run: Path) -> None:
    """ConfigError where there is nothing to resume."""
    if not (run / "config.toml").exists():
        raise ConfigError(f"--resume: {run} holds no run; start it without --resume")


def check_resumable(run: Path, config: FlatConfig, saved: FlatConfig) -> None:
    """Refuse to resume a run with another configuration.

    Raises:
        ConfigError: naming what differs, or that there is nothing to resume.
    """
    different = config.differences(saved)
    if different:
        raise ConfigError(
            f"--resume: {run} was trained with another configuration ({'; '.join(different)}); "
            "give the options that it was started with, or start a new run"
        )
    if not last_checkpoint(run).exists():
        raise ConfigError(f"--resume: {run} has no checkpoint yet; start it again without --resume")


def check_same_data(run: Path, data: dict[str, Any], shards: Path) -> None:
    """Refuse to resume a run on other data than it was begun with: ConfigError."""
    if read_json(run / "data.json") != data:
        raise ConfigError(
            f"--resume: {run} was trained on other shards, splits or labels than {shards}, or other texts"
        )
