"""The configuration of a run: one flat table, from a recipe, overridden by options, saved with the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

from fsar.methods import METHODS, method_options
from fsar.run.flat_config import FlatConfig, option_types, typed
from fsar.run.recipes import STYLES, bound_options, read_recipe
from shards_spec.errors import ConfigError, suggest

CHOICES: dict[str, tuple[str, ...]] = {
    "recipe_style": STYLES,
    "lr_clock": ("reference", "single"),
    "decay_norms": ("reference", "none"),
    "test_frames": ("random", "centre"),
    "kinetics_window": ("reference", "whole"),
    "select_on": ("val", "test", "last"),
    "precision": ("fp32", "bf16"),
    "memory_format": ("auto", "contiguous", "channels-last"),
    "groups": ("disjoint", "any"),
    "small_classes": ("refuse", "drop"),
    "tasks": ("labels", "augment"),
    "executor": ("auto", "dali", "portable"),
}
# What may differ between a run and its resumption: no result depends on it, up to rounding on other devices.
FREE = frozenset({"device", "executor", "threads", "prefetch", "log_every", "test_episodes"})
FREE |= {"graph", "checkpoint_activations", "checkpoint_parts", "feature_cache"}
# Smallest sensible values.
LEAST = dict.fromkeys(("way", "test_way"), 2) | dict.fromkeys(("seed", "eval_seed", "threads", "num_classes"), 0)
LEAST |= {"checkpoint_parts": 0, "resize_width": 0, "views": 0, "clip_frames": 0, "clip_stride": 1}
LEAST |= dict.fromkeys(("unlabelled_per_class", "distractor_classes", "distractors_per_class"), 0)
LEAST |= dict.fromkeys(("shot", "queries", "test_shot", "test_queries", "frames", "resize", "crop", "prefetch"), 1)
LEAST |= dict.fromkeys(("episodes", "episodes_per_step", "val_every", "val_episodes", "test_episodes", "lr_epoch"), 1)
LEAST |= dict.fromkeys(("checkpoint_every", "log_every", "cached_views"), 1) | dict.fromkeys(
    ("warmup_lr", "weight_decay"), 0
)
# Options of methods that a run derives itself.
DERIVED = frozenset({"trunk", "channels", "frames", "num_classes"})


@dataclass(frozen=True)
class RunConfig(FlatConfig):
    """Every value of a run; `options` holds what only the method understands."""

    FREE: ClassVar[frozenset[str]] = FREE

    method: str
    trunk: str
    # A file with torchvision's names, a run folder, "fetch" for the published file, or "random"; empty is refused.
    trunk_weights: str = ""
    dataset: str = ""  # the data set that the recipe is meant for
    class_text: str = ""  # a file of fsar-text, for methods that read the texts of classes
    num_classes: int = 0  # rows of the auxiliary classifier; 0: one a training class
    recipe_style: str = "fixed"
    # Episodes
    way: int = 5
    shot: int = 1
    queries: int = 6  # per class, in training
    test_way: int = 5
    test_shot: int = 1
    test_queries: int = 1
    groups: str = "disjoint"  # support and query share no group, or only no video
    small_classes: str = "refuse"  # or "drop" the classes with too few videos for an episode
    # Unlabelled videos, in training and evaluation
    unlabelled_per_class: int = 0
    distractor_classes: int = 0  # of which an episode has unlabelled videos alone
    distractors_per_class: int = 0  # 0: unlabelled_per_class
    labelled_fraction: float = 1.0  # below 1 the rest of each class is only ever unlabelled
    # Training without labels
    tasks: str = "labels"  # or "augment": each video is a class of its own, its queries are views of it
    labels: str = ""  # a CSV file of video,cluster whose clusters replace the training classes
    # Frames
    frames: int = 8
    frame_rule: str = "segment"
    clip_frames: int = 0  # of each clip that a video trunk reads, with the frame rule segment_clips; 0: single frames
    clip_stride: int = 1
    test_frames: str = "centre"
    views: int = 0  # random views of a test video that are embedded once each; 0: random frames anew in each episode
    kinetics_window: str = "whole"
    resize: int = 256  # height before the crop
    resize_width: int = 0  # 0: as the height
    crop: int = 224
    random_crop: bool = True
    query_flip: bool = True
    query_jitter: bool = True
    # What comes after the trunk is trained alone, from features of a few views of each video
    freeze_trunk: bool = False
    cached_views: int = 4
    feature_cache: str = ""  # folder of the features; empty: that of the run
    # Optimisation; the clock counts episodes
    episodes: int = 6000
    episodes_per_step: int = 4
    lr: float = 5e-5
    warmup_lr: float = 1e-5
    lr_clock: str = "single"
    lr_epoch: int = 2000  # episodes in an epoch of the clock
    lr_steps: tuple[float, ...] = (0.0,)  # epochs at which the rate changes
    lr_factors: tuple[float, ...] = (1.0,)
    weight_decay: float = 1e-3
    decay_norms: str = "none"
    # Validation, test, checkpoints: in episodes
    val_every: int = 500
    val_episodes: int = 1000
    test_episodes: int = 10_000
    select_on: str = "val"
    checkpoint_every: int = 500
    log_every: int = 20
    seed: int = 0
    eval_seed: int = 0
    # Execution
    # or "bf16": autocast; matching, losses, parameters and optimiser stay float32. On a CPU it is slower than float32,
    # unless that has AMX.
    precision: str = "fp32"
    # Order in memory of a trunk's maps. "auto": channels last on a CPU and in bf16, where it is faster, else the
    # trunk's own. Sums of BatchNorm in training differ by it (about 1e-4 at 224 x 224).
    memory_format: str = "auto"
    checkpoint_activations: bool = False  # compute the trunk's inner values twice, to keep a fraction of them
    checkpoint_parts: int = 0  # only those of so many of its first parts, which hold the most; 0: as the line above
    graph: bool = True  # replay the training step as a CUDA graph; a CPU has none
    device: str = "auto"
    executor: str = "auto"
    threads: int = 0  # 0: one a core
    prefetch: int = 2
    options: dict[str, Any] = field(default_factory=dict)


TYPES: dict[str, Any] = {key: kind for key, kind in get_type_hints(RunConfig).items() if key not in ("options", "FREE")}


def method_option_types() -> dict[str, Any]:
    """Every option of the methods of the registry that a recipe may set, with the type of its default."""
    defaults: dict[str, object] = {}
    for name in METHODS:
        defaults |= {key: value for key, value in method_options(name).items() if key not in DERIVED}
    return option_types(defaults)


def build_config(values: Mapping[str, Any]) -> RunConfig:
    """Check a flat table and make the configuration.

    Raises:
        ConfigError: an unknown key (the nearest is named), a value of another type or outside the choices,
            or options of both recipe styles.
    """
    for key in ("method", "trunk"):
        if key not in values:
            raise ConfigError(f'the configuration has no "{key}"; take a recipe, or set it')
    allowed = set(method_options(str(values["method"]))) - DERIVED
    for key in values:
        if key not in TYPES and key not in allowed:
            raise ConfigError(
                f'unknown key "{key}" for method {values["method"]}; {suggest(key, TYPES.keys() | allowed)}'
            )
    loop = {key: typed(key, values[key], TYPES[key]) for key in values if key in TYPES}
    hints = method_option_types()
    options = {k: typed(k, v, hints.get(k, Any)) for k, v in values.items() if k not in TYPES}
    config = RunConfig(**loop, options=options)
    _check(config)
    return config


def _check(config: RunConfig) -> None:
    for key, choices in CHOICES.items():
        if getattr(config, key) not in choices:
            raise ConfigError(f'{key} = "{getattr(config, key)}": {suggest(getattr(config, key), choices)}')
    for key, value in bound_options(config.recipe_style, config.frame_rule).items():
        if getattr(config, key) != value:
            raise ConfigError(
                f'{key} = "{getattr(config, key)}" is not of the recipe style "{config.recipe_style}" '
                f'("{value}" is): a run follows one style throughout; choose it with --recipe-style'
            )
    unlabelled = config.unlabelled_per_class or config.distractor_classes or config.labelled_fraction < 1
    if config.tasks == "augment" and (config.labels or unlabelled):
        raise ConfigError('tasks = "augment" needs no labels and no unlabelled videos: leave those options out')
    if config.views and config.test_frames != "random":
        raise ConfigError(f'views = {config.views}: test_frames = "centre" has one view of a video; leave views out')
    if config.freeze_trunk and config.tasks == "augment":
        raise ConfigError('tasks = "augment" needs a new view of a video each time: leave freeze_trunk out')
    if config.class_text and (config.labels or config.tasks == "augment"):
        raise ConfigError(
            'class_text has texts of the true classes, which training with labels or tasks = "augment" does not know: '
            "leave class_text out"
        )
    _check_numbers(config)


def _check_numbers(config: RunConfig) -> None:
    for key, least in LEAST.items():
        if getattr(config, key) < least:
            raise ConfigError(f"{key} = {getattr(config, key)}: must be at least {least}")
    if not 0 < config.labelled_fraction <= 1:
        raise ConfigError(f"labelled_fraction = {config.labelled_fraction}: must be above 0 and at most 1")
    if config.lr <= 0:
        raise ConfigError(f"lr = {config.lr}: must be above 0")
    if len(config.lr_steps) != len(config.lr_factors):
        raise ConfigError(f"lr_steps = {config.lr_steps} and lr_factors = {config.lr_factors} must be equally long")
    if len(config.options.get("position_scale", "AB")) != len("AB"):
        raise ConfigError(f"position_scale = {config.options['position_scale']}: expected two numbers, A and B")
    for key in ("val_every", "checkpoint_every", "episodes"):
        if getattr(config, key) % config.episodes_per_step:
            raise ConfigError(
                f"{key} = {getattr(config, key)} is no multiple of episodes_per_step = {config.episodes_per_step}: "
                "checkpoints lie between optimiser steps"
            )


def run_config(run: Path) -> RunConfig:
    """The configuration of a run folder.

    Raises:
        ConfigError: it is none, or its configuration is damaged.
    """
    path = run / "config.toml"
    if not path.is_file():
        raise ConfigError(f"{run} is no run folder (it has no config.toml); give one that fsar-train wrote")
    return build_config(read_recipe(str(path)))
