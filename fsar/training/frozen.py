"""Train behind a frozen trunk, which computes a few random views of each video once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fsar.episode import Episode
from fsar.evaluation.cache_keys import model_sha256, view_facts
from fsar.evaluation.embeddings import BATCH, clips_of
from fsar.evaluation.store import Group, Values, fill
from fsar.loader import EpisodeLoader
from fsar.methods import Model, TwoStreams
from fsar.run.device import autocast
from fsar.trunks import Trunk
from pipelines.augment.clips import normalise
from pipelines.episodes.stream import EpisodePlan
from pipelines.episodes.views import draw_views, number_views, places_of
from shards_spec.errors import ConfigError, FsarError

Ints = NDArray[np.int64]

# Pooled features are small, and float32 keeps them as the trunk made them.  Maps are forty-nine
# times larger, and float16 changes them (1 part in 2,000) far less than another crop does.
TYPES = {"pooled": torch.float32, "maps": torch.float16, "images": torch.uint8, "motion": torch.float16}
IN_A_PART = {"pooled": 512, "maps": 32}  # views: some tens of MB


def freeze_trunk(model: Model, method: str) -> None:
    """Exclude the trunk of a model from training; of two streams that of the frames.

    Raises:
        ConfigError: no other weights of the model decide its answers.
    """
    assert model.trunk is not None
    learned = [name for name, value in model.named_parameters() if value.requires_grad and value.numel() > 1]
    frozen = ("frames.trunk.", "frames.classifier.") if isinstance(model, TwoStreams) else ("trunk.", "classifier.")
    if all(name.startswith(frozen) for name in learned):
        raise ConfigError(f"{method} has nothing to train after its trunk: leave --freeze-trunk out")
    model.trunk.requires_grad_(requires_grad=False)
    model.trunk.recomputes = 0  # there is no backward pass to compute it for


class CachedEpisodes:
    """The training episodes of an EpisodeLoader, with features from a store in place of frames.

    Every video has `views` views at random frames and crops, as the rules say; colours are not
    jittered.  Episode n takes one view of each of its videos, a function of (seed, n).  If queries
    are mirrored, odd views are mirrored, and only queries take them.  Missing features are computed
    now.

    Args:
        loader: The episodes as they are drawn.
        model: On the loader's device, its trunk frozen.
        views: Views of each video.
        cache: Folder of features, with one folder for each key.
        precision: Precision in which the trunk computes.

    Raises:
        FsarError: features cannot be made, or a file of them is damaged.
        DiskError: there is no room.
    """

    def __init__(
        self, loader: EpisodeLoader, model: Model, views: int, *, cache: Path, precision: str = "fp32"
    ) -> None:
        assert model.trunk is not None
        self.loader, self.views = loader, views
        self._mean, self._std = model.trunk.mean, model.trunk.std
        self._videos = loader.stream.drawn_videos()
        kinds = ["maps" if "maps" in model.reads else "pooled", *(["images"] if "images" in model.reads else [])]
        if isinstance(model, TwoStreams) or "motion" in model.reads:
            kinds.append("motion")  # as it is: its own trunk is trained
        numbers = number_views(self._videos, views)
        facts = view_facts(loader, precision, stream=loader.rules.streams) | {
            "trunk": model_sha256(model.trunk),
            "numbers": hashlib.sha256(numbers.tobytes()).hexdigest(),
            "kinds": kinds,
        }
        self.store = fill(
            Group(cache, facts, verify=False),  # episodes draw single views: no part is read as a whole
            numbers,
            partial(features_of, kinds=kinds, loader=loader, trunk=model.trunk, precision=precision),
            size=IN_A_PART[kinds[0]],
            batch=BATCH,
            unit="view",
            hint="take fewer --cached-views, or another disk with --feature-cache",
        )

    def planned(
        self, start: int = 0, stop: int | None = None, *, step: int = 1, block: int = 1
    ) -> Iterator[tuple[EpisodePlan, Episode, float]]:
        """Yield plans, episodes and seconds waited for each, as `EpisodeLoader.planned` does."""
        work = (self.loader.stream, self._read, self._episode)
        return self.loader.background.steps(*work, start, stop, step=step, block=block)

    def _read(self, plan: EpisodePlan) -> dict[str, Tensor]:
        """Read the features of the episode's views, support first; called in the background."""
        seed, flips = self.loader.stream.seed, self.loader.rules.query_flip
        places = places_of(plan, self._videos, self.views, seed=seed, flips=flips)
        return self.store.read(np.concatenate(places))

    def _episode(self, plan: EpisodePlan, read: dict[str, Tensor]) -> Episode:
        on_device = {kind: values.to(self.loader.device).float() for kind, values in read.items()}
        images = on_device.get("images")
        clips = None if images is None else normalise(images, self._mean, self._std, white=255.0)
        features = on_device.get("maps", on_device.get("pooled"))
        return self.loader.assemble(plan, clips, features=features, motion=on_device.get("motion"))


def features_of(
    numbers: Ints, *, kinds: Sequence[str], loader: EpisodeLoader, trunk: Trunk, precision: str
) -> Iterator[Values]:
    """Compute the features of views [n] by a trunk in evaluation mode, as they are stored.

    Yields, batch after batch and as far as asked for, pooled [v, T, C], maps [v, T, C, h, w],
    images [v, T, 3, H, W] in grey levels, and motion [v, T, 2, h, w] as episodes carry it.

    Raises:
        ConfigError: maps are asked for, and the trunk has none.
        FsarError: a feature is not finite as it is stored.
    """
    for start in range(0, len(numbers), BATCH):
        made = _features(numbers[start : start + BATCH], kinds, loader, trunk, precision)
        yield {kind: _stored(kind, values) for kind, values in made.items()}


@torch.no_grad()
def _features(numbers: Ints, kinds: Sequence[str], loader: EpisodeLoader, trunk: Trunk, precision: str) -> Values:
    """Make the features of a batch of views, on the loader's device."""
    was_training = trunk.training
    trunk.eval()
    chosen = draw_views(loader.stream, numbers)
    clips = clips_of(loader, chosen, trunk.stream)  # [v, T, 3, H, W], or motion [v, T, 2, h, w]
    with autocast(loader.device, precision):
        features = trunk(clips)
    trunk.train(was_training)
    made = {"pooled": features.pooled, "maps": features.maps}
    if "motion" in kinds:
        made["motion"] = clips_of(loader, chosen, "motion")
    if "images" in kinds:
        mean, std = (torch.tensor(three, device=clips.device)[:, None, None] for three in (trunk.mean, trunk.std))
        made["images"] = (255 * (clips * std + mean)).round().clamp(0, 255)
    if any(made[kind] is None for kind in kinds):
        raise ConfigError(f"the method reads maps, which {type(trunk).__name__} has not: choose another trunk")
    return {kind: made[kind] for kind in kinds}


def _stored(kind: str, values: Tensor) -> Tensor:
    """Bring features to the host in the type in which they are stored."""
    values = values.to(TYPES[kind])
    if not bool(values.isfinite().all()):
        raise FsarError(f"features ({kind}) of the trunk are not finite as {values.dtype}: leave freeze_trunk out")
    return values.cpu()
