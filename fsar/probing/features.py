"""Compute features of the test clips of videos once each, and keep them in a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from fsar.evaluation.store import Group, Values, fill
from fsar.probing.loader import ProbeLoader
from fsar.probing.weights import Probed
from fsar.run.device import autocast
from fsar.trunks import Trunk, VideoTrunk
from shards_spec.errors import FsarError

Ints = NDArray[np.int64]

PART = 256  # videos, some MB


def trunk_features(trunk: Trunk, clips: Tensor) -> Tensor:
    """Compute one vector a clip; a trunk that reads single frames gives the mean over them.

    Args:
        trunk: The network.
        clips: [N, T, 3, S, S].

    Returns:
        [N, C].
    """
    if isinstance(trunk, VideoTrunk):
        pooled: Tensor = trunk(clips[:, None]).pooled[:, 0]
        return pooled
    frames: Tensor = trunk(clips).pooled
    return frames.mean(dim=1)


def video_features(
    probed: Probed, loader: ProbeLoader, rows: Sequence[int], *, precision: str = "fp32", cache: Path | None = None
) -> Iterator[Tensor]:
    """Yield features [n, clips, C] of the test clips of videos, `PART` videos at a time, in order.

    They are on the host.

    Args:
        probed: The trunk, on the loader's device; it is put in eval mode.
        loader: Where the clips come from.
        rows: Catalogue rows of the videos.
        precision: fp32 or bf16 (autocast).
        cache: Folder of stored features; None: nothing is stored.

    Raises:
        FsarError: features are not finite, a stored part is damaged, or another process writes to
            the same ones.
        DiskError: there is no room.
    """
    probed.trunk.eval()
    numbers, starts = np.array(rows, dtype=np.int64), range(0, len(rows), PART)
    make = partial(_features_of, loader=loader, trunk=probed.trunk, precision=precision)
    if cache is None:
        made = iter(tqdm(make(numbers), total=len(rows), unit="video", desc="features", leave=False))
        for start in starts:
            yield torch.cat([next(made)["features"] for _ in rows[start : start + PART]])
        return
    group = Group(cache, feature_facts(probed, loader, rows, precision))
    how: dict[str, Any] = {"size": PART, "batch": 1, "unit": "video", "hint": "name another folder with --features"}
    found = fill(group, numbers, make, **how)
    for start in starts:
        yield found.read(np.arange(start, min(start + PART, len(rows))))["features"]


def feature_facts(probed: Probed, loader: ProbeLoader, rows: Sequence[int], precision: str) -> dict[str, Any]:
    """Collect all that the features of these videos depend on."""
    return asdict(loader.rules) | {
        "trunk": probed.name,
        "weights": probed.sha256,
        "colours": [probed.trunk.mean, probed.trunk.std],
        "shards": loader.shards.sha256,
        "rows": hashlib.sha256(np.array(rows, dtype="<i8").tobytes()).hexdigest(),
        "precision": precision,
        "device": loader.device.type,
        "fsar": version("fsar"),
        "torch": torch.__version__,
    }


def _features_of(rows: Ints, *, loader: ProbeLoader, trunk: Trunk, precision: str) -> Iterator[Values]:
    """Make the features [1, clips, C] of videos, one after the other."""
    for clips in loader.uniform(rows.tolist()):
        with torch.no_grad(), autocast(clips.device, precision):
            features = trunk_features(trunk, clips).float()[None].cpu()
        if not bool(features.isfinite().all()):
            raise FsarError("features of the trunk are not finite: choose other --weights, or --precision fp32")
        yield {"features": features}
