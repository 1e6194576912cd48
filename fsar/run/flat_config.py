"""What configurations share: one flat table of plain values, from TOML files and options, saved with a run."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

from shards_spec.errors import ConfigError
from shards_spec.schema import text_fault

MOST_NUMBER = (1 << 63) - 1  # what NumPy and torch hold
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class FlatConfig:
    """Every value of a run; a configuration adds its fields, and `options` with what only the method understands."""

    FREE: ClassVar[frozenset[str]] = frozenset()  # what may differ between a run and its resumption

    def flat(self) -> dict[str, Any]:
        """All values in one table."""
        table = asdict(self)
        options: dict[str, Any] = table.pop("options")
        return table | options

    def to_toml(self) -> str:
        """The whole configuration as a recipe."""
        return "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in self.flat().items())

    def differences(self, other: Self) -> list[str]:
        """What decides the result and is not as it was in `other`."""
        ours, theirs = self.flat(), other.flat()
        keys = sorted((ours.keys() | theirs.keys()) - self.FREE)
        different = [key for key in keys if ours.get(key) != theirs.get(key)]
        return [f"{key} was {theirs.get(key)}, asked for {ours.get(key)}" for key in different]


def typed(key: str, value: Any, kind: Any) -> Any:  # noqa: ANN401 -- a value of any kind is what is checked
    """`value` as `kind`, or a ConfigError that says what was expected."""
    if type(value) is int and abs(value) > MOST_NUMBER:
        raise ConfigError(f"{key} is a number of {len(str(value))} digits: expected one below {MOST_NUMBER + 1:,}")
    if kind is float and type(value) is int:
        return float(value)
    if isinstance(value, str) and (fault := text_fault(value)):
        raise ConfigError(f"{key} {fault}: expected plain text")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key} = {value}: expected a finite number")
    if kind not in (int, float, bool, str, Any):  # a tuple of numbers
        if isinstance(value, list | tuple) and all(type(item) in (int, float) for item in value):
            return tuple(typed(key, item, float) for item in value)
    elif kind is Any or type(value) is kind:
        return value
    raise ConfigError(f"{key} = {value!r}: expected {KINDS.get(kind, 'a list of numbers')}")


def option_types(defaults: Mapping[str, object]) -> dict[str, Any]:
    """The kinds of options by their defaults; any kind where the default is None."""
    return {key: Any if value is None else type(value) for key, value in defaults.items()}


def parse_toml(text: str, name: str) -> dict[str, Any]:
    """The table of a recipe; ConfigError when it is no flat TOML."""
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"recipe {name} is no TOML: {error}") from error
    nested = [key for key, value in table.items() if isinstance(value, dict)]
    if nested:
        raise ConfigError(f"recipe {name} has the table [{nested[0]}]; recipes are flat")
    return table
