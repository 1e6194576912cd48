"""Recipe styles: what the published code does, and what replaces its known faults.

| option | reference | fixed |
|---|---|---|
| lr_clock | reference: counts the epoch twice, so that the rate falls at double speed | single |
| decay_norms | reference: weight decay on the norms whose names lack "bn", on tokens and biases | none |
| test_frames | random (centre in the Kinetics rule) | centre |
| kinetics_window | reference: the last 35 frames of a window are never used | whole |
| weight_decay | 1e-3, of a base file that the data set's own value does not reach | the data set's own value |
| query_flip | on (CLIP-FSAR: on Kinetics alone) | as there, and off where left and right tell classes apart |
| query_jitter | on: queries alone are jittered, as the authors meant it (CLIP-FSAR: on Kinetics alone) | as there |
| select_on | val; `--select-on test`, as the code does, is stamped into the result | val |

The first four belong to the style and are never mixed in a run; the others are its defaults, which a run may change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shards_spec.errors import ConfigError, suggest

STYLES = ("reference", "fixed")
CODE_DECAY = 1e-3
# SOLVER.WEIGHT_DECAY as the published settings of each data set write it (nothing reads it there).
WRITTEN_DECAY = {
    "ssv2-full": 5e-5,
    "ssv2-small": 5e-5,
    "epic": 5e-5,
    "kinetics100": 5e-4,
    "ucf101": 5e-4,
    "hmdb51": 5e-4,
}
# The same where a method's settings for a data set write another value than the others' do.
OWN_DECAY = {("clip-fsar", "ucf101"): 5e-5, ("clip-fsar", "hmdb51"): 5e-5}
# Methods whose queries are mirrored and jittered on these data sets alone; those of other methods are everywhere.
DISTORTED = {"clip-fsar": frozenset({"kinetics100"})}
DIRECTED = frozenset({"ssv2-full", "ssv2-small"})  # "from left to right" and its mirror image are two classes


def bound_options(style: str, frame_rule: str) -> dict[str, Any]:
    """Options that a style fixes, for a frame rule.

    Raises:
        ConfigError: there is no such style.
    """
    if style == "reference":
        test_frames = "centre" if frame_rule == "kinetics" else "random"
        return {
            "lr_clock": "reference",
            "decay_norms": "reference",
            "test_frames": test_frames,
            "kinetics_window": "reference",
        }
    if style == "fixed":
        return {"lr_clock": "single", "decay_norms": "none", "test_frames": "centre", "kinetics_window": "whole"}
    raise ConfigError(f'recipe_style = "{style}": {suggest(style, STYLES)}')


def restyle(table: Mapping[str, Any], style: str) -> dict[str, Any]:
    """A recipe in another style: what the style fixes, and its defaults for the recipe's data set."""
    values = {"recipe_style": style} | bound_options(style, table.get("frame_rule", "segment"))
    method, dataset = str(table.get("method")), table.get("dataset")
    if dataset in WRITTEN_DECAY:
        written = OWN_DECAY.get((method, dataset), WRITTEN_DECAY[dataset])
        values["weight_decay"] = CODE_DECAY if style == "reference" else written
        flips = style == "reference" or dataset not in DIRECTED
        values["query_flip"] = flips and dataset in DISTORTED.get(method, {dataset})
    return dict(table) | values
