"""The golden cases of MSCL: `golden/mscl/README.md` says what each is."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from golden_case import fill
from pretraining_case import outputs_of, settings_of

from fsar.pretraining.mscl import MSCL, PairedViews

CASES = settings_of("mscl/cases")
BATCH, QUEUE = 4, 32


def outputs(case: str) -> dict[str, np.ndarray]:
    return outputs_of(f"mscl/{case}")


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


@cache
def golden_state() -> dict[str, torch.Tensor]:
    """The golden weights of the whole model; its queues are short."""
    made = MSCL(queue=QUEUE)
    fill.load_into(made, CASES["seed"])
    queues = {f"{name}.queue": unit(f"{name}.queue", 128, QUEUE, axis=0) for name in ("recognizer", "recognizer_flow")}
    return made.state_dict() | {name: tensor(queue) for name, queue in queues.items()}


def golden_model(**options: Any) -> MSCL:
    made = MSCL(queue=QUEUE, total=100, **options)
    made.load_state_dict(golden_state())
    return made


def golden_views(step: int) -> PairedViews:
    def flow(name: str) -> torch.Tensor:
        return tensor(fill.uniform(f"step{step}.{name}", (BATCH, 3, 16, 56, 56), CASES["seed"]))

    def images(name: str) -> torch.Tensor:
        return tensor(normal(f"step{step}.{name}", BATCH, 3, 8, 56, 56))

    return PairedViews(images("im_q"), images("im_k"), flow("flow_q"), flow("flow_k"))
