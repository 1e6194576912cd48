"""Every key of the configuration as a command-line option."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import click

from fsar.methods import METHODS, method_options
from fsar.run.config import CHOICES, TYPES, method_option_types
from fsar.run.flat_config import KINDS
from shards_spec.errors import ConfigError

# What the help says of a key besides its choices.
EXPLAINED = {
    "cached_views": "With --freeze-trunk: random views of each video.",
    "checkpoint_activations": "Compute the trunk's stages again in backward: less memory, more time.",
    "checkpoint_parts": "The same for its first parts alone (stem, stages), which hold most; 0: for all, or none.",
    "checkpoint_every": "Episodes between checkpoints.",
    "class_text": "File of fsar-text, for clip-fsar.",
    "clip_frames": "Frames of each clip that a video trunk reads; 0: it reads single frames.",
    "clip_stride": "Distance of a clip's frames in the video.",
    "crop": "Side of the square that the model sees, in pixels.",
    "decay_norms": "Weight decay of norms, as the published code has it or not at all.",
    "device": "auto, cpu, cuda or cuda:N.",
    "distractor_classes": "Classes of which an episode has unlabelled videos alone.",
    "distractors_per_class": "Videos of each; 0: as --unlabelled-per-class.",
    "episodes": "Episodes of training in all.",
    "episodes_per_step": "Episodes whose gradients make one step of the optimiser.",
    "eval_seed": "Seed of the validation and test episodes.",
    "executor": "What decodes frames; auto is DALI where it is installed.",
    "feature_cache": "With --freeze-trunk: folder of features that runs share.  [default: in the run folder]",
    "frame_rule": "How frames are chosen; the recipe's is that of its data set.",
    "frames": "Frames of a video that the model sees, or clips of it for a video trunk.",
    "freeze_trunk": "Train what comes after the trunk, from features that are computed once.",
    "graph": "On a GPU, replay forward and backward as one CUDA graph.",
    "groups": "Support and query of a class share no group, or any.",
    "kinetics_window": "With the frame rule of Kinetics: where a clip may lie.",
    "labelled_fraction": "Share of each class that may be labelled; the rest is unlabelled only.",
    "labels": "CSV file of fsar-cluster whose clusters replace the training classes.",
    "log_every": "Episodes between lines of log.jsonl.",
    "lr": "Learning rate.",
    "lr_clock": "How the rate's clock counts; the recipe style decides it.",
    "lr_epoch": "Episodes in an epoch of that clock.",
    "lr_factors": "Factor of --lr from each of --lr-steps on.",
    "lr_steps": "Epochs at which the rate changes.",
    "memory_format": "Order of maps in memory; auto: channels-last on a CPU and in bf16, else the trunk's own.",
    "num_classes": "Rows of the auxiliary classifier; 0: one a training class.",
    "precision": "bf16: the model computes in bfloat16 where that is safe; on a CPU faster with AMX alone.",
    "prefetch": "Episodes prepared ahead.",
    "queries": "Queries of each class in training.",
    "query_flip": "Flip queries of training at random.",
    "query_jitter": "Change the colours of queries of training.",
    "random_crop": "Crop at random in training.",
    "resize": "Height of frames before the crop.",
    "resize_width": "Their width; 0: as the height.",
    "seed": "Seed of weights and training episodes.",
    "select_on": "Split that chooses the checkpoint; last: none does.",
    "shot": "Support videos of each class in training; without --recipe it chooses the recipe.",
    "small_classes": "Classes with too few videos for an episode.",
    "tasks": "augment: each video is a class, its queries are views of it.",
    "test_episodes": "Episodes of the test.",
    "test_frames": "Frames of validation and test clips.",
    "test_queries": "Queries of each class in validation and test.",
    "test_shot": "Support videos of each class in validation and test.",
    "test_way": "Classes of an episode in validation and test.",
    "threads": "Threads that decode; 0: one a core.",
    "trunk": "Network under the method, such as resnet50.",
    "trunk_weights": "Its starting weights: a file, a run folder, fetch (download), or random.",
    "unlabelled_per_class": "Unlabelled videos of each class in an episode.",
    "val_episodes": "Episodes of a validation.",
    "val_every": "Episodes between validations.",
    "views": "Random views of a test video, embedded once each; 0: anew in every episode.",
    "warmup_lr": "Rate from which --lr is approached.",
    "way": "Classes of an episode in training.",
    "weight_decay": "Weight decay.",
}
# Keys that the commands have as options of their own, or that only recipes set.
OWN = frozenset({"dataset", "method", "recipe_style"})


check_option = click.option(
    "--check", is_flag=True, help="Compare the CRC-32 of every picture with the index while it is read."
)


def config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add one option a key of the configuration; those that are not given stay out of the overrides."""
    kinds = TYPES | method_option_types()
    flags = {key for key, kind in kinds.items() if kind is bool}
    return key_options(set(kinds) - OWN, _help, flags=flags)(command)


def key_options(
    keys: Iterable[str], help_of: Callable[[str], str], *, flags: Collection[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The same for other keys; `help_of` says what each means, and one of `flags` alone means true."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for key in sorted(keys, reverse=True):
            said: dict[str, Any] = {"default": None, "metavar": "VALUE", "help": help_of(key)}
            if key in flags:
                said |= {"is_flag": False, "flag_value": "true"}
            command = click.option(f"--{key.replace('_', '-')}", key, **said)(command)
        return command

    return add


def _help(key: str) -> str:
    """What a key means and takes; of a method's own, which methods have it."""
    kind = (TYPES | method_option_types())[key]
    text = EXPLAINED.get(key) or f"Of {', '.join(name for name in METHODS if key in method_options(name))}."
    if key in CHOICES:
        return f"{text}  [{'|'.join(CHOICES[key])}]"
    return f"{text}  [true|false]" if kind is bool else text


def overrides(given: dict[str, Any], kinds: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The options that were given, as values of their `kinds`; without these, those of training's configuration.

    Raises:
        ConfigError: a value that is none of its kind.
    """
    kinds = TYPES | method_option_types() if kinds is None else kinds
    return {key: parse(key, text, kinds[key]) for key, text in given.items() if text is not None}


def parse_pairs(pairs: Iterable[str]) -> dict[str, Any]:
    """Options of a configuration from words KEY=VALUE.

    Raises:
        ConfigError: a word without "=", or a value that is none of its kind.
    """
    kinds, values = TYPES | method_option_types(), {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError(f"--option {pair}: expected KEY=VALUE")
        key = key.replace("-", "_")
        values[key] = parse(key, text, kinds.get(key, Any))
    return values


def parse(key: str, text: str, kind: Any) -> Any:  # noqa: ANN401 -- any kind of a value is what it makes
    """One value from its text.

    Raises:
        ConfigError: it is none of its kind.
    """
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind in (int, float, str):
            return kind(text)
        if kind is Any:  # an option whose default is None: a number where it reads as one
            return _number_or_text(text)
        return [float(part) for part in text.split(",")]
    except (ValueError, KeyError):
        expected = KINDS.get(kind, "numbers with commas between them")
        raise ConfigError(f"--{key.replace('_', '-')} {text}: expected {expected}") from None


def _number_or_text(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
