"""Make the motion maps of clips from decoded fields: camera out, cut, mirrored, summed by segment."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from pipelines.episodes.motion import Cut, MotionView
from shards_spec.pictures import FLOW_ZERO

SIDE = 32  # cells a side of a motion map
WHOLE = (0.0, 0.0, 1.0, 1.0)
MOST_ROWS = 128  # whose 8-bit codes 16 bits can add up


def motion_maps(fields: Sequence[Tensor], views: Sequence[MotionView], *, camera: str, channels: int) -> Tensor:
    """Make the motion of clips: displacement of each segment, in pixels of the stored field.

    Args:
        fields: Decoded fields for each of a plan's motion reads, uint8 [R, 2h, w, 1] of flow, u
            above v, or [R, h, w, 3] of differences.
        views: V clips of one number of segments T.
        camera: "median" subtracts from each field its median of each channel, over the 32 x 32
            cells of the whole field; "none" leaves the camera's motion in.
        channels: 2 of flow, 3 of differences.

    Returns:
        float32 [V, T, channels, 32, 32]; zeros for a video without a field, which does not move.
    """
    device = fields[0].device if fields else torch.device("cpu")
    maps = torch.zeros(len(views), len(views[0].weights), channels, SIDE, SIDE, device=device)
    for number, view in enumerate(views):
        if view.indices:
            first, last = view.indices[0], view.indices[-1] + 1  # a clip's fields lie side by side
            codes = _channels_first(fields[view.reads][first:last], channels)
            maps[number] = segment_maps(codes, view, camera=camera)
    return maps


def _channels_first(fields: Tensor, channels: int) -> Tensor:
    """[n, 2h, w, 1] of flow, u above v, or [n, h, w, 3] -> [n, c, h, w]."""
    if channels == 2:
        return rearrange(fields[..., 0], "n (c h) w -> n c h w", c=channels)
    return rearrange(fields, "n h w c -> n c h w")


def segment_maps(codes: Tensor, view: MotionView, *, camera: str) -> Tensor:
    """Make the map [T, c, 32, 32] of a clip of uint8 codes [n, c, h, w].

    All but the median is linear in the codes. So a clip of the whole frame is averaged over cells
    first, and one of a part is summed by segments first: each is the cheaper way.
    """
    weights = torch.from_numpy(view.weights).to(codes.device, non_blocking=True)  # [T, n]
    whole = view.cut.box == WHOLE
    cells = whole_cells(codes) if whole or camera == "median" else None  # [n, c, 32, 32]
    if whole and cells is not None:
        maps = _summed(weights, cells)
    else:
        maps = area_means(_summed(weights, codes.float().sub_(FLOW_ZERO)), view.cut)
    if camera == "median" and cells is not None:
        maps -= (weights @ medians(cells))[..., None, None]
    return mirrored(maps) if view.cut.flip else maps


def _summed(weights: Tensor, values: Tensor) -> Tensor:
    """Sum values [n, ...] by weights [T, n] -> [T, ...]."""
    return (weights @ values.flatten(1)).view(len(weights), *values.shape[1:])


def mirrored(maps: Tensor) -> Tensor:
    """Mirror maps [..., c, h, w] from left to right; u of a flow changes its sign."""
    turned = maps.flip(-1)
    if turned.shape[-3] == 2:
        turned[..., 0, :, :].neg_()
    return turned


def medians(cells: Tensor) -> Tensor:
    """Return the median [n, c] of cells [n, c, h, w]: the mean of the middle two."""
    values = cells.flatten(2)
    middle = values.shape[2] // 2
    if values.device.type == "cpu":  # NumPy's is fifteen times as fast as torch's
        parted = np.partition(values.numpy(), (middle - 1, middle), axis=2)
        return torch.from_numpy((parted[..., middle - 1] + parted[..., middle]) / 2)
    return (values.median(dim=2).values - (-values).median(dim=2).values) / 2


def whole_cells(codes: Tensor) -> Tensor:
    """Average uint8 codes [n, c, h, w], less the code of no motion, over 32 x 32 cells."""
    height, width = codes.shape[-2:]
    together = height // SIDE
    if height % SIDE or together > MOST_ROWS:
        return area_means(codes.float().sub_(FLOW_ZERO), Cut(WHOLE))
    rows = rearrange(codes, "n c (cell row) w -> n c cell row w", row=together)  # [n, c, 32, rows of a cell, w]
    summed = rows[:, :, :, 0].short()
    for row in range(1, together):
        summed += rows[:, :, :, row]
    across = cells_table(width, 0.0, 1.0, str(codes.device))
    cells: Tensor = summed.float().sub_(together * FLOW_ZERO) @ (across.T / together)
    return cells


def area_means(fields: Tensor, cut: Cut) -> Tensor:
    """Average fields [n, c, h, w] over 32 x 32 equal cells of a cut's box: [n, c, 32, 32].

    A place that lies partly in a cell counts by its part.
    """
    top, left, height, width = cut.box
    down = cells_table(fields.shape[-2], top, height, str(fields.device))
    across = cells_table(fields.shape[-1], left, width, str(fields.device))
    return (down @ fields) @ across.T


@lru_cache(maxsize=512)
def cells_table(places: int, first: float, length: float, device: str = "cpu") -> Tensor:
    """Make the shares [32, places] that places have in the cells of a part of an axis.

    Args:
        places: Places of the axis.
        first: Where the part begins, as a share of the axis.
        length: Its length, likewise.
        device: Where the table is wanted.
    """
    edges = (first + torch.arange(SIDE + 1, dtype=torch.float64) / SIDE * length) * places
    place = torch.arange(places, dtype=torch.float64)
    overlap = torch.minimum(place + 1, edges[1:, None]) - torch.maximum(place, edges[:-1, None])  # [32, places]
    return (overlap.clamp(min=0) / (edges[1:] - edges[:-1])[:, None]).float().to(device)
