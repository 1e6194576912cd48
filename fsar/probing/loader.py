"""Load clips of labelled videos: decoded ahead, then resized, jittered and normalised."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Self

import torch
from einops import rearrange
from torch import Tensor

from fsar.trunks import Trunk
from pipelines.augment.clips import normalise, resize_bilinear
from pipelines.augment.photometric import Photometric
from pipelines.clips.labelled import ProbeRules, uniform_clips
from pipelines.clips.stream import ClipPlan, ClipStream, Ints
from pipelines.draw import PhiloxDraw
from pipelines.loader import Loader, executor_for
from shards_spec import ShardSet

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
        rules: ProbeRules,
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
        """Yield the test clips [clips, T, 3, S, S] of each video, in order."""
        stream = uniform_clips(self.shards, rows, self.rules)
        for plan, frames, _ in self._background.frames(stream, 0, len(rows)):
            yield normalise(self._clips(plan, frames, stream.rules.crop), self._mean, self._std)

    def random(self, stream: ClipStream, start: int, stop: int, *, jitter: bool) -> Iterator[tuple[Tensor, Ints]]:
        """Yield training batches: clips [B, T, 3, S, S] and the rows [B] of their videos.

        Args:
            stream: What is cut, as `random_clips` makes it.
            start: Number of the first batch.
            stop: Number after the last one.
            jitter: Change the colours.
        """
        photometric = Photometric(self._mean, self._std, blur=0.0)
        if not jitter:
            photometric = replace(photometric, grey=0.0, jitter=0.0)
        for plan, frames, _ in self._background.frames(stream, start, stop):
            generator = torch.Generator().manual_seed(PhiloxDraw(stream.seed, _JITTER | plan.n).randint(0, 2**62))
            yield photometric(self._clips(plan, frames, stream.rules.crop), generator), plan.rows

    def _clips(self, plan: ClipPlan, frames: Sequence[Tensor], size: int) -> Tensor:
        """Make all clips [N, T, 3, size, size] of a plan, in [0, 1].

        The windows that were read are the boxes. So each frame is resized once, however many clips
        show it.
        """
        views = plan.views
        clips = torch.empty(len(views), len(views[0].indices), 3, size, size, device=self.device)
        of_reads: dict[int, list[int]] = {}
        for number, view in enumerate(views):
            of_reads.setdefault(view.reads, []).append(number)
        for reads, numbers in of_reads.items():
            images = rearrange(frames[reads], "r h w c -> r c h w").float().div_(255)
            images = resize_bilinear(images, (size, size))
            for number in numbers:
                indices = torch.tensor(views[number].indices).to(self.device, non_blocking=True)
                clip = images[indices]  # [T, 3, S, S]
                clips[number] = clip.flip(-1) if views[number].flip else clip
        return clips

    def close(self) -> None:
        """End its threads and give back the decoder; the shard set stays open."""
        self._background.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
