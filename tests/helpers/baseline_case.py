"""Golden cases of the metric baselines: the method, its options and the reference's weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from golden_case import GOLDEN, HeadCase, fill

# Folder of golden files -> our method and the options that make it the reference's.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "otam": ("otam", {}),
    "trx": ("trx", {"dropout": False}),
    "ctx": ("ctx", {}),
    "tsn": ("prototype", {}),
}


@dataclass
class BaselineCase(HeadCase):
    @property
    def method(self) -> str:
        return METHODS[self.folder][0]

    @property
    def options(self) -> dict[str, Any]:
        return super().options | METHODS[self.folder][1]

    def shapes(self) -> dict[str, list[int]]:
        """Names and shapes of the reference's state dict."""
        path = GOLDEN / self.folder / "state_dict.json"
        shapes = json.loads(path.read_text()) if path.exists() else {}
        shapes = {name: [n * self.width // 2048 if n >= 2048 else n for n in shape] for name, shape in shapes.items()}
        trunk = GOLDEN / "state_dicts" / f"trunk_{self.trunk}.json"
        return shapes | (json.loads(trunk.read_text()) if self.trunk else {})

    def weights(self) -> dict[str, torch.Tensor]:
        """The reference's state dict; in CTX one tensor has two names, and the value made for the second."""
        seed = self.settings["seed"]
        state = {
            name: torch.from_numpy(np.asarray(fill.parameter(name, tuple(shape), seed)))
            for name, shape in self.shapes().items()
        }
        if self.folder == "ctx":
            state["key_head.weight"] = state["query_head.weight"]
        return state
