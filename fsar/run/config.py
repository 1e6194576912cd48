"""State every key of a training run once, and make the configuration.

It is one flat table, saved with the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fsar.methods import method_options
from fsar.run.flat_config import FlatConfig
from fsar.run.keys import Key, check_keys, key, keys_of, typed
from fsar.run.method_keys import DERIVED, method_keys
from fsar.run.names import suggest_key
from fsar.run.recipes import STYLES, bound_options, read_recipe
from fsar.run.streams import check_streams, of_streams
from pipelines.episodes.motion import CAMERAS, STREAMS
from shards_spec.errors import ConfigError

DATA, METHOD, EPISODES, FRAMES = "Data", "Method", "Episodes", "Frames"
SCHEDULE, SPEED, OUTPUT = "Schedule", "Speed", "Output"


@dataclass(frozen=True)
class RunConfig(FlatConfig):
    """Every value of a run; `options` holds the options that only the method knows."""

    method: str = key(group=METHOD, own_option=True, recorded="method")
    trunk: str = key(text="Network under the method, such as resnet50.", group=METHOD, main=True)
    trunk_weights: str = key(
        "",
        "Its starting weights, which most recipes require: a file, a run folder, fetch (download), or random.",
        group=METHOD,
        main=True,
    )
    streams: str = key(
        "frames",
        "What is read of a video: frames, stored motion, or both (two models, whose answers are mixed).",
        choices=STREAMS,
        group=METHOD,
        main=True,
        evaluation="streams",
        recorded="streams",
    )
    motion_series: str = key(
        "flow1",
        "Series of the shards that motion is read from.",
        group=METHOD,
        evaluation="motion_series",
        recorded="motion_series",
    )
    fields: int = key(
        4,
        "Fields of motion read of each segment of a video; 0: all.",
        least=0,
        group=METHOD,
        evaluation="fields",
        recorded="fields",
    )
    camera: str = key(
        "median",
        "What is taken for the camera's motion and subtracted: each field's median, or none.",
        choices=CAMERAS,
        group=METHOD,
        evaluation="camera",
        recorded="camera",
    )
    motion_trunk: str = key(
        "", "Network under the method on motion.  [auto: tiny-flow; of the method motion flow-grid]", group=METHOD
    )
    motion_trunk_weights: str = key("random", "Its starting weights, as of --trunk-weights.", group=METHOD)
    stream_weight: str = key(
        "train",
        "Share of motion in the answers of both streams: a number from 0 to 1; train: the best on val (or train) "
        "classes; support: the best within each episode's support, of 2 shots or more.",
        group=METHOD,
        evaluation="stream_weight",
        recorded="stream_weight",
    )
    dataset: str = key("", group=DATA, own_option=True)  # the data set that the recipe is meant for
    class_text: str = key("", "File of fsar-text, for methods that read it.", group=METHOD, evaluation="class_text")
    num_classes: int = key(0, "Rows of the auxiliary classifier; 0: one a training class.", least=0, group=METHOD)
    recipe_style: str = key("fixed", choices=STYLES, group=METHOD, own_option=True, recorded="recipe_style")
    # Episodes
    way: int = key(5, "Classes of an episode in training.", least=2, group=EPISODES, main=True)
    shot: int = key(
        1,
        "Support videos of each class in training; without --recipe it chooses the recipe.",
        least=1,
        group=EPISODES,
        main=True,
    )
    queries: int = key(6, "Queries of each class in training.", least=1, group=EPISODES)
    test_way: int = key(
        5,
        "Classes of an episode in validation and test.",
        least=2,
        group=EPISODES,
        evaluation="way",
        recorded="way",
    )
    test_shot: int = key(
        1,
        "Support videos of each class in validation and test.",
        least=1,
        group=EPISODES,
        evaluation="shot",
        recorded="shot",
    )
    test_queries: int = key(
        1,
        "Queries of each class in validation and test.",
        least=1,
        group=EPISODES,
        evaluation="queries",
        recorded="queries",
    )
    groups: str = key(
        "disjoint",
        "Support and query of a class share no group (such as a source video), or any.",
        choices=("disjoint", "any"),
        group=EPISODES,
        evaluation="groups",
    )
    small_classes: str = key(
        "refuse",
        "Classes with too few videos for an episode.",
        choices=("refuse", "drop"),
        group=EPISODES,
        evaluation="small_classes",
    )
    # Unlabelled videos, in training and evaluation
    unlabelled_per_class: int = key(
        0,
        "Unlabelled videos of each class in an episode.",
        least=0,
        group=EPISODES,
        evaluation="unlabelled_per_class",
        recorded="unlabelled_per_class",
    )
    distractor_classes: int = key(
        0,
        "Further classes of an episode, with only unlabelled videos.",
        least=0,
        group=EPISODES,
        evaluation="distractor_classes",
        recorded="distractor_classes",
    )
    distractors_per_class: int = key(
        0,
        "Videos of each such class; 0: as --unlabelled-per-class.",
        least=0,
        group=EPISODES,
        evaluation="distractors_per_class",
        recorded="distractors_per_class",
    )
    labelled_fraction: float = key(
        1.0,
        "Share of each class that may be labelled; the rest is unlabelled only.",
        above=0,
        most=1,
        group=EPISODES,
        recorded="labelled_fraction",
    )
    # Training without labels
    tasks: str = key(
        "labels",
        "augment: each video is a class, its queries are views of it.",
        choices=("labels", "augment"),
        group=EPISODES,
    )
    labels: str = key("", "CSV file of fsar-cluster whose clusters replace the training classes.", group=DATA)
    # Frames
    frames: int = key(
        8,
        "Frames that the model sees of a video, or clips of it for a video trunk.",
        least=1,
        group=EPISODES,
        main=True,
    )
    frame_rule: str = key("segment", "How frames are chosen; the recipe's is that of its data set.", group=FRAMES)
    clip_frames: int = key(
        0, "Frames of each clip that a video trunk reads; 0: it reads single frames.", least=0, group=FRAMES
    )  # goes with the frame rule segment_clips
    clip_stride: int = key(1, "Distance of a clip's frames in the video.", least=1, group=FRAMES)
    test_frames: str = key("centre", "Frames of validation and test clips.", choices=("random", "centre"), group=FRAMES)
    views: int = key(
        0,
        "Random views of a test video, embedded once each; 0: anew in every episode.",
        least=0,
        group=FRAMES,
        evaluation="views",
        recorded="views",
    )
    kinetics_window: str = key(
        "whole",
        "With the frame rule of Kinetics: where a clip may lie.",
        choices=("reference", "whole"),
        group=FRAMES,
    )
    resize: int = key(256, "Height of frames before the crop, in pixels.", least=1, group=FRAMES)
    resize_width: int = key(0, "Their width; 0: as the height.", least=0, group=FRAMES)
    crop: int = key(224, "Side of the square that the model sees, in pixels.", least=1, group=FRAMES)
    random_crop: bool = key(True, "Crop at random in training.", group=FRAMES)
    query_flip: bool = key(True, "Flip queries of training at random.", group=FRAMES)
    query_jitter: bool = key(True, "Change the colours of queries of training.", group=FRAMES)
    query_reversal: bool = key(False, "Run queries of training backwards at random.", group=FRAMES)
    # The trunk stays as it is: what comes after it is trained from features of a few views of each
    # video
    freeze_trunk: bool = key(
        False,
        "Train what comes after the trunk, from features that are computed once.",
        group=SPEED,
        recorded="freeze_trunk",
    )
    cached_views: int = key(4, "With --freeze-trunk: random views of each video.", least=1, group=SPEED)
    feature_cache: str = key(
        "",
        "With --freeze-trunk: folder of features that runs share; without it they lie in the run folder.",
        group=SPEED,
        free=True,
    )
    # Optimisation; the clock counts episodes
    episodes: int = key(6000, "Episodes of training in all.", least=1, group=SCHEDULE, main=True)
    episodes_per_step: int = key(
        4, "Episodes whose gradients make one step of the optimiser.", least=1, group=SCHEDULE, main=True
    )
    lr: float = key(5e-5, "Learning rate.", above=0, group=SCHEDULE, main=True)
    warmup_lr: float = key(1e-5, "Learning rate at the start of the warm-up.", least=0, group=SCHEDULE)
    lr_clock: str = key(
        "single",
        "How the rate's clock counts; the recipe style decides it.",
        choices=("reference", "single"),
        group=SCHEDULE,
    )
    lr_epoch: int = key(2000, "Episodes in an epoch of that clock.", least=1, group=SCHEDULE)
    lr_steps: tuple[float, ...] = key((0.0,), "Epochs at which the rate changes.", group=SCHEDULE)
    lr_factors: tuple[float, ...] = key((1.0,), "Factor of --lr from each of --lr-steps on.", group=SCHEDULE)
    weight_decay: float = key(1e-3, "Weight decay.", least=0, group=SCHEDULE)
    decay_norms: str = key(
        "none",
        "Weight decay of norms, as the published code has it or not at all.",
        choices=("reference", "none"),
        group=SCHEDULE,
    )
    # Validation, test, checkpoints: in episodes
    val_every: int = key(500, "Episodes between validations.", least=1, group=SCHEDULE)
    val_episodes: int = key(1000, "Episodes of a validation.", least=1, group=SCHEDULE)
    test_episodes: int = key(
        10_000, "Episodes of the test.", least=1, group=SCHEDULE, free=True, main=True, evaluation="episodes"
    )
    select_on: str = key(
        "val", "Split that chooses the checkpoint; last: none does.", choices=("val", "test", "last"), group=SCHEDULE
    )
    checkpoint_every: int = key(500, "Episodes between checkpoints.", least=1, group=OUTPUT)
    log_every: int = key(20, "Episodes between lines of log.jsonl.", least=1, group=OUTPUT, free=True)
    seed: int = key(0, "Seed of weights and training episodes.", least=0, group=SCHEDULE, main=True)
    eval_seed: int = key(0, "Seed of the validation and test episodes.", least=0, group=SCHEDULE, evaluation="seed")
    # Execution
    # bf16 is autocast: matching, losses, parameters and the optimiser stay float32.
    precision: str = key(
        "fp32",
        "bf16: compute in bfloat16 where that is safe; on a CPU faster only with AMX.",
        choices=("fp32", "bf16"),
        group=SPEED,
        main=True,
        evaluation="precision",
    )
    # Sums of BatchNorm in training differ by the order (about 1e-4 at 224 x 224), hence it is not
    # free.
    memory_format: str = key(
        "auto",
        "Order of maps in memory; auto: channels-last on a CPU and in bf16, else the trunk's own.",
        choices=("auto", "contiguous", "channels-last"),
        group=SPEED,
    )
    checkpoint_activations: bool = key(
        False, "Compute the trunk's stages again in backward: less memory, more time.", group=SPEED, free=True
    )
    checkpoint_parts: int = key(
        0,
        "The same for only its first parts (stem, stages), which hold most; 0: for all, or none.",
        least=0,
        group=SPEED,
        free=True,
    )
    graph: bool = key(True, "On a GPU, replay forward and backward as one CUDA graph.", group=SPEED, free=True)
    device: str = key("auto", "auto, cpu, cuda or cuda:N.", group=SPEED, free=True, main=True, evaluation="device")
    executor: str = key(
        "auto",
        "What decodes frames; auto is DALI where it is installed.",
        choices=("auto", "dali", "portable"),
        group=SPEED,
        free=True,
        evaluation="executor",
    )
    threads: int = key(0, "Threads that decode; 0: one a core.", least=0, group=SPEED, free=True, main=True)
    prefetch: int = key(2, "Episodes prepared ahead.", least=1, group=SPEED, free=True)
    options: dict[str, Any] = field(default_factory=dict)


KEYS = keys_of(RunConfig)


def all_keys() -> dict[str, Key]:
    """Collect the keys of the configuration and the options of all methods of the registry."""
    return KEYS | method_keys()


def build_config(values: Mapping[str, Any]) -> RunConfig:
    """Check a flat table and make the configuration.

    Raises:
        ConfigError: an unknown key (the nearest is named), a value of another type or outside the
            choices, or options of both recipe styles.
    """
    for name in ("method", "trunk"):
        if name not in values:
            raise ConfigError(f'the configuration has no "{name}"; take a recipe, or set it')
    known = KEYS.keys() | (set(method_options(str(values["method"]))) - DERIVED)
    for name in values:
        if name not in known:
            raise ConfigError(f'unknown key "{name}" for method {values["method"]}; {suggest_key(name, known)}')
    values = dict(values) | of_streams(values)
    loop = {name: typed(name, value, KEYS[name].kind) for name, value in values.items() if name in KEYS}
    own = method_keys()  # a method of one's own has options that these do not list
    options = {
        name: typed(name, value, own[name].kind if name in own else Any)
        for name, value in values.items()
        if name not in KEYS
    }
    config = RunConfig(**loop, options=options)
    _check(config)
    return config


def _check(config: RunConfig) -> None:
    check_keys(vars(config), KEYS.values())
    check_streams(vars(config))
    for name, value in bound_options(config.recipe_style, config.frame_rule).items():
        if getattr(config, name) != value:
            raise ConfigError(
                f'{name} = "{getattr(config, name)}" is not of the recipe style "{config.recipe_style}" '
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
    if len(config.lr_steps) != len(config.lr_factors):
        raise ConfigError(f"lr_steps = {config.lr_steps} and lr_factors = {config.lr_factors} must be equally long")
    if len(config.options.get("position_scale", "AB")) != len("AB"):
        raise ConfigError(f"position_scale = {config.options['position_scale']}: expected two numbers, A and B")
    for name in ("val_every", "checkpoint_every", "episodes"):
        if getattr(config, name) % config.episodes_per_step:
            raise ConfigError(
                f"{name} = {getattr(config, name)} is no multiple of episodes_per_step = {config.episodes_per_step}: "
                "checkpoints lie between optimiser steps"
            )


def run_config(run: Path) -> RunConfig:
    """Read the configuration of a run folder.

    Raises:
        ConfigError: it is no run folder, or its configuration is damaged.
    """
    path = run / "config.toml"
    if not path.is_file():
        raise ConfigError(f"{run} is no run folder (it has no config.toml); give one that fsar-train wrote")
    return build_config(read_recipe(str(path)))
