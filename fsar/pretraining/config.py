"""The configuration of a pre-training run: one flat table, from a recipe, overridden by options, saved with the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

from fsar.pretraining import PRETRAINING, find_pretraining, pretraining_options
from fsar.run.flat_config import FlatConfig, option_types, typed
from fsar.run.recipes import near_names, read_table, shipped
from pipelines.clips.flow import FlowPairRules
from pipelines.clips.windows import PairRules, WindowRules
from shards_spec.errors import ConfigError, suggest
from shards_spec.schema import flow_pairs

CHOICES: dict[str, tuple[str, ...]] = {
    "schedule": ("cosine", "step", "warmup_step"),
    "precision": ("fp32", "bf16"),
    "executor": ("auto", "dali", "portable"),
    "blur_sigma": ("fixed", "per_sample"),
    "jitter_sync": ("clip", "frame"),
    "flow_layout": ("intended", "released"),
}
# Smallest sensible values.
LEAST = dict.fromkeys(("clip_frames", "clip_stride", "crop", "batch", "epochs", "checkpoint_every", "log_every"), 1)
LEAST |= {"checkpoint_parts": 0, "prefetch": 1, "list": 1, "queue": 1, "dim": 1, "dense_queue": 0}
LEAST |= dict.fromkeys(("threads", "seed", "lr_factor", "warmup_lr", "sgd_momentum", "weight_decay", "clip_norm"), 0)

RULES = {"fima": WindowRules, "moco": PairRules, "mscl": FlowPairRules}  # how clips are drawn
# How a method's views are made of its clips, beside what the method itself decides.
LOOKS: dict[str, dict[str, object]] = {
    "fima": {"blur_sigma": "fixed"},
    "moco": {"jitter_sync": "clip"},
    "mscl": {"jitter_sync": "clip", "flow_layout": "intended", "flip_negate_u": False},
}
# Options that follow from others.
DERIVED = frozenset({"trunk", "total", "frames", "stride", "crop", "extra_frame", "flow_crops"})


@dataclass(frozen=True)
class PretrainConfig(FlatConfig):
    """Every value of a run; `options` holds what only the method, its clips and its views understand."""

    # No result depends on these, up to rounding on other devices.
    FREE: ClassVar[frozenset[str]] = frozenset(
        {"device", "executor", "threads", "prefetch", "log_every", "checkpoint_every"}
        | {"checkpoint_activations", "checkpoint_parts"}
    )

    method: str
    trunk: str
    dataset: str = ""  # the data set that the recipe is meant for
    split: str = "train"  # whose videos are read, without their labels; "all": every one
    lists: str = (
        ""  # in place of a split: official lists of UCF101 or HMDB51 (a folder), whose training videos are read
    )
    list: int = 1  # which of the official lists
    weights: str = ""  # that the trunk starts from: a file, a run folder, "fetch"; empty: random ones
    # Clips
    clip_frames: int = 16
    clip_stride: int = 2  # of flow positions for mscl
    crop: int = 224
    # Optimisation: SGD; an epoch reads each video once, the last ones that fill no batch left out
    batch: int = 64  # videos a step
    epochs: int = 100
    lr: float = 0.01
    schedule: str = "cosine"  # per epoch
    milestones: tuple[float, ...] = ()  # epochs, of the other schedules
    lr_factor: float = 0.1  # at each milestone
    warmup_lr: float = 0.0025
    sgd_momentum: float = 0.9
    weight_decay: float = 1e-4
    clip_norm: float = 0.0  # largest norm of the gradient; 0: any
    checkpoint_every: int = 500  # steps
    log_every: int = 20  # steps
    seed: int = 0
    # Execution
    precision: str = "fp32"  # or "bf16": autocast; losses, parameters and optimiser stay float32
    checkpoint_activations: bool = False  # compute the trunk's inner values twice, to keep a fraction of them
    checkpoint_parts: int = 0  # only those of so many of its first parts, which hold the most; 0: as the line above
    device: str = "auto"
    executor: str = "auto"
    threads: int = 0  # 0: one a core
    prefetch: int = 2
    options: dict[str, Any] = field(default_factory=dict)

    def value(self, option: str) -> Any:  # noqa: ANN401 -- of any kind
        """An option of the method, its clips or its views: what was set, or its default."""
        return self.options[option] if option in self.options else option_defaults(self.method)[option]

    def part(self, known: Mapping[str, object]) -> dict[str, Any]:
        """The options that were set among those `known`."""
        return {key: value for key, value in self.options.items() if key in known}


TYPES: dict[str, Any] = {
    key: kind for key, kind in get_type_hints(PretrainConfig).items() if key not in ("options", "FREE")
}


def rule_defaults(method: str) -> dict[str, object]:
    """Options of how a method's clips are drawn, and their defaults."""
    defaults = {each.name: each.default for each in fields(RULES[method])}
    return {key: value for key, value in defaults.items() if value is not None and value is not MISSING}


def option_defaults(method: str) -> dict[str, object]:
    """Every option that a recipe of a method may set beside the fields of the configuration, and its default."""
    find_pretraining(method)
    known = pretraining_options(method) | rule_defaults(method) | LOOKS[method]
    return {key: value for key, value in known.items() if key not in DERIVED}


def all_option_types() -> dict[str, Any]:
    """The same of all methods, with the kinds of the values."""
    defaults: dict[str, object] = {}
    for name in PRETRAINING:
        defaults |= option_defaults(name)
    return option_types(defaults)


def build_pretrain_config(values: Mapping[str, Any]) -> PretrainConfig:
    """Check a flat table and make the configuration.

    Raises:
        ConfigError: an unknown key (the nearest is named), or a value of another type or outside the choices.
    """
    for key in ("method", "trunk"):
        if key not in values:
            raise ConfigError(f'the configuration has no "{key}"; take a recipe, or set it')
    method = str(values["method"])
    hints = option_types(option_defaults(method))
    for key in values:
        if key not in TYPES and key not in hints:
            raise ConfigError(f'unknown key "{key}" for method {method}; {suggest(key, TYPES.keys() | hints)}')
    loop = {key: typed(key, values[key], TYPES[key]) for key in values if key in TYPES}
    options = {key: typed(key, values[key], hints[key]) for key in values if key in hints}
    config = PretrainConfig(**loop, options=options)
    _check(config)
    return config


def _check(config: PretrainConfig) -> None:
    table = config.flat()
    for key, choices in CHOICES.items():
        if key in table and table[key] not in choices:
            raise ConfigError(f'{key} = "{table[key]}": {suggest(str(table[key]), choices)}')
    for key, least in LEAST.items():
        if key in table and table[key] < least:
            raise ConfigError(f"{key} = {table[key]}: must be at least {least}")
    if config.lr <= 0:
        raise ConfigError(f"lr = {config.lr}: must be above 0")
    if config.lists and config.split != "train":
        raise ConfigError(f'lists = "{config.lists}" and split = "{config.split}" both choose videos: leave one out')
    if config.list > 1 and not config.lists:
        raise ConfigError(f"list = {config.list} chooses one of the official lists: give lists, or leave it out")
    if config.batch < 2:
        raise ConfigError(f"batch = {config.batch}: BatchNorm and contrast need at least 2 videos")
    if config.schedule != "cosine" and not config.milestones:
        raise ConfigError(f'schedule = "{config.schedule}" needs milestones: the epochs at which the rate changes')


def pretrain_recipe_names() -> list[str]:
    """Names of the pre-training recipes that ship with the project."""
    return sorted(shipped("pretraining.toml"))


def read_pretrain_recipe(name: str) -> dict[str, Any]:
    """Read a recipe: a name that ships with the project, or a TOML file.

    Raises:
        ConfigError: there is none, or it is no flat TOML.
    """
    names = pretrain_recipe_names()
    return read_table(name, shipped("pretraining.toml"), hint=f"{near_names(name, names)}(known: {', '.join(names)})")


def choose_pretrain_recipe(dataset: str, method: str) -> str:
    """The recipe that ships for a method and data set: its own, or that of the published run.

    Raises:
        ConfigError: the method is unknown.
    """
    find_pretraining(method)
    own = f"{method}-{'tiny' if dataset == 'synthetic' else dataset}"
    return own if own in pretrain_recipe_names() else {"fima": "fima-kinetics400"}.get(method, f"{method}-r18")


def frame_stride(config: PretrainConfig) -> int:
    """Distance of a clip's frames in the video; MSCL counts its own in positions of its flow."""
    pairs = flow_pairs(str(config.value("flow_series"))) if config.method == "mscl" else None
    return config.clip_stride * (pairs[1] if pairs else 1)


def pretrain_config_of(run: Path) -> PretrainConfig:
    """The configuration of a run folder of fsar-pretrain.

    Raises:
        ConfigError: it is none, or its configuration is damaged.
    """
    path = run / "config.toml"
    if not path.is_file():
        raise ConfigError(f"{run} is no run folder (it has no config.toml); give one that fsar-pretrain wrote")
    return build_pretrain_config(read_pretrain_recipe(str(path)))
