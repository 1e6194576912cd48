"""A golden case: the weights, inputs and outputs of the reference code that the files in `golden` describe."""

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

GOLDEN = Path(__file__).parents[1] / "golden"

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


def official_shapes(
    *, head: str = "molo", num_classes: int = 64, trunk: str | None = None, width: int = 2048
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the reference's state dict, tables left out.

    The files are of width 2048; other widths hold for heads in which every size is the width or a multiple of it.
    """
    shapes = json.loads((GOLDEN / "state_dicts" / f"{head}.json").read_text())
    del shapes["pe.pe"]
    shapes = {name: [n * width // 2048 if n >= 2048 else n for n in shape] for name, shape in shapes.items()}
    shapes["classification_layer.weight"][0] = shapes["classification_layer.bias"][0] = num_classes
    if trunk is not None:
        shapes |= json.loads((GOLDEN / "state_dicts" / f"trunk_{trunk}.json").read_text())
    return {name: tuple(shape) for name, shape in shapes.items()}


def official_state_dict(seed: int, **kind: Any) -> dict[str, torch.Tensor]:
    shapes = official_shapes(**kind)
    return {name: torch.from_numpy(np.asarray(fill.parameter(name, shape, seed))) for name, shape in shapes.items()}


@dataclass
class GoldenCase:
    """A case of MoLo."""

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


@dataclass
class HeadCase:
    """A case of the golden files that `golden/hyrsm/README.md` describes."""

    folder: str
    name: str

    @cached_property
    def settings(self) -> dict[str, Any]:
        return json.loads((GOLDEN / self.folder / f"{self.name}.json").read_text())

    @cached_property
    def outputs(self) -> dict[str, np.ndarray]:
        with np.load(GOLDEN / self.folder / f"{self.name}.npz") as stored:
            return dict(stored)

    @property
    def starts_from_images(self) -> bool:
        return self.settings["start"] == "images"

    @property
    def train_options(self) -> dict[str, Any]:
        return self.settings["train_options"]

    @property
    def num_classes(self) -> int:
        return self.train_options.get("NUM_CLASS", 64)

    @property
    def width(self) -> int:
        return {"resnet50": 2048, "resnet18": 512}[self.settings["backbone"]]

    @property
    def trunk(self) -> str | None:
        return self.settings["backbone"] if self.starts_from_images else None

    @property
    def options(self) -> dict[str, Any]:
        """Options of create_method that every method has."""
        trunk = {"trunk": self.trunk} if self.trunk else {"trunk": None, "channels": self.width}
        return trunk | {"frames": self.settings["frames"]}

    def state_dict(self, head: str) -> dict[str, torch.Tensor]:
        return official_state_dict(
            self.settings["seed"], head=head, num_classes=self.num_classes, trunk=self.trunk, width=self.width
        )

    def labels(self, name: str) -> np.ndarray:
        counts = {"support": "shot", "query": "queries_per_class", "unlabel": "unlabelled_per_class"}
        per_class = self.settings[counts[name]]
        way, seed = self.settings["way"], self.settings["seed"]
        order = np.argsort(fill.uniform(f"order:{name}", (way * per_class,), seed), kind="stable")
        return np.repeat(np.arange(way), per_class)[order]

    @cached_property
    def base_ids(self) -> np.ndarray:
        ranks = fill.uniform("classes", (self.num_classes,), self.settings["seed"])
        return np.argsort(ranks, kind="stable")[: self.settings["way"]]

    @cached_property
    def order(self) -> np.ndarray:
        """Support videos of the reference, class by class: ours[i] is the reference's video order[i]."""
        return np.argsort(self.labels("support"), kind="stable")

    def features(self, name: str) -> torch.Tensor:
        """[V, T, C] in the reference's order."""
        labels, seed, shape = self.labels(name), self.settings["seed"], (self.settings["frames"], self.width)
        centres = fill.normal("centre", (self.settings["way"], *shape), seed)
        values = 0.3 * centres[labels] + fill.normal(name, (len(labels), *shape), seed)
        return torch.from_numpy((np.maximum(values, 0) * self.settings["feature_scale"]).astype(np.float32))

    def images(self, name: str) -> torch.Tensor:
        """[V, T, 3, size, size] in the reference's order."""
        labels, seed, shape = self.labels(name), self.settings["seed"], (self.settings["frames"], 3, 8, 8)
        centres = fill.normal("centre_images", (self.settings["way"], *shape), seed)
        values = 0.5 * centres[labels] + fill.normal(f"{name}_images", (len(labels), *shape), seed)
        times = self.settings["image_size"] // 8
        return torch.from_numpy(values.astype(np.float32).repeat(times, axis=3).repeat(times, axis=4))

    def group(self, support: torch.Tensor) -> torch.Tensor:
        """[S, ...] in the reference's order -> [way, shot, ...]."""
        return support[torch.from_numpy(self.order)].unflatten(0, (self.settings["way"], self.settings["shot"]))

    def episode(self) -> Episode:
        inputs = self.images if self.starts_from_images else self.features
        kind = "" if self.starts_from_images else "_features"
        tensors = {f"support{kind}": self.group(inputs("support")), f"query{kind}": inputs("query")}
        if self.settings.get("unlabelled_per_class"):
            tensors[f"unlabelled{kind}"] = inputs("unlabel")
        return Episode(
            **({"support": None, "query": None} | tensors),
            query_labels=torch.from_numpy(self.labels("query")),
            class_ids=torch.arange(self.settings["way"]),
            base_ids=torch.from_numpy(self.base_ids),
        )

    def in_reference_order(self, grouped: torch.Tensor) -> torch.Tensor:
        """[way, shot, ...] -> [S, ...] as the reference had the videos."""
        return grouped.flatten(0, 1)[torch.from_numpy(np.argsort(self.order))]

    def in_our_order(self, rows: np.ndarray) -> np.ndarray:
        """[S + Q, ...] with the support rows class by class."""
        return np.concatenate([rows[: len(self.order)][self.order], rows[len(self.order) :]])
