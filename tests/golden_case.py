"""A golden case of MoLo: the weights, inputs and outputs of the reference code that the files in `golden` describe."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fsar.episode import Episode

GOLDEN = Path(__file__).parent / "golden"

# Settings of the reference's configurations: v, c, r of its losses, number of classes, A and B of its positions.
CONFIGS = {
    "ssv2_full": (0.8, 0.05, 0.1, 64, (10.0, 1.0)),
    "ssv2_small": (0.15, 0.05, 0.05, 64, (10.0, 1.0)),
    "ucf101": (0.6, 0.05, 0.05, 70, (10.0, 1.0)),
    "hmdb51": (0.4, 0.05, 0.05, 31, (10.0, 1.0)),
    "kinetics100": (0.1, 0.05, 0.1, 64, (2048.0, 0.02)),
}


def load_fill() -> Any:
    spec = importlib.util.spec_from_file_location("golden_fill", GOLDEN / "fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fill = load_fill()


def official_shapes(*, num_classes: int = 64, trunk: str | None = None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the reference's state dict, tables left out."""
    shapes = json.loads((GOLDEN / "state_dicts" / "molo.json").read_text())
    del shapes["pe.pe"]
    shapes["classification_layer.weight"][0] = shapes["classification_layer.bias"][0] = num_classes
    if trunk is not None:
        shapes |= json.loads((GOLDEN / "state_dicts" / f"trunk_{trunk}.json").read_text())
    return {name: tuple(shape) for name, shape in shapes.items()}


def official_state_dict(seed: int, **kind: Any) -> dict[str, torch.Tensor]:
    shapes = official_shapes(**kind)
    return {name: torch.from_numpy(np.asarray(fill.parameter(name, shape, seed))) for name, shape in shapes.items()}


@dataclass
class GoldenCase:
    name: str

    @cached_property
    def settings(self) -> dict[str, Any]:
        return json.loads((GOLDEN / "molo" / f"{self.name}.json").read_text())

    @cached_property
    def outputs(self) -> dict[str, np.ndarray]:
        with np.load(GOLDEN / "molo" / f"{self.name}.npz") as stored:
            return dict(stored)

    @property
    def starts_from_maps(self) -> bool:
        return self.settings["start"] == "maps"

    @property
    def training(self) -> bool:
        return self.settings["mode"] == "train"

    @property
    def options(self) -> dict[str, Any]:
        """Options of create_method; recons_weight is 4 r because the reference sums that term over 4 episodes."""
        v, c, r, num_classes, position_scale = CONFIGS[self.settings["config"]]
        trunk = {"trunk": None, "channels": 2048} if self.starts_from_maps else {"trunk": "resnet50"}
        return trunk | {
            "frames": self.settings["frames"],
            "num_classes": num_classes,
            "position_scale": position_scale,
            "classification_weight": v,
            "contrastive_weight": c,
            "recons_weight": 4 * r,
            "dropout": False,
        }

    @property
    def trunk(self) -> str | None:
        return None if self.starts_from_maps else "resnet50"

    def state_dict(self) -> dict[str, torch.Tensor]:
        return official_state_dict(self.settings["seed"], num_classes=self.options["num_classes"], trunk=self.trunk)

    def labels(self, name: str) -> np.ndarray:
        return np.array(self.settings[f"{name}_labels"])

    @cached_property
    def order(self) -> np.ndarray:
        """Support videos of the reference, class by class: ours[i] is the reference's video order[i]."""
        return np.argsort(self.labels("support"), kind="stable")

    @cached_property
    def mask(self) -> torch.Tensor | None:
        """[way, shot], None with equal shots."""
        counts = np.bincount(self.labels("support"))
        if (counts == counts[0]).all():
            return None
        return torch.arange(int(counts.max()))[None] < torch.from_numpy(counts)[:, None]

    def images(self, name: str) -> torch.Tensor:
        """[V, T, 3, 224, 224] in the reference's order."""
        labels, seed, frames = self.labels(name), self.settings["seed"], self.settings["frames"]
        videos = len(labels)
        z = (
            0.5 * fill.normal(f"{name}.frame", (videos, frames, 3, 7, 7), seed)
            + 0.5 * fill.normal(f"{name}.video", (videos, 1, 3, 7, 7), seed)
            + fill.normal("class", (self.settings["way"], 3, 7, 7), seed)[labels][:, None]
        ).astype(np.float32)
        return torch.from_numpy(np.repeat(np.repeat(z, 32, axis=3), 32, axis=4))

    def maps(self, name: str) -> torch.Tensor:
        """[V, T, 2048, 7, 7] in the reference's order."""
        labels, seed, frames = self.labels(name), self.settings["seed"], self.settings["frames"]
        videos = len(labels)
        m = (
            0.5 * fill.normal(f"{name}.map.frame", (videos, frames, 2048, 7, 7), seed)
            + 0.5 * fill.normal(f"{name}.map.video", (videos, 1, 2048, 1, 1), seed)
            + fill.normal("map.class", (self.settings["way"], 2048, 1, 1), seed)[labels][:, None]
        )
        return torch.from_numpy(np.maximum(m, 0).astype(np.float32))

    def group(self, support: torch.Tensor) -> torch.Tensor:
        """[S, ...] in the reference's order -> [way, shot, ...]; padding is 1000, which must never be seen."""
        ordered = support[torch.from_numpy(self.order)]
        way = self.settings["way"]
        if self.mask is None:
            return ordered.reshape(way, -1, *ordered.shape[1:])
        grouped = torch.full((*self.mask.shape, *ordered.shape[1:]), 1000.0)
        grouped[self.mask] = ordered
        return grouped

    def episode(self) -> Episode:
        maps, images = self.starts_from_maps, self.training or not self.starts_from_maps
        way = self.settings["way"]
        return Episode(
            support=self.group(self.images("support")) if images else None,
            query=self.images("target") if images else None,
            query_labels=torch.from_numpy(self.labels("target")),
            class_ids=torch.arange(way),
            base_ids=torch.tensor(self.settings["real_class_of_label"]),
            support_mask=self.mask,
            support_features=self.group(self.maps("support")) if maps else None,
            query_features=self.maps("target") if maps else None,
        )

    def in_our_order(self, rows: np.ndarray) -> np.ndarray:
        """[S + Q, ...] with the support rows class by class."""
        videos = len(self.order)
        return np.concatenate([rows[:videos][self.order], rows[videos:]])
