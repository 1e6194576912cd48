"""Make the model of a configuration and open the episodes of its splits."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from fsar.checkpoints import load_reference_state_dict, load_state
from fsar.loader import EpisodeLoader
from fsar.methods import METHODS, FewShotMethod, Model, TwoStreams, create_method, find_method, method_options
from fsar.methods.class_text import ClassText, read_class_text
from fsar.run import ranks
from fsar.run.config import KEYS, RunConfig, build_config
from fsar.run.streams import default_motion_trunk, read_fusion, stream_weight
from fsar.run.weights import Weights, load_trunk_weights
from fsar.trunks import (
    MOTION_TRUNKS,
    Trunk,
    VideoTrunk,
    create_motion_trunk,
    create_trunk,
    parts_to_recompute,
    reading_motion,
)
from fsar.trunks.weight_files import read_tensors
from pipelines.episodes.labels import read_labels
from pipelines.episodes.motion import motion_channels
from pipelines.episodes.pools import Labels
from pipelines.episodes.rules import EpisodeRules
from pipelines.episodes.stream import Chosen
from shards_spec import ShardSet
from shards_spec.errors import ConfigError

# Where motion alone is read, no border of the frame is cut off
WHOLE_FRAME = {"resize": 256, "crop": 256}
# Keys of a run that rule only its training episodes
TRAINING_ONLY = frozenset({"way", "shot", "queries", "random_crop", "query_flip", "query_jitter", "query_reversal"})
TRUNK_ALONE = {"support_merge": "prototype"}  # options of the method "prototype", the control of other methods


def _frame_rule(config: RunConfig) -> str:
    whole = config.frame_rule == "kinetics" and config.kinetics_window == "whole"
    return "kinetics-whole" if whole else config.frame_rule


def _shared_rules(config: RunConfig) -> dict[str, Any]:
    """Collect the rules that training and evaluation share: keys of a run with their names."""
    names = {each.name for each in fields(EpisodeRules)} & KEYS.keys() - TRAINING_ONLY
    own = {name: getattr(config, name) for name in names} | {"frame_rule": _frame_rule(config)}
    return own | {"streams": streams_read(config)}


def streams_read(config: RunConfig) -> str:
    """Return what episodes carry: the streams of a run, and motion that is a method's target."""
    target = config.streams == "frames" and config.options.get("recons_target") == "flow"
    return "both" if target and config.options.get("recons_weight") else config.streams


def takes_unlabelled(config: RunConfig) -> bool:
    """Tell whether episodes of a configuration have unlabelled videos."""
    return bool(config.unlabelled_per_class or config.distractor_classes)


def check_unlabelled(config: RunConfig) -> None:
    """Refuse unlabelled videos for a method that does not read them: ConfigError."""
    if takes_unlabelled(config) and "unlabelled" not in find_method(config.method).reads:
        readers = ", ".join(name for name, method in METHODS.items() if "unlabelled" in method.reads)
        raise ConfigError(
            f"{config.method} reads no unlabelled videos: set unlabelled_per_class and distractor_classes to 0, "
            f"or choose a method that does ({readers})"
        )


def training_labels(shards: ShardSet, config: RunConfig) -> Labels | None:
    """Read the labels that replace the classes of training episodes; None for the split's.

    Raises:
        ConfigError: the label file is missing, damaged, or names a video outside the split.
    """
    if config.tasks == "augment":
        return Labels.of_single_videos(shards, "train")
    return read_labels(Path(config.labels), shards, "train") if config.labels else None


def training_rules(config: RunConfig) -> EpisodeRules:
    """Give the rules by which training episodes are drawn."""
    own = {name: getattr(config, name) for name in TRAINING_ONLY}
    return EpisodeRules(random_frames=True, **_shared_rules(config) | own)


def evaluation_rules(config: RunConfig) -> EpisodeRules:
    """Give the rules by which validation and test episodes are drawn.

    They crop the centre and augment nothing.
    """
    shape = {"way": config.test_way, "shot": config.test_shot, "queries": config.test_queries}
    return EpisodeRules(random_frames=config.test_frames == "random", **_shared_rules(config) | shape)


def class_text_of(config: RunConfig) -> ClassText | None:
    """Read the texts of classes of a run; None for a run without texts.

    Raises:
        ConfigError: the file is missing or of another form, or the method and the file do not go
            together.
    """
    if not config.class_text:
        if config.options.get("inference", "visual") != "visual":
            raise ConfigError(f'inference = "{config.options["inference"]}" needs texts: give --class-text FILE')
        return None
    if "class_text" not in find_method(config.method).reads:
        raise ConfigError(f"{config.method} reads no texts of classes: leave class_text out")
    return read_class_text(Path(config.class_text))


def class_text_sha256(config: RunConfig) -> str | None:
    """Hash the file of texts of classes that a run reads; ConfigError when it is missing."""
    if not config.class_text:
        return None
    try:
        return hashlib.sha256(Path(config.class_text).read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(
            f"cannot read class_text {config.class_text} ({error.strerror}); fsar-text makes it"
        ) from error


def open_episodes(
    shards: ShardSet,
    split: str,
    config: RunConfig,
    *,
    trunk: Trunk,
    device: torch.device,
    training: bool,
    given: Sequence[Chosen] | None = None,
) -> EpisodeLoader:
    """Open the episodes of a split for a run, of `given` videos or drawn.

    Close the loader when done.

    Raises:
        ConfigError: a class has too few videos, the rules do not fit the shards, or the label file
            is of no use.
        ShardError: there is no such split.
    """
    return EpisodeLoader(
        shards,
        split,
        training_rules(config) if training else evaluation_rules(config),
        seed=config.seed if training else config.eval_seed,
        device=device,
        executor=config.executor,
        threads=ranks.threads(config.threads),
        prefetch=config.prefetch,
        class_text=class_text_of(config),
        labels=training_labels(shards, config) if training else None,
        mean=trunk.mean,
        std=trunk.std,
        memory_format=trunk.memory_format,
        given=given,
        views=0 if training else config.views,
    )


def build_model(config: RunConfig, *, weights: bool = True) -> Model:
    """Make the model of a configuration; its random weights depend only on the seed.

    Args:
        config: The run's configuration.
        weights: Load the trunks' starting weights; not needed when a checkpoint follows.

    Raises:
        ConfigError: unknown names, or trunk weights that are missing or do not fit.
    """
    torch.manual_seed(config.seed)
    if config.streams != "both":
        return build_stream(config, weights=weights)
    frames = build_stream(replace(config, streams="frames"), weights=weights)
    motion = build_stream(of_motion(config), weights=weights)
    return TwoStreams(frames, motion, rule=stream_weight(config.stream_weight))


def of_motion(config: RunConfig) -> RunConfig:
    """Configure the motion stream of a run that reads both."""
    options = {key: value for key, value in config.options.items() if key != "inference"}
    trunk, weights = config.motion_trunk or default_motion_trunk(config.method), config.motion_trunk_weights
    return replace(config, streams="motion", class_text="", options=options, trunk=trunk, trunk_weights=weights)


def build_stream(config: RunConfig, *, weights: bool) -> FewShotMethod:
    """Make the model of frames or of motion of a configuration."""
    trunk = build_trunk(config, weights=weights)
    derived = {"trunk": trunk, "frames": config.frames, "num_classes": config.num_classes}
    known = method_options(config.method)
    derived = {key: value for key, value in derived.items() if key in known}  # not all have a classifier
    if config.streams == "motion" and "recons_weight" in known:
        derived["recons_weight"] = 0.0  # there are no pictures to be reconstructed
    return create_method(config.method, **config.options | derived)


def build_trunk(config: RunConfig, *, weights: bool) -> Trunk:
    """Make the trunk of frames or of motion of a configuration."""
    motion = motion_channels(config.motion_series) if config.streams == "motion" else 0
    made = motion > 0 and config.trunk in MOTION_TRUNKS
    trunk = create_motion_trunk(config.trunk, motion) if made else create_trunk(config.trunk)
    trunk.memory_format = memory_format(config, trunk.memory_format)
    trunk.recomputes = parts_to_recompute(all_parts=config.checkpoint_activations, first_parts=config.checkpoint_parts)
    if not motion:
        set_clips(trunk, config)
    if weights:
        load_trunk_weights(trunk, config.trunk, config.trunk_weights)
    return reading_motion(trunk, config.trunk, motion) if motion and not made else trunk


def open_model(config: RunConfig, weights: Weights) -> Model:
    """Make the model of a configuration with the weights of a run or of a published file.

    A file's auxiliary classifier is left out, as no test reads it.

    Raises:
        ConfigError: the file is missing or damaged, or does not fit the configuration.
    """
    model = build_model(config, weights=False)
    assert weights.path is not None, "fetch and random are weights of trunks"
    if weights.run is not None:
        load_state(weights.path, model)
        if isinstance(model, TwoStreams):
            model.fusion = read_fusion(weights.run, model.rule)
        return model
    try:
        load_reference_state_dict(model, read_tensors(weights.path), drop_classifier=True)
    except ConfigError as error:
        raise ConfigError(f"{weights.path}: {error}") from error
    return model


def set_clips(trunk: Trunk, config: RunConfig) -> None:
    """Set the length of a video trunk's clips.

    ConfigError when the trunk and the frames of a run do not fit.
    """
    if not isinstance(trunk, VideoTrunk):
        if config.clip_frames:
            raise ConfigError(f"trunk {config.trunk} reads single frames: leave clip_frames and segment_clips out")
        return
    if not config.clip_frames:
        raise ConfigError(
            f'trunk {config.trunk} reads clips: set frame_rule = "segment_clips", clip_frames = {trunk.clip_frames} '
            "and clip_stride, and frames to the number of clips a video"
        )
    trunk.clip_frames = config.clip_frames


def memory_format(config: RunConfig, own: torch.memory_format) -> torch.memory_format:
    """Choose the order in memory of a trunk's maps.

    It is the configured one, else the fastest, or the trunk's own.
    """
    formats = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    return formats.get(config.memory_format, torch.channels_last if on_cpu or config.precision == "bf16" else own)


def prototypes_of_trunk(config: RunConfig) -> RunConfig:
    """Make the control of a run: cosine prototypes of its trunk, without texts.

    It takes no unlabelled videos either, and of two streams only the frames.
    """
    plain = replace(config, class_text="", unlabelled_per_class=0, distractor_classes=0)
    streams = "frames" if config.streams == "both" else config.streams
    return replace(plain, method="prototype", options=TRUNK_ALONE, streams=streams)


def motion_alone(**values: Any) -> RunConfig:  # noqa: ANN401 -- keys of a configuration
    """Configure stored motion without training, on whole frames; `values` are further keys."""
    return build_config({"method": "motion", "trunk": "flow-grid", "num_classes": 1} | WHOLE_FRAME | values)


def untrained_motion(config: RunConfig, shards: ShardSet) -> RunConfig | None:
    """Make the control of a run by stored motion: the method motion, on whole frames.

    None where the shards store none, or the run is this control itself.
    """
    itself = (config.method, config.trunk) == ("motion", "flow-grid")
    if itself or config.motion_series not in shards.series_names:
        return None
    plain = replace(config, class_text="", unlabelled_per_class=0, distractor_classes=0)
    side = min(config.resize, config.resize_width or config.resize)
    plain = replace(plain, frame_rule="segment", clip_frames=0, crop=side)
    return replace(plain, method="motion", options={}, streams="motion", trunk="flow-grid", trunk_weights="random")


def frozen_prototypes(config: RunConfig) -> FewShotMethod:
    """Make cosine prototypes of the trunk as a run starts with it.

    They are the control that shows the gain of training.

    Raises:
        ConfigError: the trunk's weights are missing or do not fit.
    """
    torch.manual_seed(config.seed)
    return build_stream(prototypes_of_trunk(config), weights=True)
