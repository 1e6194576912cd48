"""Errors that the user can act on.

Each is one sentence: the fault, its place, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

MOST_LISTED = 20  # names that a sentence lists after the nearest one


class FsarError(Exception):
    """A fault that the user can put right; a command prints it and exits with code 2."""


class ShardError(FsarError):
    """A shard set that is missing, unfinished, damaged or another than was asked for."""


class RemoteError(FsarError):
    """A place at a URL that is missing, refuses us or does not answer."""


class GoneError(RemoteError):
    """A file at a URL that does not exist."""


class ConfigError(FsarError):
    """An option, key or name that does not exist or does not fit."""


def choice(option: str, value: str, known: Sequence[str]) -> None:
    """Raise ConfigError unless an option has one of its known values."""
    if value not in known:
        listing = " or ".join(f'"{name}"' for name in known)
        raise ConfigError(f'{option}="{value}" is not known; choose {listing}')


def suggest(word: str, known: Iterable[str]) -> str:
    """Offer the nearest known name: `did you mean "molo"? (known: ...)`.

    The list is left out where it has more than `MOST_LISTED` names.
    """
    names = sorted(known)
    near = difflib.get_close_matches(word.lower(), names, n=1, cutoff=0.5)
    listing = f"known: {', '.join(names)}"
    if near and len(names) > MOST_LISTED:
        return f'did you mean "{near[0]}"?'
    return f'did you mean "{near[0]}"? ({listing})' if near else listing
