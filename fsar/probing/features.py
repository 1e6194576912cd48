"""Features of the test clips of videos, each computed once; kept on disk where a folder is named.

    FOLDER/KEY/facts.json            all that the features depend on; KEY is its SHA-256
    FOLDER/KEY/part-000000.npy       [n, clips, C] float32 of the first n videos

A part is whole or absent, so that a killed command goes on with the first one that is missing.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fsar.probing.loader import ProbeLoader
from fsar.probing.weights import Probed
from fsar.run.device import autocast
from fsar.trunks import Trunk, VideoTrunk
from shards_spec.errors import FsarError
from shards_spec.files import json_bytes, json_line, only_writer, write_whole

PART = 256  # videos, some MB


def trunk_features(trunk: Trunk, clips: Tensor) -> Tensor:
    """One vector [N, C] a clip [N, T, 3, S, S]; a trunk that reads single frames gives the mean over them."""
    if isinstance(trunk, VideoTrunk):
        pooled: Tensor = trunk(clips[:, None]).pooled[:, 0]
        return pooled
    frames: Tensor = trunk(clips).pooled
    return frames.mean(dim=1)


def video_features(
    probed: Probed, loader: ProbeLoader, rows: Sequence[int], *, precision: str = "fp32", cache: Path | None = None
) -> Iterator[Tensor]:
    """Features [n, clips, C] of the test clips of videos, some videos at a time, in order, on the host; eval mode.

    Args:
        probed: The trunk, on the loader's device.
        loader: Where the clips come from.
        rows: Catalogue rows of the videos.
        precision: fp32 or bf16 (autocast).
        cache: Folder of stored features; None: nothing is stored.

    Raises:
        FsarError: features are not finite, a stored part is damaged, or another process writes to the same ones.
        DiskError: the disk is full.
    """
    facts = feature_facts(probed, loader, rows, precision)
    folder = None if cache is None else cache / hashlib.sha256(json_line(facts)).hexdigest()
    probed.trunk.eval()
    missing = [first for first in range(0, len(rows), PART) if folder is None or not _path(folder, first).exists()]
    wanted = [row for first in missing for row in rows[first : first + PART]]
    clips = iter(tqdm(loader.uniform(wanted), total=len(wanted), unit="video", desc="features", leave=False))
    for first in range(0, len(rows), PART):
        if first not in missing:
            assert folder is not None
            yield _read(_path(folder, first))
            continue
        part = _make(probed.trunk, islice(clips, len(rows[first : first + PART])), precision)
        if folder is not None:
            _write(folder, first, part, facts)
        yield part


def feature_facts(probed: Probed, loader: ProbeLoader, rows: Sequence[int], precision: str) -> dict[str, Any]:
    """All that the features of these videos depend on."""
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


@torch.no_grad()
def _make(trunk: Trunk, clips: Iterator[Tensor], precision: str) -> Tensor:
    """[n, clips, C] of some videos."""
    parts = []
    for each in clips:
        with autocast(each.device, precision):
            parts.append(trunk_features(trunk, each).float())
    part = torch.stack(parts).cpu()
    if not bool(part.isfinite().all()):
        raise FsarError("features of the trunk are not finite: choose other --weights, or --precision fp32")
    return part


def _path(folder: Path, first: int) -> Path:
    return folder / f"part-{first // PART:06d}.npy"


def _write(folder: Path, first: int, part: Tensor, facts: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    np.save(buffer, part.numpy())
    with only_writer(folder):
        write_whole(folder / "facts.json", json_bytes(facts))
        write_whole(_path(folder, first), buffer.getvalue())


def _read(path: Path) -> Tensor:
    try:
        return torch.from_numpy(np.array(np.load(path, mmap_mode="r")))  # mapped: no more than is there
    except Exception as error:  # a damaged header can fail anywhere
        raise FsarError(f"{path} is damaged ({error}): delete it and type the same command again") from error
