"""The registry of pre-training methods, which learn from views of videos without labels."""

from __future__ import annotations

import inspect

from fsar.pretraining.base import Output, PretrainingMethod
from fsar.pretraining.fima import FIMA
from fsar.pretraining.moco import MoCo, Views
from fsar.pretraining.motion_views import MotionViews
from fsar.pretraining.mscl import MSCL, PairedViews
from shards_spec.errors import ConfigError, suggest

PRETRAINING: dict[str, type[PretrainingMethod]] = {"fima": FIMA, "moco": MoCo, "mscl": MSCL}


def find_pretraining(name: str) -> type[PretrainingMethod]:
    """Return the class of a pre-training method.

    Raises:
        ConfigError: there is no such method; it names the nearest.
    """
    if name not in PRETRAINING:
        raise ConfigError(f'there is no pre-training method "{name}"; {suggest(name, PRETRAINING)}')
    return PRETRAINING[name]


def pretraining_options(name: str) -> dict[str, object]:
    """Return the options of a pre-training method and their defaults."""
    parameters = inspect.signature(find_pretraining(name)).parameters
    return {key: parameter.default for key, parameter in parameters.items()}


def create_pretraining(name: str, **options: object) -> PretrainingMethod:
    """Make a method with random weights.

    Raises:
        ConfigError: the method or an option is unknown; it names the nearest.
    """
    known = pretraining_options(name)
    for option in options:
        if option not in known:
            raise ConfigError(f'pre-training method "{name}" has no option "{option}"; {suggest(option, known)}')
    return find_pretraining(name)(**options)


__all__ = [
    "FIMA",
    "MSCL",
    "PRETRAINING",
    "MoCo",
    "MotionViews",
    "Output",
    "PairedViews",
    "PretrainingMethod",
    "Views",
    "create_pretraining",
    "find_pretraining",
    "pretraining_options",
]
