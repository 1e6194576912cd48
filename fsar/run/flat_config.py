"""Keep a configuration as one flat table of plain values, read from TOML and saved with a run."""

from __future__ import annotations

import json
import tomllib
from dataclasses import asdict, dataclass
from typing import Any, Self

from fsar.run.keys import keys_of
from shards_spec.errors import ConfigError


@dataclass(frozen=True)
class FlatConfig:
    """Every value of a run.

    A configuration adds its fields, and `options` with the options that only the method knows.
    """

    def flat(self) -> dict[str, Any]:
        """All values in one table."""
        table = asdict(self)
        options: dict[str, Any] = table.pop("options")
        return table | options

    def to_toml(self) -> str:
        """Write the whole configuration as a recipe."""
        return "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in self.flat().items())

    def differences(self, other: Self) -> list[str]:
        """List the values that decide the result and differ from those of `other`."""
        ours, theirs = self.flat(), other.flat()
        free = {name for name, key in keys_of(type(self)).items() if key.free}
        keys = sorted((ours.keys() | theirs.keys()) - free)
        different = [key for key in keys if ours.get(key) != theirs.get(key)]
        return [f"{key} was {theirs.get(key)}, asked for {ours.get(key)}" for key in different]


def parse_toml(text: str, name: str) -> dict[str, Any]:
    """Parse the table of a recipe; ConfigError when it is no flat TOML."""
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"recipe {name} is no TOML: {error}") from error
    nested = [key for key, value in table.items() if isinstance(value, dict)]
    if nested:
        raise ConfigError(f"recipe {name} has the table [{nested[0]}]; recipes are flat")
    return table
