"""Weights that can be tested: of a run, of somebody else's file, or of a pretrained trunk alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fsar.checkpoints import choose_checkpoint, load_reference_state_dict, load_state, load_training_record
from fsar.evaluation.shared_episodes import ModelUnderTest
from fsar.methods import FewShotMethod
from fsar.pretraining import PRETRAINING
from fsar.pretraining.config import frame_stride, pretrain_config_of
from fsar.run.build import TRUNK_ALONE, build_model, prototypes_of_trunk
from fsar.run.config import RunConfig, build_config, run_config
from fsar.run.recipes import read_recipe
from fsar.run.weights import training_record_of
from fsar.trunks.weight_files import read_tensors
from pipelines.clips.labelled import CENTRE
from shards_spec.errors import ConfigError

CLIPS = 4  # of a video, that a pre-trained trunk looks at


def model_of_run(run: Path, checkpoint: str | None = None) -> ModelUnderTest:
    """The checkpoint `best` or `last` of a run folder; by default the best where there is one.

    Of pre-training there is one checkpoint; prototypes stand on its trunk.

    Raises:
        ConfigError: it is no run folder, or its checkpoint is missing or damaged, or pre-training has no such one.
    """
    if is_pretraining(run):
        if checkpoint == "best":
            raise ConfigError(
                f"--checkpoint best: {run} is of pre-training, which keeps the last one alone: leave it out"
            )
        return model_of_pretraining(run)
    config = run_config(run)
    path = choose_checkpoint(run, checkpoint)
    stamp = {"checkpoint": path.stem, "selected_on": config.select_on if path.stem == "best" else "last"}
    load, record = partial(_of_checkpoint, config, path), load_training_record(path)
    return ModelUnderTest(run.resolve().name, config, load, record, stamp)


def is_pretraining(run: Path) -> bool:
    """Whether a run folder is of fsar-pretrain."""
    path = run / "config.toml"
    return path.is_file() and str(read_recipe(str(path)).get("method")) in PRETRAINING


def model_of_pretraining(run: Path) -> ModelUnderTest:
    """Prototypes on the trunk of a run of fsar-pretrain: of a few clips a video, as long as those it was trained on.

    Raises:
        ConfigError: its configuration is damaged.
    """
    own = pretrain_config_of(run)
    clips = {"frames": CLIPS, "frame_rule": "segment_clips", "clip_frames": own.clip_frames}
    clips |= {"clip_stride": frame_stride(own), "resize": round(own.crop / CENTRE), "crop": own.crop}
    given = {"method": "prototype", "trunk": own.trunk, "trunk_weights": str(run), "num_classes": 1} | TRUNK_ALONE
    return replace(model_of_trunk(build_config(given | clips)), name=run.resolve().name)


def _of_checkpoint(config: RunConfig, path: Path) -> FewShotMethod:
    model = build_model(config, weights=False)
    load_state(path, model)
    return model


def file_config(recipe: str | None, method: str | None, trunk: str | None, options: Mapping[str, Any]) -> RunConfig:
    """The configuration of a file of weights: a recipe, then method and trunk, then further options.

    Raises:
        ConfigError: they do not say which model it is, or an unknown name or value.
    """
    table = read_recipe(recipe) if recipe else {}
    table |= {key: value for key, value in (("method", method), ("trunk", trunk)) if value}
    if not {"method", "trunk"} <= table.keys():
        raise ConfigError("a file of weights does not say what it is: give --method and --trunk, or --recipe")
    return build_config(table | dict(options))


def model_of_file(path: Path, config: RunConfig) -> ModelUnderTest:
    """Weights with the names of the published code; the auxiliary classifier is left out, as no test reads it.

    Raises:
        ConfigError: it is a checkpoint of our own, of which the run folder says more.
    """
    run = path.resolve().parent.parent
    if (run / "config.toml").is_file():
        raise ConfigError(f"{path} is a checkpoint of the run {run}; give that folder, and choose with --checkpoint")
    stamp = {"weights_file": path.name, "weights_file_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    return ModelUnderTest(path.name, config, partial(_of_file, config, path), stamp=stamp)


def _of_file(config: RunConfig, path: Path) -> FewShotMethod:
    model, tensors = build_model(config, weights=False), read_tensors(path)
    try:
        load_reference_state_dict(model, tensors, drop_classifier=True)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return model


def model_of_trunk(config: RunConfig) -> ModelUnderTest:
    """A method that stands on a pretrained trunk alone."""
    record = training_record_of(config.trunk_weights)
    return ModelUnderTest(f"{config.method} on {config.trunk}", config, partial(_of_trunk, config), record)


def _of_trunk(config: RunConfig) -> FewShotMethod:
    model = build_model(config)
    trained = [name for name, value in model.named_parameters() if not name.startswith("trunk.") and value.ndim > 1]
    if trained:
        raise ConfigError(
            f"{config.method} has weights beyond its trunk ({trained[0]}, ...), which would be random: "
            "train it and give --weights RUN"
        )
    return model


def untrained_prototypes(config: RunConfig) -> ModelUnderTest:
    """The control: prototypes of the trunk as a run of this configuration starts with it; it is loaded at once.

    Raises:
        ConfigError: the trunk's weights are missing or do not fit.
    """
    config = prototypes_of_trunk(config)
    model = build_model(config)
    record = training_record_of(config.trunk_weights)
    return ModelUnderTest(f"prototypes of {config.trunk}", config, lambda: model, record)
