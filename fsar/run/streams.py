"""Say which streams a run reads, with which trunks, and how their answers are mixed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fsar.methods import Fusion, find_method, method_options
from fsar.trunks import MOTION_TRUNKS
from pipelines.episodes.motion import check_series_name
from shards_spec.errors import ConfigError
from shards_spec.files import json_bytes, read_json, write_whole

FUSION = "streams.json"  # in a run folder: how the answers of both streams are mixed


def write_fusion(run: Path, fusion: Fusion, split: str | None) -> None:
    """Write how a run's streams are mixed, and the split that it was chosen on."""
    write_whole(run / FUSION, json_bytes(asdict(fusion) | {"split": split}))


def read_fusion(run: Path, rule: float | str) -> Fusion:
    """Read how a run's streams are mixed; a number as the rule replaces its share of motion.

    Raises:
        ConfigError: the file is missing or damaged.
    """
    path = run / FUSION
    if not path.is_file():
        return Fusion(rule if isinstance(rule, float) else 0.5)
    table = read_json(path)
    try:
        spreads = {name: None if table[name] is None else float(table[name]) for name in ("frames", "motion")}
        fusion = Fusion(float(table["weight"]), **spreads)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path} is damaged ({error!r}): type the command of the training again with --resume"
        ) from error
    return fusion if isinstance(rule, str) else replace(fusion, weight=rule)


def of_streams(values: Mapping[str, Any]) -> dict[str, Any]:
    """Give the values that follow from the streams of a flat table.

    Where motion alone is read, the trunk of motion is the trunk of the run.

    Raises:
        ConfigError: the method cannot read these streams.
    """
    method = str(values["method"])
    only = find_method(method).only_stream
    streams = values.get("streams", only or "frames")
    if only and streams != only:
        raise ConfigError(f'method {method} reads {only} alone, not streams = "{streams}": leave streams out')
    weight = values.get("stream_weight")
    given = {"stream_weight": str(weight)} if isinstance(weight, int | float) else {}
    if streams != "motion":
        return given
    given |= {"streams": streams}
    if values.get("trunk") in MOTION_TRUNKS and not values.get("motion_trunk"):
        return given | {"trunk_weights": values.get("trunk_weights") or "random"}
    trunk = values.get("motion_trunk") or default_motion_trunk(method)
    return given | {"trunk": trunk, "trunk_weights": values.get("motion_trunk_weights", "random")}


def default_motion_trunk(method: str) -> str:
    """Name the trunk that a method reads motion with where none is chosen."""
    own = str(method_options(method).get("trunk"))
    return own if own in MOTION_TRUNKS else "tiny-flow"


def stream_weight(text: str) -> float | str:
    """Read the share of motion: a number, "train" or "support".

    Raises:
        ConfigError: it is none of them, or out of range.
    """
    if text in ("train", "support"):
        return text
    try:
        weight = float(text)
    except ValueError:
        weight = -1.0
    if not 0 <= weight <= 1:
        raise ConfigError(f'stream_weight = "{text}": expected a number from 0 to 1, train or support')
    return weight


def check_streams(values: Mapping[str, Any]) -> None:
    """Refuse values of streams that do not go together, of a whole configuration: ConfigError."""
    streams, trunk = values["streams"], values["trunk"]
    check_series_name(values["motion_series"])
    if stream_weight(values["stream_weight"]) == "support" and streams == "both" and values["test_shot"] < 2:
        raise ConfigError('stream_weight = "support" compares support videos of a class: test with 2 shots or more')
    if streams != "motion" and trunk in MOTION_TRUNKS:
        raise ConfigError(f'trunk {trunk} reads motion: set streams = "motion", or choose it as motion_trunk')
    if streams == "motion" and values["class_text"]:
        raise ConfigError("texts of classes go with frames: leave class_text out, or read both streams")
