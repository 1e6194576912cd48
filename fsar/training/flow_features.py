"""One vector a video from its stored optical flow: where it moves, in which direction, in which order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from shards_spec import Series, ShardSet
from shards_spec.errors import ConfigError
from shards_spec.pictures import decode_picture, flow_field, segment_centres

GRID = 2  # cells a side


def flow_features(shards: ShardSet, rows: Sequence[int], *, steps: int = 8) -> Tensor:
    """Vectors [n, steps * GRID * GRID * 2] of videos: the flow of each cell at the centres of `steps` segments.

    The flow of a cell is summed with its own length as weight, so that what moves outweighs what stands still, and
    divided by the length of the whole field: units are pixels of the stored frame.  No label and no weight is read.

    Raises:
        ConfigError: the shards hold no optical flow.
        ShardError: a field is damaged.
    """
    name = next((name for name in shards.series_names if name.startswith("flow")), None)
    if name is None:
        raise ConfigError(f"{shards.path} holds no optical flow; add it with fsar-preprocess --motion flow")
    series, sizes = shards.series(name), shards.series("rgb").sizes
    videos = tqdm(rows, desc="flow", unit="video", leave=False)
    return torch.from_numpy(np.stack([_video(series, row, steps, sizes[row].tolist()) for row in videos]))


def _video(series: Series, row: int, steps: int, size: Sequence[int]) -> NDArray[np.float32]:
    """[steps * GRID * GRID * 2] of one video."""
    centres = segment_centres(len(series.kept(row)), steps).tolist()
    if not centres:  # one frame: nothing moves
        return np.zeros(steps * GRID * GRID * 2, np.float32)
    places = [centres[step * len(centres) // steps] for step in range(steps)]  # a short video's more than once
    scales = series.scale(row)
    members = [decode_picture(data, series.name, row) for data in series.read(row, places)]
    fields = [
        flow_field(member, float(scales[place]), (size[0], size[1]))
        for member, place in zip(members, places, strict=True)
    ]
    return np.concatenate([_cells(field) for field in fields]).astype(np.float32)


def _cells(field: NDArray[np.float64]) -> NDArray[np.float64]:
    """[h, w, 2] -> [GRID * GRID * 2]."""
    length = np.hypot(field[..., 0], field[..., 1])  # [h, w]
    weighted = field * (length / (length.sum() + 1e-6))[..., None]
    bands = (part for band in np.array_split(weighted, GRID) for part in np.array_split(band, GRID, axis=1))
    return np.concatenate([part.sum(axis=(0, 1)) for part in bands])
