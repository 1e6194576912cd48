"""Few-shot action recognition: episodes in, trained model and honest numbers out."""

from fsar.checkpoints import load_reference_state_dict
from fsar.episode import Episode
from fsar.evaluation import evaluate
from fsar.loader import EpisodeDataset, EpisodeLoader
from fsar.methods import METHODS, create_method
from pipelines.episodes.rules import EpisodeRules
from shards_spec import ShardSet

__all__ = [
    "METHODS",
    "Episode",
    "EpisodeDataset",
    "EpisodeLoader",
    "EpisodeRules",
    "ShardSet",
    "create_method",
    "evaluate",
    "load_reference_state_dict",
]
