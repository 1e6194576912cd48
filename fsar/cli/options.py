"""Every key of the configuration as a command-line option."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from fsar.config import CHOICES, KINDS, TYPES, method_option_types
from shards_spec.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# Keys that the commands have as options of their own, or that only recipes set.
OWN = frozenset({"dataset", "method", "recipe_style"})


def config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add one option a key of the configuration; those that are not given stay out of the overrides."""
    kinds = TYPES | method_option_types()
    for key in sorted(set(kinds) - OWN, reverse=True):
        text = f"One of {', '.join(CHOICES[key])}." if key in CHOICES else None
        option = click.option(f"--{key.replace('_', '-')}", key, default=None, metavar="VALUE", help=text)
        command = option(command)
    return command


def overrides(given: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, as values of their kinds.

    Raises:
        ConfigError: a value that is none of its kind.
    """
    kinds = TYPES | method_option_types()
    return {key: parse(key, text, kinds[key]) for key, text in given.items() if text is not None}


def parse_pairs(pairs: Iterable[str]) -> dict[str, Any]:
    """Options of a configuration from words KEY=VALUE.

    Raises:
        ConfigError: a word without "=", or a value that is none of its kind.
    """
    kinds, values = TYPES | method_option_types(), {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError(f"--option {pair}: expected KEY=VALUE")
        key = key.replace("-", "_")
        values[key] = parse(key, text, kinds.get(key, Any))
    return values


def parse(key: str, text: str, kind: Any) -> Any:  # noqa: ANN401 -- any kind of a value is what it makes
    """One value from its text.

    Raises:
        ConfigError: it is none of its kind.
    """
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind in (int, float, str):
            return kind(text)
        if kind is Any:  # an option whose default is None: a number where it reads as one
            return _number_or_text(text)
        return [float(part) for part in text.split(",")]
    except (ValueError, KeyError):
        expected = KINDS.get(kind, "numbers with commas between them")
        raise ConfigError(f"--{key.replace('_', '-')} {text}: expected {expected}") from None


def _number_or_text(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
