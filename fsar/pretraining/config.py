"""State every key of a pre-training run once, and make the configuration.

It is one flat table, saved with the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from fsar.pretraining import PRETRAINING, find_pretraining, pretraining_options
from fsar.run.config import DATA, METHOD, OUTPUT, SCHEDULE, SPEED, RunConfig
from fsar.run.flat_config import FlatConfig
from fsar.run.keys import Key, check_keys, key, keys_of, option_types, same_key, typed
from fsar.run.method_keys import GROUP
from fsar.run.names import suggest_key
from fsar.run.recipes import near_names, read_table, shipped
from pipelines.clips.flow import FlowPairRules
from pipelines.clips.windows import PairRules, WindowRules
from shards_spec.errors import ConfigError
from shards_spec.schema import flow_pairs

RULES = {"fima": WindowRules, "moco": PairRules, "mscl": FlowPairRules}  # how clips are drawn
# Options of how a method's views are made of its clips, which the method itself does not know, and
# their defaults.
LOOKS: dict[str, dict[str, object]] = {
    "fima": {"blur_sigma": "fixed"},
    "moco": {"jitter_sync": "clip"},
    "mscl": {"jitter_sync": "clip", "flow_layout": "intended", "flip_negate_u": False},
}
CLIPS = "Clips"
# Options that follow from others.
DERIVED = frozenset({"trunk", "total", "frames", "stride", "crop", "extra_frame", "flow_crops"})


@dataclass(frozen=True)
class PretrainConfig(FlatConfig):
    """Every value of a run.

    `options` holds what only the method, its clips and its views understand.
    """

    method: str = key(group=METHOD, own_option=True)
    trunk: str = key(text="Video trunk, such as i3d or r3d18.", group=METHOD, main=True)
    dataset: str = key("", group=DATA, own_option=True)  # the data set that the recipe is meant for
    split: str = key(
        "train",
        "Split whose videos are read; all: every video, and later tests say so.",
        group=DATA,
        main=True,
    )
    lists: str = key(
        "",
        "In place of --split: official lists of UCF101 or HMDB51 (a folder), or a .json or .csv file; their training "
        "videos are read.",
        group=DATA,
        main=True,
    )
    list: int = key(1, "Which of the official lists.", least=1, group=DATA)
    weights: str = key(
        "",
        "Weights that the trunk starts from: a run folder of ours, a file, or fetch; without it they are random.",
        group=METHOD,
        main=True,
    )
    # Clips
    clip_frames: int = key(16, "Frames of a clip.", least=1, group=CLIPS, main=True)
    clip_stride: int = key(
        2, "Distance of a clip's frames; for mscl in positions of its flow.", least=1, group=CLIPS, main=True
    )
    crop: int = key(224, "Side of the crops in pixels.", least=1, group=CLIPS, main=True)
    # Optimisation: SGD; an epoch reads each video once, and leaves out the last ones that fill no
    # batch
    batch: int = key(64, "Videos of a step.", least=1, group=SCHEDULE, main=True)
    epochs: int = key(100, "Times that each video is read.", least=1, group=SCHEDULE, main=True)
    lr: float = key(0.01, "Learning rate, for the whole batch.", above=0, group=SCHEDULE, main=True)
    schedule: str = key(
        "cosine",
        "How the rate changes from epoch to epoch.",
        choices=("cosine", "step", "warmup_step"),
        group=SCHEDULE,
    )
    milestones: tuple[float, ...] = key(
        (), "Epochs at which the rate changes, of the schedules step and warmup_step.", group=SCHEDULE
    )
    lr_factor: float = key(0.1, "Factor of --lr at each of --milestones.", least=0, group=SCHEDULE)
    warmup_lr: float = key(0.0025, "Rate from which the schedule warmup_step starts.", least=0, group=SCHEDULE)
    sgd_momentum: float = key(0.9, "Momentum of SGD.", least=0, group=SCHEDULE)
    weight_decay: float = key(1e-4, "Weight decay, of norms and biases too.", least=0, group=SCHEDULE)
    clip_norm: float = key(0.0, "Largest norm of the gradient; 0: any.", least=0, group=SCHEDULE)
    checkpoint_every: int = key(500, "Steps between checkpoints.", least=1, group=OUTPUT, free=True)
    log_every: int = key(20, "Steps between lines of log.jsonl.", least=1, group=OUTPUT, free=True)
    seed: int = key(0, "Seed of weights, clips and colours.", least=0, group=SCHEDULE, main=True)
    # Execution
    # bf16 is autocast: losses, parameters and the optimiser stay float32.
    precision: str = key(
        "fp32",
        "bf16: the model computes in bfloat16 where that is safe.",
        choices=("fp32", "bf16"),
        group=SPEED,
        main=True,
    )
    checkpoint_activations: bool = same_key(RunConfig, "checkpoint_activations")
    checkpoint_parts: int = same_key(RunConfig, "checkpoint_parts")
    device: str = same_key(RunConfig, "device")
    executor: str = same_key(RunConfig, "executor")
    threads: int = same_key(RunConfig, "threads")
    prefetch: int = key(2, "Steps prepared ahead.", least=1, group=SPEED, free=True)
    options: dict[str, Any] = field(default_factory=dict)

    def value(self, option: str) -> Any:  # noqa: ANN401 -- of any kind
        """Look up an option of the method, its clips or its views, or its default."""
        return self.options[option] if option in self.options else option_defaults(self.method)[option]

    def part(self, known: Mapping[str, object]) -> dict[str, Any]:
        """Select the options that were set among those `known`."""
        return {key: value for key, value in self.options.items() if key in known}


KEYS = keys_of(PretrainConfig)
# Options of methods, of their clips and of their views; defaults are those of their classes.
OPTIONS = (
    Key(name="area", help="Least and largest share of the frame that a crop covers."),
    Key(name="blur_sigma", help="Strength of the blur, one a run or one a clip.", choices=("fixed", "per_sample")),
    Key(name="clip_per_video", help="Windows drawn of a video."),
    Key(name="cross_weight", help="Weight of pictures against flow; 0 leaves it out."),
    Key(name="dense_queue", help="Keys of places that are kept as negatives; 0: none.", least=0),
    Key(name="dense_temperature", help="Divides the cosines of places."),
    Key(name="dense_weight", help="Weight of the loss of places; 0 leaves it out."),
    Key(name="diff_wrap", help="What the first frame's difference is taken from."),
    Key(name="dim", help="Numbers in an embedding.", least=1),
    Key(name="dropout", help="Dropout of the decoder."),
    Key(name="enqueue", help="When keys enter the queue: interleaved (the code) or after_step."),
    Key(name="filter_stride", help="Stride at which clips are chosen; 0: that of training."),
    Key(name="flip", help="Mirror half of the crops; not where left and right mean something."),
    Key(name="flip_negate_u", help="u of mirrored flow changes its sign; not so in the published code."),
    Key(name="flow_fields", help="Fields of a clip that are read: all, or the even ones."),
    Key(
        name="flow_layout",
        help="Which clip's turned flow is set against a view; released: as the published code has it.",
        choices=("intended", "released"),
    ),
    Key(name="flow_momentum", help="Momentum of the flow's key encoder: fixed, or released (the code)."),
    Key(name="flow_negatives", help="Negatives of flow: snapshot, or released (the code)."),
    Key(name="flow_series", help="Series of the shards that holds the flow."),
    Key(name="fra", help="Flow rotation augmentation."),
    Key(
        name="jitter_sync",
        help="Colours change by one factor a clip, or one a frame as in the published code.",
        choices=("clip", "frame"),
    ),
    Key(name="local_weight", help="Weight of windows' parts (fima), of frames against flow (mscl); 0: none."),
    Key(name="min_gap", help="Least distance of two windows' starts, in frames."),
    Key(name="momentum", help="Momentum of the key encoder."),
    Key(name="motion_filter", help="Choose clips with motion."),
    Key(name="motion_rule", help="How these are chosen: fixed, or released (the code)."),
    Key(name="parts", help="Parts of a window."),
    Key(name="pos_ratio", help="Places match that lie nearer than this share of a cell's diagonal."),
    Key(name="queue", help="Keys that are kept as negatives; no more than there are videos.", least=1),
    Key(name="short", help="What is done with videos that are too short."),
    Key(name="starts", help="Where the two clips of a video start."),
    Key(name="temperature", help="Divides the cosines."),
    Key(name="weight_aug_flow", help="Weights of turned flow: against itself, and against pictures."),
)


def rule_defaults(method: str) -> dict[str, object]:
    """Collect the options of how a method's clips are drawn, with their defaults."""
    defaults = {each.name: each.default for each in fields(RULES[method])}
    return {key: value for key, value in defaults.items() if value is not None and value is not MISSING}


def option_defaults(method: str) -> dict[str, object]:
    """Collect the further options that a recipe of a method may set, with their defaults."""
    find_pretraining(method)
    known = pretraining_options(method) | rule_defaults(method) | LOOKS[method]
    return {key: value for key, value in known.items() if key not in DERIVED}


def option_keys(*methods: str) -> dict[str, Key]:
    """Collect the options of methods, their clips and their views as keys."""
    stated = {each.name: each for each in OPTIONS}
    found = {}
    for name, kind in option_types({k: v for method in methods for k, v in option_defaults(method).items()}).items():
        readers = ", ".join(method for method in PRETRAINING if name in option_defaults(method))
        one = stated[name]
        found[name] = replace(one, kind=kind, help=f"{one.help.rstrip('.')} ({readers}).", group=GROUP)
    return found


def all_keys() -> dict[str, Key]:
    """Collect the keys of the configuration and the options of all methods."""
    return KEYS | option_keys(*PRETRAINING)


def build_pretrain_config(values: Mapping[str, Any]) -> PretrainConfig:
    """Check a flat table and make the configuration.

    Raises:
        ConfigError: an unknown key (the nearest is named), or a value of another type or outside
            the choices.
    """
    for name in ("method", "trunk"):
        if name not in values:
            raise ConfigError(f'the configuration has no "{name}"; take a recipe, or set it')
    method = str(values["method"])
    keys = KEYS | option_keys(method)
    for name in values:
        if name not in keys:
            raise ConfigError(f'unknown key "{name}" for method {method}; {suggest_key(name, keys)}')
    values = {name: typed(name, value, keys[name].kind) for name, value in values.items()}
    loop = {name: value for name, value in values.items() if name in KEYS}
    options = {name: value for name, value in values.items() if name not in KEYS}
    config = PretrainConfig(**loop, options=options)
    check_keys(values, keys.values())
    _check(config)
    return config


def _check(config: PretrainConfig) -> None:
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
        ConfigError: there is no such recipe, or it is no flat TOML.
    """
    return read_table(name, shipped("pretraining.toml"), hint=_nearest)


def _nearest(name: str) -> str:
    names = pretrain_recipe_names()
    return f"{near_names(name, names)}(known: {', '.join(names)})"


def choose_pretrain_recipe(dataset: str, method: str) -> str:
    """Name the recipe that ships for a method and data set: its own, or that of the published run.

    Raises:
        ConfigError: the method is unknown.
    """
    find_pretraining(method)
    own = f"{method}-{'tiny' if dataset == 'synthetic' else dataset}"
    return own if own in pretrain_recipe_names() else {"fima": "fima-kinetics400"}.get(method, f"{method}-r18")


def frame_stride(config: PretrainConfig) -> int:
    """Distance of a clip's frames in the video, in frames.

    MSCL's own stride counts positions of its flow.
    """
    pairs = flow_pairs(str(config.value("flow_series"))) if config.method == "mscl" else None
    return config.clip_stride * (pairs[1] if pairs else 1)


def pretrain_config_of(run: Path) -> PretrainConfig:
    """Read the configuration of a run folder of fsar-pretrain.

    Raises:
        ConfigError: it is no run folder, or its configuration is damaged.
    """
    path = run / "config.toml"
    if not path.is_file():
        raise ConfigError(f"{run} is no run folder (it has no config.toml); give one that fsar-pretrain wrote")
    return build_pretrain_config(read_pretrain_recipe(str(path)))
