"""Save and load weights: our checkpoints, published names, and the record of a training."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fsar.methods.base import FewShotMethod
from fsar.trunks import Trunk
from fsar.trunks.weight_files import trunk_entries
from shards_spec.errors import ConfigError
from shards_spec.files import disk_errors, write_whole

Hashes = NDArray[np.int64]
CLASSIFIER = "classification_layer."
# Tables, computed and not learned: positions, and the frame tuples of TRX.  We make ours anew.
TABLES = re.compile(r"(transformers\.\d+\.)?(pe\.pe|tuples\.\d+)")
# Parts of published pre-training models that nothing reads: a second neck, and classifiers
UNREAD = re.compile(r"recognizer\.neck_k\..+|recognizer(_flow)?\.encoder_[qk]\.fc\..+")
# Nothing reads the first at a fixed BatchNorm momentum.  Published files lack MSCL's clock.
COUNTERS = (".num_batches_tracked", ".iters")
MODEL, OPTIMIZER = "model.", "optimizer."
TRAINING_CLASSES, TRAINING_VIDEOS = "seen.classes", "seen.videos"  # in the files, so that old ones are read
COLOURS, SOURCES = "colours", "sources"  # keys next to the loop's values


@dataclass(frozen=True)
class TrainingRecord:
    """Classes and videos that weights were trained on, as sorted 64-bit hashes.

    Attributes:
        classes: [C] int64, of the class names.
        videos: [V] int64, of the videos' original names.
        sources: Names of the sets of videos, for people.
    """

    classes: Tensor
    videos: Tensor
    sources: tuple[str, ...] = ()


def join_records(first: TrainingRecord, second: TrainingRecord | None) -> TrainingRecord:
    """Join the records of two trainings of the same weights, one after the other."""
    if second is None:
        return first
    pairs = ((first.classes, second.classes), (first.videos, second.videos))
    classes, videos = (torch.from_numpy(np.union1d(*pair)) for pair in pairs)
    return TrainingRecord(classes, videos, tuple(dict.fromkeys(first.sources + second.sources)))


def reference_names(model: nn.Module) -> dict[str, str]:
    """Map our name of each entry of the model's state dict to the official one, without "head.".

    An entry that no published code has keeps its own name.
    """
    prefixes = reference_prefixes(model)
    return {name: official_name(name, prefixes) for name in model.state_dict()}


def reference_prefixes(model: nn.Module) -> dict[str, str]:
    """Map our name prefixes of a method and its trunk to the official ones."""
    if not isinstance(model, FewShotMethod):
        return {}
    trunk = {} if model.trunk is None else model.trunk.REFERENCE_NAMES
    return {f"trunk.{ours}": f"backbone.{theirs}" for ours, theirs in trunk.items()} | dict(model.REFERENCE_NAMES)


def official_name(name: str, prefixes: Mapping[str, str]) -> str:
    """Replace the one prefix of a name that fits."""
    for ours, theirs in prefixes.items():
        if f"{name}.".startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    return name


def load_reference_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], *, drop_classifier: bool = False
) -> None:
    """Load weights with official names, with or without the prefixes "module." and "head.".

    Position tables and step counters may be absent.  A trunk also takes its entries from a larger
    model, such as the `encoder_q` of a pre-training method.

    Args:
        model: A method or a trunk.
        state_dict: The weights by their official names.
        drop_classifier: Leave the auxiliary classifier as it is, for weights trained with another
            number of classes.

    Raises:
        ConfigError: entries are missing, unexpected or of a wrong shape; it names all, and nothing
            is loaded.
    """
    given = {bare_name(name): value for name, value in state_dict.items()}
    given = trunk_entries(given) if isinstance(model, Trunk) else given
    ours = {official: name for name, official in reference_names(model).items()}
    if drop_classifier:
        given = {name: value for name, value in given.items() if not name.startswith(CLASSIFIER)}
        ours = {name: own for name, own in ours.items() if not name.startswith(CLASSIFIER)}
    own_values = model.state_dict()
    check_entries(given, {official: own_values[name] for official, name in ours.items()})
    model.load_state_dict({ours[name]: given[name] for name in given if name in ours}, strict=False)


def bare_name(name: str) -> str:
    """Remove the prefixes of a parallel wrapper and of the outer model from a name."""
    return name.removeprefix("module.").removeprefix("head.")


def check_entries(given: Mapping[str, object], wanted: Mapping[str, Tensor]) -> None:
    """Check that a state dict has the entries that are wanted, in their shapes, and no others.

    Raises:
        ConfigError: it has not.
    """
    missing = [name for name in wanted if name not in given and not name.endswith(COUNTERS)]
    unexpected = [
        name for name in given if name not in wanted and not (TABLES.fullmatch(name) or UNREAD.fullmatch(name))
    ]
    wrong = [
        f"{name} ({shape_text(given[name])}, not {shape_text(value)})"
        for name, value in wanted.items()
        if name in given and shape_text(given[name]) != shape_text(value)
    ]
    found = {"missing": missing, "unexpected": unexpected, "of a wrong shape": wrong}
    problems = [f"{what}: {listing(names)}" for what, names in found.items() if names]
    if problems:
        hint = "; drop_classifier leaves the classifier out" if any(CLASSIFIER in text for text in problems) else ""
        raise ConfigError(
            f"the state dict does not fit the model ({'; '.join(problems)}); "
            f"choose the options it was trained with{hint}"
        )


def shape_text(value: object) -> str:
    """Write the shape of a tensor as text; of anything else, its type."""
    return str(list(value.shape)) if isinstance(value, torch.Tensor) else type(value).__name__


def listing(names: Iterable[str], most: int = 8) -> str:
    """List the first names, and how many more there are."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def save_state(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    loop: dict[str, Any],
    *,
    trained_on: TrainingRecord | None = None,
) -> None:
    """Write a checkpoint atomically: weights, optimiser state, and the trunk's colour constants.

    Args:
        path: The file.
        model: Its weights.
        optimizer: Its state; None: weights only.
        loop: The training loop's own values, as JSON has them.
        trained_on: The record of the training.

    Raises:
        DiskError: the disk is full; the previous checkpoint is untouched.
    """
    tensors = {MODEL + name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    if optimizer is not None:
        for number, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"{OPTIMIZER}{number}.{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    if trained_on is not None:
        tensors |= {TRAINING_CLASSES: trained_on.classes, TRAINING_VIDEOS: trained_on.videos}
        loop = loop | {SOURCES: trained_on.sources}
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    if (trunk := _trunk(model)) is not None:
        loop = loop | {COLOURS: {"mean": trunk.mean, "std": trunk.std}}
    # One text for all values: safetensors writes several in an order of chance.
    write_whole(path, save(tensors, metadata={"loop": json.dumps(loop)}))


def _trunk(model: nn.Module) -> Trunk | None:
    """Find the trunk that pictures go to: the first, since others are its copies or read flow."""
    return next((module for module in model.modules() if isinstance(module, Trunk)), None)


def take_colours(model: nn.Module, path: Path) -> None:
    """Give the trunk of a model the colour constants that a checkpoint's weights were trained with.

    An older checkpoint does not hold them; the trunk then keeps its own.

    Raises:
        ConfigError: the file is missing or damaged.
    """
    _set_colours(model, _read(path, only=())[1], path)


def _colours(said: Any) -> list[Any] | None:  # noqa: ANN401 -- out of a file
    """Parse mean and std of three channels; None for anything else."""
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
    """Find the checkpoint `best` or `last` of a run folder; by default the best, if it is there."""
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


def load_training_record(path: Path) -> TrainingRecord | None:
    """Read the record of the training of a checkpoint's weights; None where an older one has none.

    Raises:
        ConfigError: the file is missing or damaged.
    """
    tensors, loop = _read(path, only=(TRAINING_CLASSES, TRAINING_VIDEOS))
    if not tensors:
        return None
    hashes = [tensors.get(name, torch.empty(0)) for name in (TRAINING_CLASSES, TRAINING_VIDEOS)]
    sources = loop.get(SOURCES, [])
    named = isinstance(sources, list) and all(isinstance(source, str) for source in sources)
    if any(each.dtype != torch.int64 or each.ndim != 1 for each in hashes) or not named:
        raise ConfigError(f"{path} is damaged or no checkpoint of ours (what it says of its training is no hashes)")
    return TrainingRecord(hashes[0], hashes[1], tuple(sources))


def _read(path: Path, *, only: tuple[str, ...] | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors, all or those named `only`, and the loop's values."""
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
    # torch itself takes state of any shape, and fails only at the next step.
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
    """Hash a model's weights: names and values."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
