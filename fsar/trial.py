"""One set of test episodes, put to one model or to several."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fsar.data import check_unlabelled, choose_device, evaluation_rules, open_episodes
from fsar.evaluation import answer
from fsar.seen import check_overlap, find_overlap
from pipelines.given import read_episodes, write_episodes
from pipelines.plan import EpisodeStream
from shards_spec.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from fsar.candidates import Candidate
    from fsar.config import RunConfig
    from fsar.evaluation import Answers
    from fsar.methods import FewShotMethod
    from fsar.seen import Overlap
    from pipelines.given import GivenEpisodes
    from shards_spec import ShardSet

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


@dataclass(frozen=True)
class Trial:
    """The episodes that models are tested on.

    Attributes:
        config: The configuration whose values of SHARED hold for every model.
        given: The episodes of a file, where there is one.
        stream: The episodes as this configuration draws them.
        shuffled: Shuffle the frames of each clip.
    """

    shards: ShardSet
    split: str
    config: RunConfig
    given: GivenEpisodes | None
    stream: EpisodeStream
    shuffled: bool = False

    @property
    def left_out(self) -> list[str]:
        """Classes that were left out, having too few videos."""
        return list(self.given.header.get("left_out", ()) if self.given else self.stream.dropped)

    def stamp(self) -> dict[str, Any]:
        """What a result says of its episodes."""
        return {
            "split": self.split,
            "shuffled": self.shuffled,
            "left_out": self.left_out,
            "eval_seed": self.config.eval_seed,
            "episodes_sha256": self.given.sha256 if self.given else None,
        }

    def overlap(self, candidate: Candidate, *, allowed: bool) -> Overlap:
        """What of these episodes' classes and videos a model has seen in training.

        Raises:
            ConfigError: it has seen some, and that is not allowed.
        """
        overlap = find_overlap(candidate.seen, self.shards, self.stream.videos())
        check_overlap(overlap, candidate.name, allowed=allowed)
        return overlap

    def configured(self, config: RunConfig) -> RunConfig:
        """A model's own configuration with these episodes."""
        return replace(config, **{key: getattr(self.config, key) for key in SHARED})

    def run(self, candidate: Candidate) -> tuple[FewShotMethod, Answers, torch.device]:
        """Load a model and ask it: its own frames, crop and precision, the videos of this trial.

        Raises:
            ConfigError: weights that do not fit, or no such device.
        """
        config = self.configured(candidate.config)
        device = choose_device(config.device)
        model = candidate.load().to(device)
        assert model.trunk is not None
        check_unlabelled(model, config)
        given = self.given.chosen if self.given else None
        loader = open_episodes(
            self.shards, self.split, config, trunk=model.trunk, device=device, training=False, given=given
        )
        with closing(loader):
            answers = answer(
                model,
                loader,
                config.test_episodes,
                precision=config.precision,
                shuffled=self.shuffled,
                label=candidate.name,
            )
        return model, answers, device


def open_trial(
    shards: ShardSet,
    split: str,
    config: RunConfig,
    *,
    asked: Mapping[str, Any],
    episodes_file: Path | None = None,
    shuffled: bool = False,
) -> Trial:
    """The episodes of a configuration, or those of a file, which is written first where it does not exist.

    Args:
        shards: The opened shard set.
        split: Name of its split.
        config: The configuration, with what was asked for in it.
        asked: Keys of the configuration that were given by hand: a file that says otherwise is refused.
        episodes_file: The file.
        shuffled: Shuffle the frames of each clip.

    Raises:
        ConfigError: a class has too few videos, or the file has other or fewer episodes than asked for.
        ShardError: there is no such split, or the file does not fit it.
        DiskError: the file cannot be written.
    """
    given = None
    if episodes_file is not None:
        if not episodes_file.exists():
            drawn = EpisodeStream(shards, split, evaluation_rules(config), seed=config.eval_seed)
            write_episodes(episodes_file, shards, drawn, config.test_episodes)
        given = read_episodes(episodes_file, shards, split)
        config = _as_given(config, given, asked, episodes_file)
    chosen = given.chosen[: config.test_episodes] if given else None
    stream = EpisodeStream(shards, split, evaluation_rules(config), seed=config.eval_seed, given=chosen)
    return Trial(shards, split, config, given, stream, shuffled)


def _as_given(config: RunConfig, given: GivenEpisodes, asked: Mapping[str, Any], path: Path) -> RunConfig:
    """The configuration with the shape and number of the episodes of a file, and the seed of their frames."""
    shape: dict[str, Any] = {
        "test_way": given.way,
        "test_shot": given.shot,
        "test_queries": max(given.queries // given.way, 1),
    }
    written = {"eval_seed": "seed", "groups": "groups"}
    shape |= {key: given.header[name] for key, name in written.items() if name in given.header}
    for key, value in shape.items():
        if asked.get(key, value) != value:
            raise ConfigError(f"{path} holds episodes with {key} = {value}, asked for {asked[key]}: leave it out")
    episodes = asked.get("test_episodes", len(given.chosen))
    if episodes > len(given.chosen):
        raise ConfigError(f"{path} holds {len(given.chosen)} episodes, asked for {episodes}: ask for fewer")
    return replace(config, **shape, test_episodes=episodes)
