"""Golden cases of the pre-training methods: their files, and the inputs that they name."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from golden_case import GOLDEN, fill

COLOUR = {"mean": (0.43216, 0.394666, 0.37645), "std": (0.22803, 0.22145, 0.216989)}


def outputs_of(path: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{path}.npz") as stored:
        return dict(stored)


def settings_of(path: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{path}.json").read_text())


def structured_clip(name: str, shape: tuple[int, int, int], seed: int, *, normalised: bool = False) -> torch.Tensor:
    """[B, 3, T, S, S] in [0, 1) of shape (B, T, S): coarse cells that last, and noise; FIMA's cases start from it."""
    batch, frames, size = shape
    coarse = fill.uniform(f"{name}.coarse", (batch, 3, 4, 4, 4), seed)
    for axis, side in ((2, frames), (3, size), (4, size)):
        coarse = coarse.repeat(side // 4, axis)
    fine = fill.uniform(f"{name}.fine", (batch, 3, frames, size, size), seed)
    clip = torch.from_numpy(np.float32(0.7 * coarse + 0.3 * fine))
    if not normalised:
        return clip
    mean, std = (torch.tensor(COLOUR[each], dtype=torch.float64)[:, None, None, None] for each in ("mean", "std"))
    return ((clip - mean) / std).float()


def normal(name: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(fill.normal(name, shape, seed))
