"""Make the motion maps of clips from decoded fields: camera out, cut, mirrored, summed by segment."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from pipelines.episodes.motion import Cut, MotionView, Weights
from shards_spec.pictures import FLOW_ZERO

SIDE = 32  # cells a side of a motion map
WHOLE = (0.0, 0.0, 1.0, 1.0)
MOST_PLACES = 128  # whose 8-bit codes 16 bits can add up


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
            maps[number] = segment_maps(fields[view.reads][first:last], view, camera=camera, channels=channels)
    return maps


def segment_maps(codes: Tensor, view: MotionView, *, camera: str, channels: int) -> Tensor:
    """Make the map [T, c, 32, 32] of a clip of uint8 codes [n, 2h, w, 1] of flow, or [n, h, w, 3].

    All but the median is linear in the codes. So a clip of the whole frame is averaged over cells
    first, and one of a part is summed by segments first: each is the cheaper way.
    """
    weights = torch.from_numpy(view.weights).to(codes.device, non_blocking=True)  # [T, n]
    whole = view.cut.box == WHOLE
    cells = whole_cells(_channels_first(codes, channels)) if whole or camera == "median" else None
    if whole and cells is not None:
        maps = _summed(weights, cells.means())
    else:
        maps = area_means(_channels_first(summed_codes(codes, view.weights), channels), view.cut)
    if camera == "median" and cells is not None:
        maps -= (weights @ cells.medians())[..., None, None]
    return mirrored(maps) if view.cut.flip else maps


def _channels_first(fields: Tensor, channels: int) -> Tensor:
    """[n, 2h, w, 1] of flow, u above v, or [n, h, w, 3] -> [n, c, h, w]."""
    if channels == 2:
        return rearrange(fields[..., 0], "n (c h) w -> n c h w", c=channels)
    return rearrange(fields, "n h w c -> n c h w")


def summed_codes(codes: Tensor, weights: Weights) -> Tensor:
    """Sum uint8 codes [n, ...], less that of no motion, by weights [T, n] -> float32 [T, ...].

    The weights of a segment have one sign. A CPU adds each field to its segment's running mean, so
    that no field becomes float32 first.
    """
    if codes.device.type != "cpu":
        return _summed(torch.from_numpy(weights).to(codes.device), codes.float().sub_(FLOW_ZERO))
    fields, sums = codes.numpy(), np.zeros((len(weights), *codes.shape[1:]), np.float32)
    for segment, row in zip(sums, weights, strict=True):
        total = 0.0
        for place in np.flatnonzero(row).tolist():
            total += float(row[place])
            cv2.accumulateWeighted(fields[place], segment, float(row[place]) / total)
        segment -= FLOW_ZERO
        segment *= total
    return torch.from_numpy(sums)


def _summed(weights: Tensor, values: Tensor) -> Tensor:
    """Sum values [n, ...] by weights [T, n] -> [T, ...]."""
    return (weights @ values.flatten(1)).view(len(weights), *values.shape[1:])


def mirrored(maps: Tensor) -> Tensor:
    """Mirror maps [..., c, h, w] from left to right; u of a flow changes its sign."""
    turned = maps.flip(-1)
    if turned.shape[-3] == 2:
        turned[..., 0, :, :].neg_()
    return turned


class Cells(NamedTuple):
    """Sums of the codes of 32 x 32 cells of whole fields.

    Attributes:
        sums: [n, c, 32, 32], int16 where a cell holds whole places; else float32 means, of one.
        places: Places of a cell.
    """

    sums: Tensor
    places: int

    def means(self) -> Tensor:
        """Return the mean [n, c, 32, 32] of each cell, less the code of no motion."""
        return self.sums / self.places - FLOW_ZERO

    def medians(self) -> Tensor:
        """Return the median mean [n, c] over the cells: the mean of the middle two."""
        values = self.sums.flatten(2)
        middle = values.shape[2] // 2
        if values.device.type == "cpu":  # NumPy's is many times as fast as torch's
            parted = np.partition(values.numpy(), middle, axis=2)
            upper, lower = parted[..., middle], parted[..., :middle].max(axis=2)
            twice = torch.from_numpy(upper + lower)
        else:
            twice = values.sort(dim=2).values[..., middle - 1 : middle + 1].sum(dim=2)
        return twice / (2 * self.places) - FLOW_ZERO


def whole_cells(codes: Tensor) -> Cells:
    """Sum uint8 codes [n, c, h, w] over 32 x 32 cells."""
    height, width = (side // SIDE for side in codes.shape[-2:])
    uneven = codes.shape[-2] % SIDE or codes.shape[-1] % SIDE
    if uneven or height * width > MOST_PLACES:
        return Cells(area_means(codes.float(), Cut(WHOLE)), 1)
    rows = rearrange(codes, "n c (cell row) w -> n c cell row w", row=height)
    down = rows[:, :, :, 0].short()  # [n, c, 32, w]
    for row in range(1, height):
        down += rows[:, :, :, row]
    columns = down.numpy() if down.device.type == "cpu" else down  # NumPy takes every k-th faster than torch
    sums = columns[..., 0::width]
    for column in range(1, width):
        sums = sums + columns[..., column::width]
    return Cells(torch.as_tensor(sums), height * width)


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
