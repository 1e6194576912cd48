"""State each key of a configuration once: type, default, help, bounds, and who may set it.

A configuration is a dataclass whose fields are made by `key`.  The checks of its values, the
options of the commands, what a resumed run may change and what a result records all follow from
these statements.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_type_hints

from shards_spec.errors import ConfigError, suggest
from shards_spec.schema import text_fault

MOST_NUMBER = (1 << 63) - 1  # what NumPy and torch hold
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key of a configuration.

    Attributes:
        name: Its name in recipes; its option has "-" in place of "_".
        kind: int, float, bool, str, a tuple of floats, or Any.
        default: Its value where no recipe sets it; None for a key that has none.
        help: One sentence for the help of the commands.
        group: Heading under which the help lists it.
        choices: The values that it may have; empty for any.
        least: The least value.
        above: A bound that the value has to exceed.
        most: The largest value.
        free: A resumed run may differ in it, since no result depends on it, up to rounding on other
            devices.
        main: The short help lists it.
        evaluation: The option of fsar-eval that replaces it; empty for none.
        recorded: Its name in a result; empty where a result does not record it.
        own_option: The command has an option of its own for it, or only recipes set it.
    """

    name: str = ""
    kind: Any = Any
    default: Any = None
    help: str = ""
    group: str = ""
    choices: tuple[str, ...] = ()
    least: float | None = None
    above: float | None = None
    most: float | None = None
    free: bool = False
    main: bool = False
    evaluation: str = ""
    recorded: str = ""
    own_option: bool = False

    @property
    def option(self) -> str:
        """The option of a command that sets it."""
        return f"--{self.name.replace('_', '-')}"

    def check(self, value: Any) -> None:  # noqa: ANN401 -- a value of its kind
        """Refuse a value outside the choices or bounds: ConfigError."""
        if self.choices and value not in self.choices:
            raise ConfigError(f'{self.name} = "{value}": {suggest(str(value), self.choices)}')
        bounds = [
            (f"at least {self.least}", self.least is None or value >= self.least),
            (f"above {self.above}", self.above is None or value > self.above),
            (f"at most {self.most}", self.most is None or value <= self.most),
        ]
        if not all(kept for _, kept in bounds):
            stated = zip(bounds, (self.least, self.above, self.most), strict=True)
            text = " and ".join(text for (text, _), bound in stated if bound is not None)
            raise ConfigError(f"{self.name} = {value}: must be {text}")


def key(default: Any = None, text: str = "", **facts: Any) -> Any:  # noqa: ANN401 -- a field of any kind
    """Make a field of a configuration, without a default where that is None.

    `facts` are attributes of its `Key`.
    """
    metadata = {"key": Key(default=default, help=text, **facts)}
    return field(metadata=metadata) if default is None else field(default=default, metadata=metadata)


def same_key(config: type, name: str) -> Any:  # noqa: ANN401 -- a field of any kind
    """Make a field that is stated in another configuration already."""
    (stated,) = (each for each in fields(config) if each.name == name)
    return field(default=stated.default, metadata=stated.metadata)


def keys_of(config: type) -> dict[str, Key]:
    """Collect the keys of a configuration class by name."""
    kinds = get_type_hints(config)
    stated = {each.name: each.metadata["key"] for each in fields(config) if "key" in each.metadata}
    return {name: replace(one, name=name, kind=kinds[name]) for name, one in stated.items()}


def check_keys(values: Mapping[str, Any], keys: Iterable[Key]) -> None:
    """Refuse values outside the choices or bounds of their keys: ConfigError."""
    for one in keys:
        if one.name in values:
            one.check(values[one.name])


def recorded(config: object) -> dict[str, Any]:
    """Give what a result records of a configuration."""
    return {one.recorded: getattr(config, name) for name, one in keys_of(type(config)).items() if one.recorded}


def typed(name: str, value: Any, kind: Any) -> Any:  # noqa: ANN401 -- a value of any kind is what is checked
    """Return `value` as `kind`.

    Raises:
        ConfigError: it is of another kind; the sentence says what was expected.
    """
    if type(value) is int and abs(value) > MOST_NUMBER:
        raise ConfigError(f"{name} is a number of {len(str(value))} digits: expected one below {MOST_NUMBER + 1:,}")
    if kind is float and type(value) is int:
        return float(value)
    if isinstance(value, str) and (fault := text_fault(value)):
        raise ConfigError(f"{name} {fault}: expected plain text")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} = {value}: expected a finite number")
    if kind not in (int, float, bool, str, Any):  # a tuple of numbers
        if isinstance(value, list | tuple) and all(type(item) in (int, float) for item in value):
            return tuple(typed(name, item, float) for item in value)
    elif kind is Any or type(value) is kind:
        return value
    raise ConfigError(f"{name} = {value!r}: expected {KINDS.get(kind, 'a list of numbers')}")


def option_types(defaults: Mapping[str, object]) -> dict[str, Any]:
    """Give the kinds of options by their defaults; any kind where the default is None."""
    return {name: Any if value is None else type(value) for name, value in defaults.items()}
