"""`result.json`: what a run claims, with everything that is needed to check it."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from fsar.run_state import weights_sha256

if TYPE_CHECKING:
    from fsar.config import RunConfig
    from fsar.evaluation import Result
    from fsar.methods import FewShotMethod
    from shards_spec import ShardSet


def describe(
    config: RunConfig, shards: ShardSet, model: FewShotMethod, test: Result, *, device: torch.device
) -> dict[str, Any]:
    """The result of an evaluation with its provenance: hashes of weights, shards and splits, versions."""
    return {
        "method": config.method,
        "dataset": shards.dataset.name,
        "way": config.test_way,
        "shot": config.test_shot,
        "test": test.to_json(),
        "fsar": version("fsar"),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": config.precision,
        "recipe_style": config.recipe_style,
        "weights_sha256": weights_sha256(model),
        "shards_sha256": shards.sha256,
        "splits_sha256": {name: split.sha256 for name, split in shards.dataset.splits.items()},
    }
