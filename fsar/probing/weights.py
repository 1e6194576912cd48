"""Open the trunk that is probed: of a run, of a file of weights, or untrained."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fsar.checkpoints import TrainingRecord, weights_sha256
from fsar.pretraining.config import build_pretrain_config, frame_stride
from fsar.run.recipes import read_recipe
from fsar.run.weights import Weights, find_weights, load_trunk_weights
from fsar.trunks import Trunk, create_trunk
from shards_spec.errors import ConfigError

# Properties of a clip -> keys of a run's configuration.
KEYS = {"frames": "clip_frames", "stride": "clip_stride", "size": "crop"}
RANDOM = "random"  # source of the weights of an untrained trunk


@dataclass(frozen=True)
class Probed:
    """A trunk and where its weights come from.

    Attributes:
        trunk: The network, on the CPU.
        name: Its name in the registry.
        source: The text that named the weights, "random" for random ones.
        sha256: Hash of the weights.
        trained_on: Training classes and videos of the weights; None if unknown.
        method: Method that trained them, of a run.
        clips: Frames, stride and size of the run's clips, as far as it states them.
    """

    trunk: Trunk
    name: str
    source: str
    sha256: str
    trained_on: TrainingRecord | None
    method: str | None = None
    clips: dict[str, int] = field(default_factory=dict)


def open_probed(source: str | None, name: str | None, *, checkpoint: str | None = None, seed: int = 0) -> Probed:
    """Open a trunk with the weights of a run folder, a file or a download, or with random ones.

    Args:
        source: The weights, see `find_weights`; None for random ones.
        name: The trunk's name; a run tells its own.
        checkpoint: best or last, of a run.
        seed: Seed of random weights.

    Raises:
        ConfigError: no such weights, or they do not fit the trunk, or its name is missing.
    """
    weights = find_weights(source or RANDOM, checkpoint=checkpoint)
    if weights.run is not None:
        return _of_run(weights, name, checkpoint)
    if name is None:
        raise ConfigError("give --trunk NAME: only a run folder tells which trunk its weights are of")
    if checkpoint is not None:
        raise ConfigError("--checkpoint chooses one of a run's: give the run folder as --weights, or leave it out")
    torch.manual_seed(seed)
    trunk = create_trunk(name)
    load_trunk_weights(trunk, name, weights.source, option="--weights")
    nothing = torch.zeros(0, dtype=torch.int64)
    trained_on = None if source else TrainingRecord(nothing, nothing)
    return Probed(trunk, name, weights.source, weights_sha256(trunk), trained_on)


def _of_run(weights: Weights, name: str | None, checkpoint: str | None) -> Probed:
    assert weights.run is not None
    config = _config(weights.run)
    own = str(config.get("trunk", ""))
    if name not in {None, own}:
        raise ConfigError(f'{weights.run} has the trunk "{own}": leave --trunk {name} out')
    trained_on = weights.training_record()  # refuses what is no checkpoint
    trunk = create_trunk(own)
    load_trunk_weights(trunk, own, weights.source, option="--weights", checkpoint=checkpoint)
    method = str(config.get("method", "")) or None
    clips = {ours: int(config[key]) for ours, key in KEYS.items() if config.get(key)}
    if weights.pretrained and "stride" in clips:
        clips["stride"] = frame_stride(build_pretrain_config(config))
    return Probed(trunk, own, str(weights.run), weights_sha256(trunk), trained_on, method, clips)


def _config(run: Path) -> dict[str, Any]:
    path = run / "config.toml"
    if not path.is_file():
        raise ConfigError(
            f"{run} is no run folder (it has no config.toml); give one of fsar-pretrain or fsar-train, or a file"
        )
    return read_recipe(str(path))
