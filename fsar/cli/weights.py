"""Open the models that fsar-eval tests.

Their weights are of a run, of a file with published names, or only of a trunk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fsar.evaluation.shared_episodes import ModelUnderTest
from fsar.methods import Model, streams_of
from fsar.pretraining.config import frame_stride, pretrain_config_of
from fsar.run.build import TRUNK_ALONE, build_model, open_model, prototypes_of_trunk
from fsar.run.config import RunConfig, build_config, run_config
from fsar.run.recipes import read_recipe
from fsar.run.weights import find_weights, training_record_of, weights_of_run
from pipelines.clips.labelled import CENTRE
from shards_spec.errors import ConfigError

CLIPS = 4  # of a video, that a pre-trained trunk looks at


def model_of_run(run: Path, checkpoint: str | None = None) -> ModelUnderTest:
    """Open the checkpoint `best` or `last` of a run folder.

    The default is the best, if there is one.

    Pre-training has one checkpoint; prototypes are tested on its trunk.

    Raises:
        ConfigError: it is no run folder, or its checkpoint is missing or damaged, or pre-training
            has no such one.
    """
    weights = weights_of_run(run, checkpoint)
    if weights.pretrained:
        if checkpoint == "best":
            raise ConfigError(f"--checkpoint best: {run} is of pre-training, which keeps only the last: leave it out")
        return model_of_pretraining(run)
    config = run_config(run)
    assert weights.path is not None
    name = weights.path.stem
    stamp = {"checkpoint": name, "selected_on": config.select_on if name == "best" else "last"}
    return ModelUnderTest(
        run.resolve().name, config, partial(open_model, config, weights), weights.training_record(), stamp
    )


def model_of_pretraining(run: Path) -> ModelUnderTest:
    """Make prototypes on the trunk of a run of fsar-pretrain.

    They read a few clips a video, as long as those of its training.

    Raises:
        ConfigError: its configuration is damaged.
    """
    own = pretrain_config_of(run)
    clips = {"frames": CLIPS, "frame_rule": "segment_clips", "clip_frames": own.clip_frames}
    clips |= {"clip_stride": frame_stride(own), "resize": round(own.crop / CENTRE), "crop": own.crop}
    table = {
        "method": "prototype",
        "trunk": own.trunk,
        "trunk_weights": str(run),
        "num_classes": 1,
    } | TRUNK_ALONE
    return replace(model_of_trunk(build_config(table | clips)), name=run.resolve().name)


def file_config(recipe: str | None, method: str | None, trunk: str | None, options: Mapping[str, Any]) -> RunConfig:
    """Make the configuration of a file of weights: recipe, method and trunk, further options.

    Raises:
        ConfigError: they do not say which model it is, or an unknown name or value.
    """
    table = read_recipe(recipe) if recipe else {}
    table |= {key: value for key, value in (("method", method), ("trunk", trunk)) if value}
    if not {"method", "trunk"} <= table.keys():
        raise ConfigError("a file of weights does not say what it is: give --method and --trunk, or --recipe")
    return build_config(table | dict(options))


def model_of_file(path: Path, config: RunConfig) -> ModelUnderTest:
    """Open a file of weights with the names of the published code.

    Raises:
        ConfigError: it is a checkpoint of our own, whose run folder says more.
    """
    weights = find_weights(str(path))
    stamp = {"weights_file": path.name, "weights_file_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    return ModelUnderTest(path.name, config, partial(open_model, config, weights), stamp=stamp)


def model_of_trunk(config: RunConfig) -> ModelUnderTest:
    """Open a method that has no weights beyond its pretrained trunk."""
    record = training_record_of(config.trunk_weights)
    return ModelUnderTest(f"{config.method} on {config.trunk}", config, partial(_of_trunk, config), record)


def _of_trunk(config: RunConfig) -> Model:
    model = build_model(config)
    trained = [
        name
        for method in streams_of(model).values()
        for name, value in method.named_parameters()
        if not name.startswith("trunk.") and value.ndim > 1
    ]
    if trained:
        raise ConfigError(
            f"{config.method} has weights beyond its trunk ({trained[0]}, ...), which would be random: "
            "train it and give --weights RUN"
        )
    return model


def untrained_prototypes(config: RunConfig) -> ModelUnderTest:
    """Make the control: prototypes of the trunk as a run of this configuration starts with it.

    The trunk is loaded at once.

    Raises:
        ConfigError: the trunk's weights are missing or do not fit.
    """
    config = prototypes_of_trunk(config)
    model = build_model(config)
    return ModelUnderTest(
        f"prototypes of {config.trunk}", config, lambda: model, training_record_of(config.trunk_weights)
    )
