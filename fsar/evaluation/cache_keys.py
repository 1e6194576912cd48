"""Hash all that computed values depend on, so that two keys are equal only where the values are."""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fsar.loader import EpisodeLoader
from shards_spec.files import json_line

# Rules that decide what a view shows; the others decide which videos an episode takes
OF_VIEWS = (
    "frames", "frame_rule", "clip_frames", "clip_stride", "random_frames", "resize", "resize_width", "crop",
    "random_crop", "query_flip",
)  # fmt: skip
OF_MOTION = ("motion_series", "fields", "camera")
# Modules whose code decides them
MAKERS = (
    "fsar.evaluation.embeddings",
    "pipelines.augment.clips",
    "pipelines.augment.motion",
    "pipelines.augment.on_cpu",
    "pipelines.episodes.clip_views",
    "pipelines.episodes.motion",
    "pipelines.episodes.rules",
    "pipelines.episodes.stream",
    "pipelines.episodes.views",
    "pipelines.sampling",
)
PLAIN = (bool, int, float, str, tuple, type(None), torch.dtype, torch.memory_format)


def model_sha256(model: nn.Module) -> str:
    """Hash all that a model computes with: weights, tables, options and its modules' code."""
    digest = hashlib.sha256()
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    for name, module in model.named_modules():
        plain = {k: str(v) for k, v in vars(module).items() if isinstance(v, PLAIN) and k != "training"}
        digest.update(json_line([name, type(module).__qualname__, plain]))
    digest.update(source_sha256({kind.__module__ for m in model.modules() for kind in type(m).__mro__}).encode())
    return digest.hexdigest()


def source_sha256(modules: Iterable[str]) -> str:
    """Hash the source files of modules by name; torch's version stands for its own.

    Raises:
        ModuleNotFoundError: there is no such module.
    """
    digest = hashlib.sha256()
    for name in sorted(modules):
        path = getattr(sys.modules.get(name) or importlib.import_module(name), "__file__", None)
        if path and name.partition(".")[0] != "torch":
            digest.update(name.encode())
            digest.update(Path(path).read_bytes())
    return digest.hexdigest()


def view_facts(loader: EpisodeLoader, precision: str, *, stream: str = "frames") -> dict[str, Any]:
    """Collect what the values of a view depend on besides its video and the network.

    `stream` is "frames", "motion", or "both" for values that are made of both.
    """
    values, device = asdict(loader.rules), loader.device
    names = OF_VIEWS + (() if stream == "frames" else OF_MOTION)
    return {name: values[name] for name in names} | {
        "stream": stream,
        "shards": loader.shards.sha256,
        "code": source_sha256(MAKERS),
        "executor": type(loader.executor).__name__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": precision,
        "fsar": version("fsar"),
        "torch": torch.__version__,
    }


def key_of(facts: Mapping[str, Any]) -> str:
    """Hash facts by SHA-256."""
    return hashlib.sha256(json_line(facts)).hexdigest()
