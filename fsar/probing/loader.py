"""Clips of labelled videos on the device, ready for a trunk: decoded ahead, resized, jittered, normalised there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Self

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from fsar.trunks import Trunk
from pipelines.augment.clips import normalise, resize_bilinear
from pipelines.augment.photometric import Photometric
from pipelines.clips.labelled import ClipRules, ProbePlan, RandomClips, UniformClips
from pipelines.draw import PhiloxDraw
from pipelines.loader import Loader, executor_for
from shards_spec import ShardSet

Ints = NDArray[np.int64]

_JITTER = 1 << 63  # the bit in a draw's number that seeds a batch's colours


class ProbeLoader:
    """Clips of the videos of a shard set as a trunk wants them; close it when done.

    Args:
        shards: The opened shard set.
        rules: How test clips are cut.
        trunk: Whose constants of colour they are normalised with.
        device: Where they are wanted.
        executor: "dali", "portable", or "auto": DALI where it is installed.
        threads: Decoding threads; 0: one a core.
        prefetch: Videos or batches prepared ahead.
    """

    def __init__(
        self,
        shards: ShardSet,
        rules: ClipRules,
        trunk: Trunk,
        *,
        device: torch.device,
        executor: str = "auto",
        threads: int = 0,
        prefetch: int = 2,
    ) -> None:
        self.shards, self.rules, self.device = shards, rules, device
        self._mean, self._std = trunk.mean, trunk.std
        made = executor_for(shards, device, name=executor, threads=threads)
        self._background = Loader(made, device=device, prefetch=prefetch)

    def uniform(self, rows: Sequence[int]) -> Iterator[Tensor]:
        """The test clips [clips, T, 3, S, S] of each video, in order."""
        stream = UniformClips(self.shards, rows, self.rules)
        for plan, frames, _ in self._background.frames(stream, 0, len(stream)):
            yield normalise(self._clips(plan, frames, self.rules.size), self._mean, self._std)

    def random(self, stream: RandomClips, start: int, stop: int) -> Iterator[tuple[Tensor, Ints]]:
        """Training batches `start` to `stop`: clips [B, T, 3, S, S] and the catalogue rows [B] of their videos.

        They are cut by the stream's own rules.
        """
        photometric = Photometric(self._mean, self._std, blur=0.0)
        if not stream.rules.jitter:
            photometric = replace(photometric, grey=0.0, jitter=0.0)
        for n, (plan, frames, _) in enumerate(self._background.frames(stream, start, stop), start):
            generator = torch.Generator().manual_seed(PhiloxDraw(stream.seed, _JITTER | n).randint(0, 2**62))
            clips = self._clips(plan, frames, stream.rules.size)
            yield photometric(clips, generator), np.array(plan.rows, dtype=np.int64)

    def _clips(self, plan: ProbePlan, frames: Sequence[Tensor], size: int) -> Tensor:
        """All clips [N, T, 3, size, size] of a plan, in [0, 1]."""
        parts = []
        for pixels, places, flip in zip(frames, plan.places, plan.flips, strict=True):
            images = rearrange(pixels, "r h w c -> r c h w").float().div_(255)
            images = resize_bilinear(images, (size, size))
            images = images.flip(-1) if flip else images
            parts.append(images[torch.from_numpy(places).to(self.device)])  # [clips, T, 3, S, S]
        return torch.cat(parts)

    def close(self) -> None:
        """Give back the decoder; the shard set stays open."""
        self._background.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
