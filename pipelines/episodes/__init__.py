"""Plan episodes: the classes, videos, frames and crops of each, from a seed and its number."""

from pipelines.episodes.clip_views import View
from pipelines.episodes.file import EpisodeFile, read_episodes, write_episodes
from pipelines.episodes.labels import read_labels, write_labels
from pipelines.episodes.pools import Labels
from pipelines.episodes.rules import EpisodeRules
from pipelines.episodes.stream import Chosen, EpisodePlan, EpisodeStream

__all__ = [
    "Chosen",
    "EpisodeFile",
    "EpisodePlan",
    "EpisodeRules",
    "EpisodeStream",
    "Labels",
    "View",
    "read_episodes",
    "read_labels",
    "write_episodes",
    "write_labels",
]
