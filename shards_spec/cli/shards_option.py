"""The option --shards of the commands: a folder, or a URL with a cache beside it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from shards_spec.errors import ConfigError
from shards_spec.remote.cache import parse_bytes
from shards_spec.remote.shards import CACHE_DIR, CACHE_SIZE, RemoteShards
from shards_spec.remote.store import RemotePath, is_url, place_of


class Place(click.ParamType[Path, object]):
    """A path, or a URL as `RemotePath`."""

    name = "path or URL"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:  # noqa: ANN401, ARG002
        """Of a text, or of what was made of it before."""
        return value if isinstance(value, Path) else place_of(str(value))


class LocalFolder(click.ParamType[Path, object]):
    """A path of this machine; a URL is refused with a sentence."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:  # noqa: ANN401
        """Of a text, or of what was made of it before."""
        place = value if isinstance(value, Path) else place_of(str(value))
        if isinstance(place, RemotePath):
            self.fail(
                f"{place} is at a URL, and a folder of this machine is needed: copy it here, or give another",
                param,
                ctx,
            )
        return place


def shards_option(help_text: str = "Folder of the shards.", *, required: bool = True) -> Callable[..., Any]:
    """A decorator that adds --shards, --cache-dir and --cache-size; the command gets `folder`."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def call(
            *args: Any,  # noqa: ANN401
            folder: str | None,
            cache_dir: Path | None,
            cache_size: str | None,
            **options: Any,  # noqa: ANN401
        ) -> Any:  # noqa: ANN401
            return command(*args, folder=_place(folder, cache_dir, cache_size), **options)

        for option in reversed([
            click.option("--shards", "folder", metavar="DIR|URL", required=required,
                         help=f"{help_text} At a URL such as s3://bucket/shards they are read through a cache."),
            click.option("--cache-dir", type=click.Path(path_type=Path),
                         help=f"Of shards at a URL: folder of the cache.  [default: {CACHE_DIR}]"),
            click.option("--cache-size", help=f"Of shards at a URL: most bytes of the cache.  [default: {CACHE_SIZE}]"),
        ]):  # fmt: skip
            call = option(call)
        return call

    return decorate


def _place(folder: str | None, cache: Path | None, size: str | None) -> Path | RemoteShards | None:
    if folder is not None and is_url(folder) and not folder.startswith("file://"):
        place = RemoteShards(folder, cache or CACHE_DIR)
        return replace(place, cache_bytes=parse_bytes(size)) if size else place
    if cache or size:
        raise ConfigError("--cache-dir and --cache-size are of shards at a URL, such as s3://bucket/shards")
    return None if folder is None else place_of(folder)
