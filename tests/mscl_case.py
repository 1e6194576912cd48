"""The golden cases of MSCL: `golden/mscl/README.md` says what each is."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch

from fsar.pretraining.mscl import MSCL, MotionViews
from tests.golden_case import GOLDEN, fill

CASES: dict[str, Any] = json.loads((GOLDEN / "mscl" / "cases.json").read_text())
BATCH, QUEUE = 4, 32


def outputs(case: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "mscl" / f"{case}.npz") as stored:
        return dict(stored)


def normal(name: str, *shape: int) -> np.ndarray:
    return fill.normal(name, shape, CASES["seed"])


def unit(name: str, *shape: int, axis: int) -> np.ndarray:
    values = normal(name, *shape)
    return values / np.linalg.norm(values, axis=axis, keepdims=True)


def motion_fields() -> list[np.ndarray]:
    """110 fields [56, 84, 2] whose motion is strong in some stretches."""
    base = 3 * normal("mds.base", 4, 6, 2)
    strength = [2.0 if 12 <= i % 40 < 22 else 0.2 for i in range(110)]
    cells = [base + np.float32(a) * normal(f"mds.coarse.{i}", 4, 6, 2) for i, a in enumerate(strength)]
    return [cell.repeat(14, axis=0).repeat(14, axis=1) for cell in cells]


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def golden_model(trunk: str = "r3d18", **options) -> MSCL:
    """MSCL with the golden weights; its queues are short."""
    made = MSCL(trunk, queue=QUEUE, total=100, **options)
    fill.load_into(made, CASES["seed"])
    for name in ("recognizer", "recognizer_flow"):
        learner = made.get_submodule(name)
        learner.queue.copy_(tensor(unit(f"{name}.queue", 128, QUEUE, axis=0)))
    return made


def golden_views(step: int) -> MotionViews:
    def flow(name: str) -> torch.Tensor:
        return tensor(fill.uniform(f"step{step}.{name}", (BATCH, 3, 16, 56, 56), CASES["seed"]))

    def images(name: str) -> torch.Tensor:
        return tensor(normal(f"step{step}.{name}", BATCH, 3, 8, 56, 56))

    return MotionViews(images("im_q"), images("im_k"), flow("flow_q"), flow("flow_k"))
