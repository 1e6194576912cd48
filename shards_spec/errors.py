"""Errors that the user can act on, and checks of the names that come from others.

An error is one sentence: what, where, and what to do.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

MOST_LISTED = 20  # names that a sentence lists beside the nearest one
# Controls (a terminal obeys them, and lists have a name a line) and halves of characters that no encoding has;
# U+DC80 to U+DCFF stand for bytes that are no UTF-8.
UNPRINTABLE = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\ud800-\\udc7f\\udd00-\\udfff]")
CLIMBS = re.compile(r"/|(?:.*/)?\.\.(?:/|$)", re.DOTALL)  # matched from the start


class FsarError(Exception):
    """Something the user can put right; a command prints it as one sentence and exits with code 2."""


class ShardError(FsarError):
    """A shard set that is missing, unfinished, damaged or not what was asked for."""


class RemoteError(FsarError):
    """A place at a URL that is missing, refuses us or does not answer."""


class GoneError(RemoteError):
    """A file at a URL that does not exist."""


class ConfigError(FsarError):
    """An option, key or name that does not exist or does not fit."""


def choice(option: str, value: str, known: Sequence[str]) -> None:
    """Raise ConfigError unless the value of an option is one of those known."""
    if value not in known:
        listing = " or ".join(f'"{name}"' for name in known)
        raise ConfigError(f'{option}="{value}" is not known; choose {listing}')


def suggest(word: str, known: Iterable[str]) -> str:
    """Text that offers the nearest known name: `did you mean "molo"? (known: ...)`; many names are not listed then."""
    names = sorted(known)
    near = difflib.get_close_matches(word.lower(), names, n=1, cutoff=0.5)
    listing = f"known: {', '.join(names)}"
    if near and len(names) > MOST_LISTED:
        return f'did you mean "{near[0]}"?'
    return f'did you mean "{near[0]}"? ({listing})' if near else listing


def text_fault(text: str) -> str | None:
    """What is wrong with a name of a class or group; None where nothing is."""
    return "holds a control character" if UNPRINTABLE.search(text) else None


def path_fault(name: str) -> str | None:
    """What is wrong with a name of a video, its path below the videos folder with `/`; None where nothing is."""
    if CLIMBS.match(name):
        return "leads out of the folder"
    return "is empty" if not name else text_fault(name)


def printable(text: str) -> str:
    """A text with `?` for what `text_fault` refuses."""
    return UNPRINTABLE.sub("?", text)


def quoted(name: str) -> str:
    """A name for a message: one line of at most 80 characters, controls escaped."""
    short = name if len(name) <= 80 else f"{name[:77]}..."
    return '"' + UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), short) + '"'
