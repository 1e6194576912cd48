"""`webdataset`'s reader on the same shards: it reads them from end to end, and so draws no episodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
import webdataset
from torch.utils.data import DataLoader

NAME = "webdataset, videos in shard order"
DOES = "no episodes: as many clips"


@dataclass(frozen=True)
class CentreClip:
    """Turn a sample (all members of a video) into a clip uint8 [T, crop, crop, 3] of frames spread over it."""

    frames: int
    crop: int

    def __call__(self, sample: dict[str, Any]) -> torch.Tensor:
        """Decode those frames, whole and exact, and cut out the centre crop."""
        names = sorted(name for name in sample if name.endswith(".jpg"))
        places = np.linspace(0, len(names) - 1, self.frames).astype(int).tolist()
        clip = torch.empty(self.frames, self.crop, self.crop, 3, dtype=torch.uint8)
        for place, out in zip(places, clip.numpy(), strict=True):
            frame = simplejpeg.decode_jpeg(sample[names[place]], "RGB", fastdct=False, fastupsample=False)
            top, left = ((side - self.crop) // 2 for side in frame.shape[:2])
            out[:] = frame[top : top + self.crop, left : left + self.crop]
        return clip


class SequentialClips:
    """As many clips as an episode has, of whatever videos come next in the shards, from a DataLoader's workers.

    These read every member of a sample, as an archive that is streamed demands, and decode only what is asked.
    """

    def __init__(self, shards: Sequence[Path], *, clips: int, frames: int, crop: int, workers: int) -> None:
        self.clips, urls = clips, [str(path) for path in shards]
        dataset = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).map(CentreClip(frames, crop))
        self.loader: DataLoader[torch.Tensor] = DataLoader(
            dataset.repeat(),
            batch_size=None,
            num_workers=min(workers, len(urls)),  # each reads whole shards
            persistent_workers=True,
            multiprocessing_context="spawn",  # the parent has threads, which fork does not copy
        )

    def run(self, count: int) -> None:
        """Deliver `count` times as many clips as an episode has."""
        for _ in islice(self.loader, count * self.clips):
            pass
