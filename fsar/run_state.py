"""Checkpoints of a run: one safetensors file each, whole or absent, with the state of the loop in its header."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fsar.evaluation.overlap import Seen
from fsar.trunks import Trunk
from shards_spec.errors import ConfigError
from shards_spec.files import disk_errors, write_whole

MODEL, OPTIMIZER = "model.", "optimizer."
SEEN_CLASSES, SEEN_VIDEOS = "seen.classes", "seen.videos"
COLOURS, SOURCES = "colours", "sources"  # beside the loop's values


def save_state(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    loop: dict[str, Any],
    *,
    seen: Seen | None = None,
) -> None:
    """Write weights, optimiser state, the loop's own values (JSON) and what the weights have seen, atomically.

    The constants of colour of the model's trunk go with them.

    Raises:
        DiskError: the disk is full; the previous checkpoint is untouched.
    """
    tensors = {MODEL + name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    if optimizer is not None:
        for number, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"{OPTIMIZER}{number}.{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    if seen is not None:
        tensors |= {SEEN_CLASSES: seen.classes, SEEN_VIDEOS: seen.videos}
        loop = loop | {SOURCES: seen.sources}
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    if (trunk := _trunk(model)) is not None:
        loop = loop | {COLOURS: {"mean": trunk.mean, "std": trunk.std}}
    # One text alone: several would be written in an order of chance.
    write_whole(path, save(tensors, metadata={"loop": json.dumps(loop)}))


def _trunk(model: nn.Module) -> Trunk | None:
    """The trunk that pictures go to: the first, since others are its copies or read flow."""
    return next((module for module in model.modules() if isinstance(module, Trunk)), None)


def take_colours(model: nn.Module, path: Path) -> None:
    """Give the trunk of a model the constants of colour that a checkpoint's weights were trained with.

    A checkpoint that does not say them leaves the trunk's own.

    Raises:
        ConfigError: the file is missing or damaged.
    """
    _set_colours(model, _read(path, only=())[1], path)


def _colours(said: Any) -> list[Any] | None:  # noqa: ANN401 -- out of a file
    """Mean and std of three channels; None for anything else."""
    try:
        colours = [tuple(map(float, said[name])) for name in ("mean", "std")]
    except (KeyError, TypeError, ValueError):
        return None
    fits = all(len(each) == 3 and all(map(math.isfinite, each)) for each in colours) and min(colours[1]) > 0
    return colours if fits else None


def _set_colours(model: nn.Module, loop: dict[str, Any], path: Path) -> None:
    trunk = _trunk(model)
    if trunk is None or COLOURS not in loop:
        return
    colours = _colours(loop[COLOURS])
    if colours is None:
        raise ConfigError(f"{path} is damaged or no checkpoint of ours (its constants of colour are none)")
    if colours != [trunk.mean, trunk.std]:
        trunk.mean, trunk.std = colours


def choose_checkpoint(run: Path, name: str | None = None) -> Path:
    """The checkpoint `best` or `last` of a run folder; by default the best where validation chose one."""
    best, last = (run / "checkpoints" / f"{which}.safetensors" for which in ("best", "last"))
    return best if name == "best" or (name is None and best.exists()) else last


def load_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Load what `save_state` wrote and return the loop's values.

    Raises:
        ConfigError: the file is missing, damaged, or of another model.
    """
    tensors, loop = _read(path)
    weights = {name.removeprefix(MODEL): value for name, value in tensors.items() if name.startswith(MODEL)}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise ConfigError(f"{path} does not fit the model of this configuration: {reason}") from error
    if optimizer is not None:
        try:
            _load_optimizer(optimizer, tensors)
        except (ValueError, KeyError) as error:
            raise ConfigError(f"{path} is damaged or no checkpoint of ours ({error})") from error
    _set_colours(model, loop, path)
    return {key: value for key, value in loop.items() if key not in (COLOURS, SOURCES)}


def load_seen(path: Path) -> Seen | None:
    """What the weights of a checkpoint have seen in training; None where an older one does not say.

    Raises:
        ConfigError: the file is missing or damaged.
    """
    tensors, loop = _read(path, only=(SEEN_CLASSES, SEEN_VIDEOS))
    if not tensors:
        return None
    hashes = [tensors.get(name, torch.empty(0)) for name in (SEEN_CLASSES, SEEN_VIDEOS)]
    sources = loop.get(SOURCES, [])
    named = isinstance(sources, list) and all(isinstance(source, str) for source in sources)
    if any(each.dtype != torch.int64 or each.ndim != 1 for each in hashes) or not named:
        raise ConfigError(f"{path} is damaged or no checkpoint of ours (what it says of its training is no hashes)")
    return Seen(hashes[0], hashes[1], tuple(sources))


def _read(path: Path, *, only: tuple[str, ...] | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, or those named alone, and the loop's values."""
    if not path.is_file():
        raise ConfigError(f"{path} is missing; give the folder of a run that reached its first checkpoint")
    try:
        with safe_open(path, framework="pt") as file:
            loop = dict(json.loads((file.metadata() or {})["loop"]))
            names = [name for name in file.keys() if only is None or name in only]  # noqa: SIM118 -- no mapping
            return {name: file.get_tensor(name) for name in names}, loop
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged or no checkpoint of ours ({error})") from error


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    parameters = dict(enumerate(each for group in optimizer.param_groups for each in group["params"]))
    for name, value in tensors.items():
        if name.startswith(OPTIMIZER):
            number, _, key = name.removeprefix(OPTIMIZER).partition(".")
            if value.ndim and value.shape != parameters[int(number)].shape:
                raise ValueError(f"{name} is not of the shape of its parameter")
            state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def weights_sha256(model: nn.Module) -> str:
    """Hash of a model's weights: names and values."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
