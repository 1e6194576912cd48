"""Names that come from others: which of them may stand for a video, a class or a group."""

from __future__ import annotations

import re

# Controls (a terminal obeys them, and lists have a name a line) and halves of characters that no encoding has;
# U+DC80 to U+DCFF stand for bytes that are no UTF-8.
UNPRINTABLE = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\ud800-\\udc7f\\udd00-\\udfff]")
CLIMBS = re.compile(r"/|(?:.*/)?\.\.(?:/|$)", re.DOTALL)  # matched from the start


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
