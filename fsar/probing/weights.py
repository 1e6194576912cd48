"""Open the trunk to be probed: of a run, of a file of weights, or untrained."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fsar.checkpoints import (
    MODEL,
    TrainingRecord,
    choose_checkpoint,
    load_reference_state_dict,
    load_training_record,
    take_colours,
    weights_sha256,
)
from fsar.pretraining import PRETRAINING
from fsar.pretraining.config import build_pretrain_config, frame_stride
from fsar.run.weights import load_trunk_weights
from fsar.trunks import Trunk, create_trunk
from fsar.trunks.weight_files import read_tensors
from shards_spec.errors import ConfigError

# Fields of a clip -> keys of a run's configuration
KEYS = {"frames": "clip_frames", "stride": "clip_stride", "size": "crop"}
RANDOM = "random"  # in place of weights: the trunk was never trained


@dataclass(frozen=True)
class Probed:
    """A trunk and where its weights come from.

    Attributes:
        trunk: The network, on the CPU.
        name: Its name in the registry.
        source: The option for its weights, "random" for none.
        sha256: Hash of the weights.
        trained_on: Classes and videos of their training; None where nothing tells.
        method: Method of their training, where they are of a run.
        clips: How the run cut its clips: frames, stride and size, as far as it says.
    """

    trunk: Trunk
    name: str
    source: str
    sha256: str
    trained_on: TrainingRecord | None
    method: str | None = None
    clips: dict[str, int] = field(default_factory=dict)


def open_probed(weights: str | None, name: str | None, *, checkpoint: str | None = None, seed: int = 0) -> Probed:
    """Open the trunk of a run folder, of a file, "fetch"ed, or (None) with random weights.

    Args:
        weights: The run folder or file.
        name: The trunk's name; a run tells its own.
        checkpoint: best or last, of a run.
        seed: Of random weights.

    Raises:
        ConfigError: no such weights, or they do not fit the trunk, or its name is missing.
    """
    if weights is not None and Path(weights).is_dir():
        return _of_run(Path(weights), name, checkpoint)
    if name is None:
        raise ConfigError("give --trunk NAME: only a run folder tells which trunk its weights are of")
    if checkpoint is not None:
        raise ConfigError("--checkpoint chooses one of a run's: give the run folder as --weights, or leave it out")
    torch.manual_seed(seed)
    trunk = create_trunk(name)
    load_trunk_weights(trunk, name, weights or RANDOM, option="--weights")
    nothing = torch.zeros(0, dtype=torch.int64)
    trained_on = None if weights else TrainingRecord(nothing, nothing)
    return Probed(trunk, name, weights or RANDOM, weights_sha256(trunk), trained_on)


def _of_run(run: Path, name: str | None, checkpoint: str | None) -> Probed:
    config = _config(run)
    own = str(config.get("trunk", ""))
    if name not in {None, own}:
        raise ConfigError(f'{run} has the trunk "{own}": leave --trunk {name} out')
    path = choose_checkpoint(run, checkpoint)
    trained_on = load_training_record(path)  # refuses what is no checkpoint
    given = {key.removeprefix(MODEL): value for key, value in read_tensors(path).items() if key.startswith(MODEL)}
    below = {key.removeprefix("trunk."): value for key, value in given.items() if key.startswith("trunk.")}
    trunk = create_trunk(own)
    try:
        load_reference_state_dict(trunk, below or given)
    except ConfigError as error:
        raise ConfigError(f"{path} does not hold the trunk {own}: {error}") from error
    take_colours(trunk, path)
    method = str(config.get("method", "")) or None
    clips = {ours: int(config[key]) for ours, key in KEYS.items() if config.get(key)}
    if method in PRETRAINING and "stride" in clips:
        clips["stride"] = frame_stride(build_pretrain_config(config))
    return Probed(trunk, own, str(run), weights_sha256(trunk), trained_on, method, clips)


def _config(run: Path) -> dict[str, Any]:
    path = run / "config.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ConfigError(
            f"{run} is no run folder (it has no config.toml); give one of fsar-pretrain or fsar-train, or a file"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged ({error})") from error
