"""The golden cases of MSCL: `golden/mscl/README.md` says what each is."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from tests.golden_case import GOLDEN, fill

CASES: dict[str, Any] = json.loads((GOLDEN / "mscl" / "cases.json").read_text())


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
