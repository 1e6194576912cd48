"""Pages of HTML from templates: every name is escaped, and an unknown variable is an error."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from shards_spec.files import write_whole


def page_templates(folder: Path) -> Environment:
    """Open the templates of a folder."""
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def write_html(path: Path, page: str) -> None:
    """Write a page as UTF-8; bytes of a name that are no text are shown by their numbers.

    Raises:
        DiskError: the disk is full.
    """
    write_whole(path, page.encode("utf-8", "backslashreplace"))
