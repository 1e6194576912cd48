"""`result.json`: accuracy and provenance of a run; `data.json`: hashes of its training data."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from fsar.checkpoints import weights_sha256
from fsar.evaluation.accuracy import Result, summarise
from fsar.evaluation.intervals import Answers, StreamAnswers
from fsar.methods import Model, method_options
from fsar.run.config import RunConfig
from fsar.run.keys import recorded
from shards_spec import ShardSet
from shards_spec.errors import ShardError
from shards_spec.schema import Plan

# Name of a control in a result -> what it is
CONTROL_TEXTS = {
    "frozen_prototypes": "prototypes of the untrained trunk",
    "stored_motion": "stored motion without training",
}


def describe(
    config: RunConfig,
    shards: ShardSet,
    model: Model,
    test: Result,
    *,
    device: torch.device,
    class_text: str | None = None,
) -> dict[str, Any]:
    """Describe the result of an evaluation: settings, accuracy and provenance.

    Args:
        config: The run's configuration.
        shards: The shards.
        model: The model that was tested.
        test: Its accuracy.
        device: The device that computed it.
        class_text: Hash of the file of class texts that the model read.
    """
    return (
        recorded(config)
        | {"dataset": shards.dataset.name, "test": test.to_json(), "class_text_sha256": class_text}
        | inference(config)
        | provenance(shards, model, device=device, precision=config.precision)
    )


def provenance(shards: ShardSet, model: nn.Module, *, device: torch.device, precision: str) -> dict[str, Any]:
    """Describe the provenance of a result: versions, device, hashes, coverage of the splits."""
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
    """Name the inference of a method that has several; a method without a choice adds nothing."""
    options = method_options(config.method)
    return {"inference": config.options.get("inference", options["inference"])} if "inference" in options else {}


def of_streams(answers: Answers, classes: Sequence[str]) -> dict[str, Any]:
    """Describe each stream by itself, and the mean share of motion; nothing for a single stream."""
    if not isinstance(answers, StreamAnswers):
        return {}
    alone = {name: summarise(answers.of_stream(name), classes).to_json() for name in answers.of_streams}
    return {"of_streams": alone, "share_of_motion": float(answers.weights.mean())}


def stream_lines(table: Mapping[str, Any]) -> Iterator[str]:
    """Say what each stream reaches by itself."""
    for name, test in table.get("of_streams", {}).items():
        yield f"the same episodes, {name} alone: {test['accuracy']:.1%}"
    if "share_of_motion" in table:
        yield f"share of motion in the answers: {table['share_of_motion']:.2f}"


def coverage(shards: ShardSet) -> dict[str, list[int]]:
    """Count the stored and the published videos of each split whose published size is known."""
    return {name: [len(shards.split_rows(name)), of] for name, (_, of) in shards.dataset.coverage.items()}


def coverage_text(shards: ShardSet) -> str | None:
    """Say which splits miss videos; None if no split does."""
    parts = {name: counts for name, counts in coverage(shards).items() if counts[0] < counts[1]}
    if not parts:
        return None
    missing = ", ".join(f"{name} {have:,} of {of:,} videos" for name, (have, of) in parts.items())
    return f"incomplete data set: {missing}"


def describe_data(shards: ShardSet) -> dict[str, Any]:
    """Describe the training data: hashes of shards and splits, and the size of the stored frames.

    The size has both sides, or only the short side where videos keep their aspect.

    Raises:
        ShardError: the plan of the shards does not tell the size.
    """
    text = Plan.load(shards.files / "plan.json").series.get("rgb", {}).get("geometry", "")
    sides = [int(side) for side in re.findall(r"\d{1,5}", str(text))]
    if len(sides) not in (1, 2):
        raise ShardError(f"{shards.path / 'plan.json'} does not tell the size of the frames; make the shards again")
    geometry = {"short": sides[0]} if len(sides) == 1 else {"height": sides[0], "width": sides[1]}
    splits = {name: split.sha256 for name, split in shards.dataset.splits.items()}
    return {"shards": shards.sha256, "geometry": geometry} | splits
