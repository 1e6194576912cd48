"""One set of test episodes, put to one model or to several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fsar.checkpoints import Seen
from fsar.evaluation.accuracy import Answers, answer
from fsar.evaluation.embeddings import EmbeddingStore
from fsar.evaluation.overlap import Overlap, check_overlap, find_overlap
from fsar.loader import EpisodeLoader, check_views
from fsar.methods import FewShotMethod, find_method
from fsar.run import ranks
from fsar.run.build import check_unlabelled, class_text_of, evaluation_rules, open_episodes, takes_unlabelled
from fsar.run.config import RunConfig
from fsar.run.device import choose_device
from pipelines.episodes.file import EpisodeFile, read_episodes, write_episodes
from pipelines.episodes.stream import Chosen, EpisodeStream
from shards_spec import ShardSet
from shards_spec.errors import ConfigError


@dataclass(frozen=True)
class Candidate:
    """Weights to be tested.

    Attributes:
        name: What people call it.
        config: Its configuration.
        load: Makes the model, on the CPU.
        seen: What it saw in training; None where nothing says so.
        stamp: What its result says of it besides.
    """

    name: str
    config: RunConfig
    load: Callable[[], FewShotMethod]
    seen: Seen | None = None
    stamp: dict[str, Any] = field(default_factory=dict)


# What decides which videos an episode is made of: one for all models.
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
# Which unlabelled videos it has besides, for the models that take any.
UNLABELLED = ("unlabelled_per_class", "distractor_classes", "distractors_per_class")


@dataclass(frozen=True)
class Trial:
    """The episodes that models are tested on.

    Attributes:
        config: The configuration whose values of SHARED hold for every model, and those of UNLABELLED for every one
            that takes unlabelled videos.
        given: The episodes of a file, where there is one.
        stream: The episodes as this configuration draws them.
        shuffled: Shuffle the frames of each clip.
        embeddings: Where embeddings are kept from one evaluation to the next.
    """

    shards: ShardSet
    split: str
    config: RunConfig
    given: EpisodeFile | None
    stream: EpisodeStream
    shuffled: bool = False
    embeddings: EmbeddingStore | None = None

    @property
    def left_out(self) -> list[str]:
        """Classes that were left out, having too few videos."""
        return list(self.given.header.get("left_out", ()) if self.given else self.stream.dropped)

    @property
    def queries(self) -> float:
        """Queries of each class, on average where a file has unequal numbers."""
        shape = self.given.shape if self.given else None
        return shape.queries / shape.way if shape and shape.queries % shape.way else self.config.test_queries

    def stamp(self) -> dict[str, Any]:
        """What a result says of its episodes."""
        return {
            "split": self.split,
            "shuffled": self.shuffled,
            "left_out": self.left_out,
            "queries": self.queries,
            "eval_seed": self.config.eval_seed,
            "episodes_sha256": self.given.sha256 if self.given else None,
        }

    def chosen_on(self, candidate: Candidate) -> str | None:
        """A warning where the split of these episodes chose the model's checkpoint."""
        if candidate.stamp.get("selected_on") != self.split:
            return None
        return f'{candidate.name}: its checkpoint was chosen on this split, "{self.split}"'

    def overlap(self, candidate: Candidate, *, allowed: bool) -> Overlap:
        """What of these episodes' classes and videos a model has seen in training.

        Raises:
            ConfigError: it has seen some, and that is not allowed.
        """
        overlap = find_overlap(candidate.seen, self.shards, self.stream.videos())
        check_overlap(overlap, candidate.name, allowed=allowed)
        return overlap

    def configured(self, config: RunConfig) -> RunConfig:
        """A model's own configuration with these episodes.

        It has unlabelled videos if a file has them and its method reads any, or without a file if it asks for them.
        """
        values: dict[str, Any] = {key: getattr(self.config, key) for key in SHARED}
        if self.given is not None:
            reads = "unlabelled" in find_method(config.method).reads
            values |= {key: getattr(self.config, key) if reads else 0 for key in UNLABELLED}
        return replace(config, **values)

    def videos_for(self, config: RunConfig) -> Sequence[Chosen] | None:
        """The episodes' videos for a model of this configuration; None where it draws the same itself."""
        takes = takes_unlabelled(config)
        if self.given is None and takes == takes_unlabelled(self.config):
            return None
        chosen = [self.stream.choose(n) for n in range(self.config.test_episodes)]
        return chosen if takes else [replace(one, unlabelled=()) for one in chosen]

    def check(self, candidate: Candidate) -> None:
        """Refuse, before anything is computed, a model that cannot be asked these episodes.

        Raises:
            ConfigError: unlabelled videos or texts that its method does not read, a class without a text, a crop that
                does not fit, or no such device.
            ShardError: its frame rule needs what the shards do not say.
        """
        config = self.configured(candidate.config)
        choose_device(config.device)
        check_unlabelled(config)
        text = class_text_of(config)
        if text:
            text.rows(self.shards.dataset.splits[self.split].classes)
        rules = evaluation_rules(config)
        check_views(rules, config.views)
        EpisodeStream(self.shards, self.split, rules, seed=config.eval_seed, given=self.videos_for(config))

    def run(self, candidate: Candidate) -> tuple[FewShotMethod, Answers, torch.device]:
        """Load a model and ask it: its own frames, crop and precision, the videos of this trial.

        Raises:
            ConfigError: weights that do not fit, or no such device.
        """
        config = self.configured(candidate.config)
        device = choose_device(config.device)
        model = candidate.load().to(device)
        with closing(self.episodes(config, model, device)) as loader:
            answers = answer(
                model,
                loader,
                config.test_episodes,
                precision=config.precision,
                shuffled=self.shuffled,
                label=candidate.name,
                store=self.embeddings,
            )
        return model, answers, device

    def episodes(self, config: RunConfig, model: FewShotMethod, device: torch.device) -> EpisodeLoader:
        """The episodes for a model of this configuration; close them when done."""
        assert model.trunk is not None
        given, trunk = self.videos_for(config), model.trunk
        return open_episodes(self.shards, self.split, config, trunk=trunk, device=device, training=False, given=given)


def open_trial(
    shards: ShardSet,
    split: str,
    found: Sequence[Candidate],
    *,
    asked: Mapping[str, Any],
    episodes_file: Path | None = None,
    shuffled: bool = False,
    embeddings: EmbeddingStore | None = None,
) -> Trial:
    """The episodes of the first model, or those of a file, which is written first where it does not exist.

    Args:
        shards: The opened shard set.
        split: Name of its split.
        found: The models, with what was asked for in their configurations.
        asked: Keys of the configuration that were given by hand: a file that says otherwise is refused.
        episodes_file: The file.
        shuffled: Shuffle the frames of each clip.
        embeddings: Where embeddings are kept from one evaluation to the next.

    Raises:
        ConfigError: a class has too few videos, the models take other unlabelled videos, or the file has other or
            fewer episodes than asked for.
        ShardError: there is no such split, or the file does not fit it.
        DiskError: the file cannot be written.
    """
    there = ranks.of_first(episodes_file is not None and episodes_file.exists())
    given, config = None, _of_all(found, in_file=there)
    if episodes_file is not None:
        if not there and ranks.is_first():
            drawn = EpisodeStream(shards, split, evaluation_rules(config), seed=config.eval_seed)
            write_episodes(episodes_file, shards, drawn, config.test_episodes)
        ranks.wait_for_all()
        given = read_episodes(episodes_file, shards, split)
        config = _as_given(config, given, asked, episodes_file)
    chosen = given.chosen[: config.test_episodes] if given else None
    stream = EpisodeStream(shards, split, evaluation_rules(config), seed=config.eval_seed, given=chosen)
    return Trial(shards, split, config, given, stream, shuffled, embeddings)


def _of_all(found: Sequence[Candidate], *, in_file: bool) -> RunConfig:
    """The first model's configuration with the unlabelled videos of those that take any: the same ones."""
    first = found[0].config
    takers = [one for one in found if takes_unlabelled(one.config)]
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
    """Which unlabelled videos an episode of a configuration has."""
    if not takes_unlabelled(config):
        return "none"
    rules = evaluation_rules(config)
    others = f", {rules.distractors} of each of {rules.distractor_classes} others" if rules.distractor_classes else ""
    return f"{rules.unlabelled_per_class} a class{others}"


def _as_given(config: RunConfig, given: EpisodeFile, asked: Mapping[str, Any], path: Path) -> RunConfig:
    """The configuration with the shape and number of the episodes of a file, and what its header says of the rest."""
    there = asdict(given.shape)
    shape: dict[str, Any] = {key: there[key] for key in UNLABELLED}
    shape |= {"test_way": there["way"], "test_shot": there["shot"]}
    shape["test_queries"] = max(there["queries"] // there["way"], 1)
    written = {"eval_seed": "seed"} | {key: key for key in ("groups", "small_classes", "labelled_fraction")}
    shape |= {key: given.header[name] for key, name in written.items() if name in given.header}
    for key, value in shape.items():
        if asked.get(key, value) != value:
            raise ConfigError(f"{path} holds episodes with {key} = {value}, asked for {asked[key]}: leave it out")
    episodes = asked.get("test_episodes", len(given.chosen))
    if episodes > len(given.chosen):
        raise ConfigError(f"{path} holds {len(given.chosen)} episodes, asked for {episodes}: ask for fewer")
    return replace(config, **shape, test_episodes=episodes)
