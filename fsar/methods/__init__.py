"""Few-shot methods, by name."""

from __future__ import annotations

import importlib
import inspect

from fsar.methods.base import Embedding, FewShotMethod, Output
from fsar.methods.clip_fsar import CLIPFSAR
from fsar.methods.ctx import CTX
from fsar.methods.hyrsm import HyRSM
from fsar.methods.hyrsmpp import HyRSMPlusPlus
from fsar.methods.molo import MoLo
from fsar.methods.otam import OTAM
from fsar.methods.prototype import Motion, Prototype
from fsar.methods.streams import Fusion, Model, TwoStreams, streams_of
from fsar.methods.trx import TRX
from shards_spec.errors import ConfigError, suggest

METHODS: dict[str, type[FewShotMethod]] = {
    "molo": MoLo,
    "hyrsm": HyRSM,
    "hyrsm++": HyRSMPlusPlus,
    "otam": OTAM,
    "trx": TRX,
    "ctx": CTX,
    "clip-fsar": CLIPFSAR,
    "prototype": Prototype,
    "motion": Motion,
}


def find_method(name: str) -> type[FewShotMethod]:
    """Find the class of a method.

    Args:
        name: A name of METHODS, or `module:Class` for one's own.

    Raises:
        ConfigError: there is no such method.
    """
    if ":" not in name:
        if name not in METHODS:
            raise ConfigError(f'there is no method "{name}"; {suggest(name, METHODS)}')
        return METHODS[name]
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever the user's module raises
        raise ConfigError(f'method "{name}" cannot be imported ({error}); give module:Class') from error
    if not (isinstance(found, type) and issubclass(found, FewShotMethod)):
        raise ConfigError(f'method "{name}" is not a FewShotMethod; derive it from fsar.methods.FewShotMethod')
    return found


def method_options(name: str) -> dict[str, object]:
    """List the options of a method and their defaults, `inspect.Parameter.empty` without one."""
    parameters = inspect.signature(find_method(name)).parameters
    return {key: parameter.default for key, parameter in parameters.items()}


def create_method(name: str, **options: object) -> FewShotMethod:
    """Make the model of a method, with random weights.

    Raises:
        ConfigError: an unknown method or option; it offers the nearest name.
    """
    method = find_method(name)
    known = method_options(name)
    for option in options:
        if option not in known:
            raise ConfigError(f'method "{name}" has no option "{option}"; {suggest(option, known)}')
    model: FewShotMethod = method(**options)  # type: ignore[arg-type]  # each class checks its own values
    return model


__all__ = [
    "METHODS",
    "Embedding",
    "FewShotMethod",
    "Fusion",
    "Model",
    "Output",
    "TwoStreams",
    "create_method",
    "find_method",
    "method_options",
    "streams_of",
]
