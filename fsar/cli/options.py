"""Turn the keys of a configuration into options of a command, and their texts into values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import click

from fsar.cli.help import option
from fsar.run.config import DATA, EPISODES, METHOD, SPEED, all_keys
from fsar.run.keys import KINDS, Key
from shards_spec.errors import ConfigError

METAVARS = {int: "N", float: "X", bool: "true|false", str: "TEXT"}

check_option = option(
    "--check",
    is_flag=True,
    group=DATA,
    main=False,
    help="Compare the CRC-32 of every picture with the index while it is read.",
)


def key_options(keys: Mapping[str, Key], default_of: Callable[[Key], str]) -> Callable[[Callable[..., Any]], Any]:
    """Add one option a key.

    The command gets the text of each that was given, and None for the others.

    Args:
        keys: The keys by name; those with an option of the command's own are left out.
        default_of: Says in words what a key is where its option is not given.
    """

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for key in reversed([each for each in keys.values() if not each.own_option]):
            flag = {"is_flag": False, "flag_value": "true"} if key.kind is bool else {}
            command = option(
                key.option,
                key.name,
                default=None,
                metavar=METAVARS.get(key.kind, "X,..."),
                help=_help(key, default_of(key)),
                group=key.group,
                main=key.main,
                **flag,
            )(command)
        return command

    return add


def evaluation_options(keys: Mapping[str, Key]) -> Callable[[Callable[..., Any]], Any]:
    """Add the options by which fsar-eval replaces keys of a run, under the keys' names for them."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for key in reversed([each for each in keys.values() if each.evaluation]):
            name = f"--{key.evaluation.replace('_', '-')}"
            kind: Any = click.Choice(key.choices) if key.choices else click.STRING
            if key.kind is int:
                kind = click.IntRange(None if key.least is None else int(key.least))
            command = option(
                name,
                key.evaluation,
                type=kind,
                help=f"{key.help}  [default: the run's]",
                group=key.group if key.group in (METHOD, SPEED) else EPISODES,
                main=key.main or key.evaluation != key.name,
            )(command)
        return command

    return add


def _help(key: Key, default: str) -> str:
    """Say what a key means, its choices and its default."""
    notes = ["|".join(key.choices)] if key.choices else []
    notes += [f"default: {default}"] if default else []
    return f"{key.help}  [{'; '.join(notes)}]" if notes else key.help


def default_text(key: Key, recipes: Iterable[Mapping[str, Any]]) -> str:
    """Write the default of a key: its value in all recipes, or that it depends on the recipe."""
    values = {value_text(table.get(key.name, key.default)) for table in recipes}
    values -= {value_text(None)}  # a recipe of a method that has no such option
    return values.pop() if len(values) == 1 else "by recipe" if values else ""


def value_text(value: object) -> str:
    """Write a value as its option takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value)


def overrides(command_options: Mapping[str, Any], keys: Mapping[str, Key] | None = None) -> dict[str, Any]:
    """Give the options that were set, as values of their keys; without `keys`, those of training.

    Raises:
        ConfigError: a value that is not of its kind.
    """
    keys = all_keys() if keys is None else keys
    return {name: parse(name, text, keys[name].kind) for name, text in command_options.items() if text is not None}


def parse_pairs(pairs: Iterable[str]) -> dict[str, Any]:
    """Read options of a configuration from words KEY=VALUE.

    Raises:
        ConfigError: a word without "=", or a value that is not of its kind.
    """
    keys, values = all_keys(), {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError(f"--option {pair}: expected KEY=VALUE")
        name = name.replace("-", "_")
        values[name] = parse(name, text, keys[name].kind if name in keys else Any)
    return values


def parse(name: str, text: str, kind: Any) -> Any:  # noqa: ANN401 -- any kind of a value is what it makes
    """Read one value from its text.

    Raises:
        ConfigError: it is not of its kind.
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
        raise ConfigError(f"--{name.replace('_', '-')} {text}: expected {expected}") from None


def _number_or_text(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
