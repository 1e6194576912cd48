"""Test one model or several on the same episodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fsar.checkpoints import TrainingRecord
from fsar.evaluation.accuracy import answer
from fsar.evaluation.embeddings import EmbeddingStore
from fsar.evaluation.fusion import SUPPORT
from fsar.evaluation.intervals import Answers
from fsar.evaluation.overlap import Overlap, check_overlap, find_overlap
from fsar.loader import EpisodeLoader, check_views
from fsar.methods import Model, TwoStreams, find_method
from fsar.run import ranks
from fsar.run.build import check_unlabelled, class_text_of, evaluation_rules, open_episodes, takes_unlabelled
from fsar.run.config import RunConfig
from fsar.run.device import choose_device
from fsar.run.streams import check_streams, stream_weight
from pipelines.episodes.file import EpisodeFile, read_episodes, write_episodes
from pipelines.episodes.stream import Chosen, EpisodeStream
from shards_spec import ShardSet
from shards_spec.errors import ConfigError


@dataclass(frozen=True)
class ModelUnderTest:
    """Weights that are to be tested.

    Attributes:
        name: Its name for people.
        config: Its configuration.
        load: Make the model, on the CPU.
        trained_on: Classes and videos of its training; None where nothing tells.
        stamp: Further facts for its result.
    """

    name: str
    config: RunConfig
    load: Callable[[], Model]
    trained_on: TrainingRecord | None = None
    stamp: dict[str, Any] = field(default_factory=dict)


# Keys that decide which videos make up an episode: one value for all models
SHARED = (
    "test_way",
    "test_shot",
    "test_queries",
    "test_episodes",
    "eval_seed",
    "groups",
    "small_classes",
    "labelled_fraction",
)
# Keys of its unlabelled videos, for the models that take any
UNLABELLED = ("unlabelled_per_class", "distractor_classes", "distractors_per_class")


@dataclass(frozen=True)
class SharedEpisodes:
    """The episodes that all models are tested on.

    Attributes:
        shards: The opened shard set.
        split: Name of its split.
        config: A configuration; its values of SHARED hold for every model, and those of UNLABELLED
            for every model that takes unlabelled videos.
        from_file: The episodes of a file; None where they are drawn.
        stream: The episodes as this configuration draws them.
        shuffled: Shuffle the frames of each clip.
        embeddings: Store of embeddings from one evaluation to the next.
    """

    shards: ShardSet
    split: str
    config: RunConfig
    from_file: EpisodeFile | None
    stream: EpisodeStream
    shuffled: bool = False
    embeddings: EmbeddingStore | None = None

    @property
    def left_out(self) -> list[str]:
        """Classes that are left out because they have too few videos."""
        return list(self.from_file.header.get("left_out", ()) if self.from_file else self.stream.dropped)

    @property
    def queries(self) -> float:
        """Queries of each class; their mean where a file has unequal numbers."""
        shape = self.from_file.shape if self.from_file else None
        return shape.queries / shape.way if shape and shape.queries % shape.way else self.config.test_queries

    def stamp(self) -> dict[str, Any]:
        """Collect the facts about its episodes for a result."""
        return {
            "split": self.split,
            "shuffled": self.shuffled,
            "left_out": self.left_out,
            "queries": self.queries,
            "eval_seed": self.config.eval_seed,
            "episodes_sha256": self.from_file.sha256 if self.from_file else None,
        }

    def selection_warning(self, tested: ModelUnderTest) -> str | None:
        """Warn where these episodes' split chose the model's checkpoint; None elsewhere."""
        if tested.stamp.get("selected_on") != self.split:
            return None
        return f'{tested.name}: its checkpoint was chosen on this split, "{self.split}"'

    def overlap(self, tested: ModelUnderTest, *, allowed: bool) -> Overlap:
        """Find the classes and videos of these episodes that a model was trained on.

        Raises:
            ConfigError: there are some, and that is not allowed.
        """
        overlap = find_overlap(tested.trained_on, self.shards, self.stream.videos())
        check_overlap(overlap, tested.name, allowed=allowed)
        return overlap

    def configured(self, config: RunConfig) -> RunConfig:
        """Put these episodes into a model's own configuration.

        With a file, a model has the file's unlabelled videos if its method reads any.  Without a
        file, it has as many as its own configuration asks for.
        """
        values: dict[str, Any] = {key: getattr(self.config, key) for key in SHARED}
        if self.from_file is not None:
            reads = "unlabelled" in find_method(config.method).reads
            values |= {key: getattr(self.config, key) if reads else 0 for key in UNLABELLED}
        return replace(config, **values)

    def videos_for(self, config: RunConfig) -> Sequence[Chosen] | None:
        """Choose the episodes' videos for a model; None where its configuration draws them."""
        takes = takes_unlabelled(config)
        if self.from_file is None and takes == takes_unlabelled(self.config):
            return None
        chosen = [self.stream.choose(n) for n in range(self.config.test_episodes)]
        return chosen if takes else [replace(one, unlabelled=()) for one in chosen]

    def check(self, tested: ModelUnderTest) -> None:
        """Refuse a model that cannot be asked these episodes, before anything is computed.

        Raises:
            ConfigError: unlabelled videos or texts that its method does not read, a class without a
                text, a crop that does not fit, or no such device.
            ShardError: its frame rule reads what the shards do not hold.
        """
        config = self.configured(tested.config)
        choose_device(config.device)
        check_streams(vars(config))
        check_unlabelled(config)
        text = class_text_of(config)
        if text:
            text.rows(self.shards.dataset.splits[self.split].classes)
        rules = evaluation_rules(config)
        check_views(rules, config.views)
        EpisodeStream(self.shards, self.split, rules, seed=config.eval_seed, given=self.videos_for(config))

    def run(self, tested: ModelUnderTest) -> tuple[Model, Answers, torch.device]:
        """Load a model and ask it: with its own frames, crop and precision.

        Raises:
            ConfigError: weights that do not fit, no such device, or nothing to choose the share of
                motion on.
        """
        config = self.configured(tested.config)
        device = choose_device(config.device)
        model = tested.load().to(device)
        if isinstance(model, TwoStreams):
            model.set_rule(stream_weight(config.stream_weight))
            if model.fusion.frames is None:
                fuse(model, self.shards, config, device=device, tested=self.split)
        with closing(self.open_loader(config, model, device)) as loader:
            answers = answer(
                model,
                loader,
                config.test_episodes,
                precision=config.precision,
                shuffled=self.shuffled,
                label=tested.name,
                store=self.embeddings,
            )
        return model, answers, device

    def open_loader(self, config: RunConfig, model: Model, device: torch.device) -> EpisodeLoader:
        """Open the episodes for a model of this configuration; close them when done."""
        assert model.trunk is not None
        fixed, trunk = self.videos_for(config), model.trunk
        return open_episodes(self.shards, self.split, config, trunk=trunk, device=device, training=False, given=fixed)


def fuse(
    model: TwoStreams, shards: ShardSet, config: RunConfig, *, device: torch.device, tested: str = "test"
) -> str | None:
    """Choose how a model's streams are mixed, on val classes or else on those of training.

    A given share needs only the spread of each stream's logits. Without such classes it is that of
    the tested split, whose labels are not looked at.

    Returns:
        Name of the split; None where there is none, or where each episode's support decides.

    Raises:
        ConfigError: the share is to be chosen, and the shards have no such split.
    """
    if model.rule == SUPPORT:
        return None
    split = next((name for name in ("val", "train") if name in shards.dataset.splits), None)
    if split is None and isinstance(model.rule, str):
        raise ConfigError(
            f"{shards.path} has no classes of training or validation to choose the share of motion on: give "
            "--stream-weight a number, or support with 2 shots or more"
        )
    still = replace(config, test_frames="centre", views=0)
    assert model.trunk is not None
    own: dict[str, Any] = {"trunk": model.trunk, "device": device, "training": False}
    with closing(open_episodes(shards, split or tested, still, **own)) as loader:
        options: dict[str, Any] = {"precision": config.precision, "label": "streams"}
        answer(model, loader, config.val_episodes, calibrate=True, **options)
    return split


def open_shared_episodes(
    shards: ShardSet,
    split: str,
    models: Sequence[ModelUnderTest],
    *,
    asked: Mapping[str, Any],
    episodes_file: Path | None = None,
    shuffled: bool = False,
    embeddings: EmbeddingStore | None = None,
) -> SharedEpisodes:
    """Draw the episodes of the first model, or read those of a file.

    Args:
        shards: The opened shard set.
        split: Name of its split.
        models: The models, with what was asked for in their configurations.
        asked: Keys of the configuration that were given by hand; a file that differs in one is
            refused.
        episodes_file: The file; it is written first where it does not exist.
        shuffled: Shuffle the frames of each clip.
        embeddings: Store of embeddings from one evaluation to the next.

    Raises:
        ConfigError: a class has too few videos, the models take different unlabelled videos, or the
            file has other or fewer episodes than asked for.
        ShardError: there is no such split, or the file does not fit it.
        DiskError: the file cannot be written.
    """
    there = ranks.of_first(episodes_file is not None and episodes_file.exists())
    from_file, config = None, _shared_config(models, in_file=there)
    if episodes_file is not None:
        if not there and ranks.is_first():
            drawn = EpisodeStream(shards, split, evaluation_rules(config), seed=config.eval_seed)
            write_episodes(episodes_file, shards, drawn, config.test_episodes)
        ranks.wait_for_all()
        from_file = read_episodes(episodes_file, shards, split)
        config = _config_of_file(config, from_file, asked, episodes_file)
    fixed = from_file.chosen[: config.test_episodes] if from_file else None
    stream = EpisodeStream(shards, split, evaluation_rules(config), seed=config.eval_seed, given=fixed)
    return SharedEpisodes(shards, split, config, from_file, stream, shuffled, embeddings)


def _shared_config(models: Sequence[ModelUnderTest], *, in_file: bool) -> RunConfig:
    """Take the first model's configuration, and unlabelled videos from those that take any."""
    first = models[0].config
    takers = [one for one in models if takes_unlabelled(one.config)]
    if not takers or in_file:
        return first
    numbers = {one.name: unlabelled_text(one.config) for one in takers}
    if len(set(numbers.values())) > 1:
        listing = "; ".join(f"{name}: {text}" for name, text in numbers.items())
        raise ConfigError(
            f"the runs take other unlabelled videos ({listing}): give all the same with --unlabelled-per-class, "
            "--distractor-classes and --distractors-per-class"
        )
    return replace(first, **{key: getattr(takers[0].config, key) for key in UNLABELLED})


def unlabelled_text(config: RunConfig) -> str:
    """Say which unlabelled videos an episode of a configuration has."""
    if not takes_unlabelled(config):
        return "none"
    rules = evaluation_rules(config)
    others = f", {rules.distractors} of each of {rules.distractor_classes} others" if rules.distractor_classes else ""
    return f"{rules.unlabelled_per_class} a class{others}"


def _config_of_file(config: RunConfig, from_file: EpisodeFile, asked: Mapping[str, Any], path: Path) -> RunConfig:
    """Put the shape and number of a file's episodes, and its header, into a configuration."""
    there = asdict(from_file.shape)
    shape: dict[str, Any] = {key: there[key] for key in UNLABELLED}
    shape |= {"test_way": there["way"], "test_shot": there["shot"]}
    shape["test_queries"] = max(there["queries"] // there["way"], 1)
    written = {"eval_seed": "seed"} | {key: key for key in ("groups", "small_classes", "labelled_fraction")}
    shape |= {key: from_file.header[name] for key, name in written.items() if name in from_file.header}
    for key, value in shape.items():
        if asked.get(key, value) != value:
            raise ConfigError(f"{path} holds episodes with {key} = {value}, asked for {asked[key]}: leave it out")
    episodes = asked.get("test_episodes", len(from_file.chosen))
    if episodes > len(from_file.chosen):
        raise ConfigError(f"{path} holds {len(from_file.chosen)} episodes, asked for {episodes}: ask for fewer")
    return replace(config, **shape, test_episodes=episodes)
