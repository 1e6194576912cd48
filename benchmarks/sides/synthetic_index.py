"""Shard sets without pixels: summaries of any number of videos, and tars that hold nothing but their first header."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from shards_spec.files import json_bytes
from shards_spec.index.layout import shard_path
from shards_spec.schema import Dataset, Split, archive_size, sample_key
from shards_spec.summary import Sample, Summary, sidecars
from shards_spec.tar import header

FRAMES = 32  # kept frames of a video
PER_CLASS = 100
PER_GROUP = 4  # videos of one source
ROWS_PER_SHARD = 64  # the default of fsar-preprocess


def make_set(folder: Path, videos: int) -> None:
    """Write everything of a shard set of one series but its index and its pixels; one split, `all`."""
    folder.mkdir(parents=True)
    classes = tuple(f"class {number:05d}" for number in range(max(videos // PER_CLASS, 1)))
    dataset = Dataset("synthetic", classes, {"all": Split(classes)})
    (folder / "dataset.json").write_bytes(json_bytes(dataset.to_json()))
    for number in range(-(-videos // ROWS_PER_SHARD)):
        rows = range(number * ROWS_PER_SHARD, min((number + 1) * ROWS_PER_SHARD, videos))
        _write_shard(shard_path(folder, "rgb", number), rows, number)


def _write_shard(tar: Path, rows: range, number: int) -> None:
    """A sparse tar of the right size, its summary, and an empty `.idx`, which only DALI reads."""
    rng = np.random.default_rng(number)
    sizes = rng.integers(8_000, 24_000, (len(rows), FRAMES)).tolist()  # bytes of a JPEG of 256 x 256
    crcs = rng.integers(0, 1 << 32, (len(rows), FRAMES + 2)).tolist()
    samples: list[Sample] = []
    offset = 0
    for row, size, crc in zip(rows, sizes, crcs, strict=True):
        sample = Sample(row, offset, list(range(FRAMES)), [*size, 5, 400], crc, _info(row))
        samples.append(sample)
        offset = sample.end
    with tar.open("wb") as file:
        file.write(header(f"{sample_key(rows[0])}.00000.jpg", samples[0].sizes[0]))
        file.truncate(archive_size(offset))
    index, description = sidecars(tar)
    index.touch()
    description.write_bytes(Summary(archive_size(offset), f"{number:064x}", samples).to_json())


def _info(row: int) -> dict[str, Any]:
    label = f"class {row // PER_CLASS:05d}"
    return {
        "name": f"{label}/video {row:07d} of a usual length.mp4",
        "label": label,
        "group": f"source {row // PER_GROUP:07d}",
        "frames": FRAMES,
        "fps": 25.0,
        "source_size": [240, 320],
        "size": [256, 256],
        "kept": list(range(FRAMES)),
    }
