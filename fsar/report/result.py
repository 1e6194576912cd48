"""What a run says of itself: `result.json`, its claims and their provenance; `data.json`, what it was trained on."""

from __future__ import annotations

import re
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from fsar.checkpoints import weights_sha256
from fsar.evaluation.accuracy import Result
from fsar.methods import FewShotMethod, method_options
from fsar.run.config import RunConfig
from shards_spec import ShardSet
from shards_spec.errors import ShardError
from shards_spec.schema import Plan


def describe(
    config: RunConfig,
    shards: ShardSet,
    model: FewShotMethod,
    test: Result,
    *,
    device: torch.device,
    class_text: str | None = None,
) -> dict[str, Any]:
    """The result of an evaluation with its provenance: hashes of weights, shards, splits and texts, versions.

    Args:
        config: The run's configuration.
        shards: The shards.
        model: The model that was tested.
        test: What it reached.
        device: Where it computed.
        class_text: Hash of the file of texts of classes that it read.
    """
    return (
        {
            "method": config.method,
            "dataset": shards.dataset.name,
            "way": config.test_way,
            "shot": config.test_shot,
            "queries": config.test_queries,
            "unlabelled_per_class": config.unlabelled_per_class,
            "distractor_classes": config.distractor_classes,
            "distractors_per_class": config.distractors_per_class,
            "labelled_fraction": config.labelled_fraction,
            "views": config.views,
            "freeze_trunk": config.freeze_trunk,
            "test": test.to_json(),
            "recipe_style": config.recipe_style,
            "class_text_sha256": class_text,
        }
        | inference(config)
        | provenance(shards, model, device=device, precision=config.precision)
    )


def provenance(shards: ShardSet, model: nn.Module, *, device: torch.device, precision: str) -> dict[str, Any]:
    """Where a result comes from: versions, the device, hashes of weights, shards and splits."""
    return {
        "fsar": version("fsar"),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": precision,
        "weights_sha256": weights_sha256(model),
        "shards_sha256": shards.sha256,
        "splits_sha256": {name: split.sha256 for name, split in shards.dataset.splits.items()},
        "coverage": coverage(shards),
    }


def inference(config: RunConfig) -> dict[str, Any]:
    """How the method answers, where it has an option that says so."""
    options = method_options(config.method)
    return {"inference": config.options.get("inference", options["inference"])} if "inference" in options else {}


def coverage(shards: ShardSet) -> dict[str, list[int]]:
    """Split -> videos stored, videos that the published split has; splits whose size is not known are left out."""
    return {name: [len(shards.split_rows(name)), of] for name, (_, of) in shards.dataset.coverage.items()}


def coverage_text(shards: ShardSet) -> str | None:
    """A line for people where videos are missing."""
    parts = {name: counts for name, counts in coverage(shards).items() if counts[0] < counts[1]}
    if not parts:
        return None
    missing = ", ".join(f"{name} {have:,} of {of:,} videos" for name, (have, of) in parts.items())
    return f"incomplete data set: {missing}"


def describe_data(shards: ShardSet) -> dict[str, Any]:
    """Hashes of the shards and splits, and the size of the stored frames: fixed sides, or the short side alone."""
    text = Plan.load(shards.files / "plan.json").series.get("rgb", {}).get("geometry", "")
    sides = [int(side) for side in re.findall(r"\d{1,5}", str(text))]
    if len(sides) not in (1, 2):
        raise ShardError(f"{shards.path / 'plan.json'} does not tell the size of the frames; make the shards again")
    geometry = {"short": sides[0]} if len(sides) == 1 else {"height": sides[0], "width": sides[1]}
    splits = {name: split.sha256 for name, split in shards.dataset.splits.items()}
    return {"shards": shards.sha256, "geometry": geometry} | splits
