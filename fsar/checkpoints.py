"""Weights under the names of the published reference code."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fsar.methods.base import FewShotMethod
from fsar.trunks import Trunk
from fsar.trunks.weight_files import trunk_entries
from shards_spec.errors import ConfigError

CLASSIFIER = "classification_layer."
# Tables, computed and not learned: positions, and the frame tuples of TRX; ours are made at the size asked for.
TABLES = re.compile(r"(transformers\.\d+\.)?(pe\.pe|tuples\.\d+)")
# Parts of published pre-training models that nothing reads: a second neck, and classifiers.
UNREAD = re.compile(r"recognizer\.neck_k\..+|recognizer(_flow)?\.encoder_[qk]\.fc\..+")
# The first is read by nothing at a fixed BatchNorm momentum; the second, MSCL's clock, is not in published files.
COUNTERS = (".num_batches_tracked", ".iters")


def reference_names(model: nn.Module) -> dict[str, str]:
    """Our name -> official name (without "head.") of each entry of the model's state dict.

    An entry that no published code has keeps its own name.
    """
    prefixes = reference_prefixes(model)
    return {name: official_name(name, prefixes) for name in model.state_dict()}


def reference_prefixes(model: nn.Module) -> dict[str, str]:
    """Our name prefix -> official one, of a method and its trunk."""
    if not isinstance(model, FewShotMethod):
        return {}
    trunk = {} if model.trunk is None else model.trunk.REFERENCE_NAMES
    return {f"trunk.{ours}": f"backbone.{theirs}" for ours, theirs in trunk.items()} | dict(model.REFERENCE_NAMES)


def official_name(name: str, prefixes: Mapping[str, str]) -> str:
    """The name with the one prefix that fits replaced."""
    for ours, theirs in prefixes.items():
        if f"{name}.".startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    return name


def load_reference_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], *, drop_classifier: bool = False
) -> None:
    """Load weights with official names, with or without the prefixes "module." and "head.".

    For a trunk alone, its entries are taken from a larger model's too, such as a pre-training method's `encoder_q`.
    Position tables and step counters may be absent.  `drop_classifier` leaves the auxiliary
    classifier as it is, for weights trained with another number of classes.  ConfigError names every entry
    that is missing, unexpected or of a wrong shape, and then nothing has been loaded.
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
    """The name without the prefixes of a parallel wrapper and of the outer model."""
    return name.removeprefix("module.").removeprefix("head.")


def check_entries(given: Mapping[str, object], wanted: Mapping[str, Tensor]) -> None:
    """ConfigError unless `given` has what is wanted, in the wanted shapes, and nothing else."""
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
    """Shape of a tensor as text, or the type of what is none."""
    return str(list(value.shape)) if isinstance(value, torch.Tensor) else type(value).__name__


def listing(names: Iterable[str], most: int = 8) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
