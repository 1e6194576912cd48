"""Load clips of unlabelled videos on a device, ready for a pre-training method's own views."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from einops import rearrange
from torch import Tensor

from fsar.pretraining.flow_rotation import unit_flow
from pipelines.augment.crops import crop_views
from pipelines.clips.stream import ClipPlan, ClipRules, ClipStream, Ints
from pipelines.loader import Loader, executor_for
from pipelines.sampling import check_every_frame
from shards_spec import ShardSet
from shards_spec.pictures import FLOW_ZERO


@dataclass(frozen=True)
class CroppedClips:
    """The clips of a step's videos, neither augmented in colour nor normalised.

    Attributes:
        clips: [B, V, T, 3, S, S] in [0, 1], cropped and mirrored.
        coordinates: [B, V, 4] of their crops, see `pipelines.clips.stream.crop_coordinates`.
        flips: Bool [B, V], true for mirrored clips.
        flow: [B, W, t, 2, S, S] crops of flow, u before v, in units of each whole field's largest
            radius; None without flow. Mirroring moves the vectors, but u keeps its sign.
    """

    clips: Tensor
    coordinates: Tensor
    flips: Tensor
    flow: Tensor | None = None


class ClipLoader:
    """Steps of clips, decoded ahead in the background and cropped on the device.

    Close it when done. Step n is a pure function of (seed, n), whatever was loaded before. So n is
    all that a resumed run must know.

    Args:
        shards: The opened shard set.
        rows: Catalogue rows of the videos, such as `shards.split_rows("train")`.
        rules: Rules by which clips are drawn: `WindowRules`, `PairRules` or `FlowPairRules`.
        batch: Videos of a step, of all processes together.
        seed: Seed of all draws.
        device: Where the clips are wanted; on CUDA with DALI, JPEG is decoded there too.
        executor: "dali", "portable", or "auto": DALI where it is installed.
        threads: Decoding threads; 0: one a core.
        prefetch: Steps prepared ahead.
        rank: Number of this process among `ranks`.
        ranks: Processes that train together; each gets batch / ranks videos a step.

    Raises:
        ConfigError: the batch cannot be shared out, or too few videos are long enough.
        ShardError: the shards lack what the rules need.
    """

    def __init__(
        self,
        shards: ShardSet,
        rows: Ints,
        rules: ClipRules,
        *,
        batch: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
        executor: str = "auto",
        threads: int = 0,
        prefetch: int = 2,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.shards, self.rules, self.device = shards, rules, torch.device(device)
        self.stream = ClipStream(shards, rows, rules, batch=batch, seed=seed, rank=rank, ranks=ranks)
        check_every_frame(shards, self.stream.rows, what="pre-training")
        series = ["rgb"] + ([rules.flow_series] if rules.flow_series else [])
        made = executor_for(shards, self.device, name=executor, threads=threads, series=series)
        self.background = Loader(made, device=self.device, prefetch=prefetch)

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[ClipPlan, CroppedClips, float]]:
        """Yield plans of steps start, start + 1, ... below stop, clips, and seconds waited."""
        return self.background.steps(self.stream, self.background.decode, self._cropped, start, stop)

    def _cropped(self, plan: ClipPlan, decoded: list[Tensor]) -> CroppedClips:
        frames = self.background.to_device(decoded)
        videos, size = len(plan.rows), self.rules.crop
        clips = crop_views(frames, plan.views, size=size).div_(255)  # [B V, T, 3, S, S]
        flow = None
        if plan.flow_views:
            fields = [
                unit_fields(each) if reads.modality != "rgb" else each
                for reads, each in zip(plan.reads, frames, strict=True)
            ]
            flow = rearrange(crop_views(fields, plan.flow_views, size=size), "(b w) ... -> b w ...", b=videos)
        return CroppedClips(
            rearrange(clips, "(b v) ... -> b v ...", b=videos),
            torch.from_numpy(plan.coordinates).to(self.device, non_blocking=True),
            torch.from_numpy(plan.flips).to(self.device, non_blocking=True),
            flow,
        )

    def close(self) -> None:
        """End its threads and give back the decoder; the shard set stays open."""
        self.background.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def unit_fields(pictures: Tensor) -> Tensor:
    """Turn stored pictures of flow [R, 2h, w, 3], u above v, into fields [R, h, w, 2].

    Fields are in units of their largest radius. So the scale from codes to pixels, one for a whole
    field, cancels out.
    """
    codes = rearrange(pictures[..., 0], "r (c h) w -> r c h w", c=2)
    return rearrange(unit_flow(codes.float() - FLOW_ZERO), "r c h w -> r h w c")
