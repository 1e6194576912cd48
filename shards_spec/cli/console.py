"""Do alike in all commands: errors as one sentence, exit codes, paths, the option --shards."""

from __future__ import annotations

import functools
import io
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import click

from shards_spec.errors import ConfigError, FsarError, suggest
from shards_spec.files import is_url
from shards_spec.remote.cache import parse_bytes
from shards_spec.remote.shards import CACHE_DIR, CACHE_SIZE, RemoteShards
from shards_spec.remote.store import RemotePath, place_of

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a terminal would obey them in a name
BAD_INPUT, WITH_FAILURES, INTERRUPTED = 2, 3, 130


class SuggestingGroup(click.Group):
    """A group of commands that offers the nearest name for one that it does not have."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that the first argument names.

        Raises:
            ConfigError: there is no such command.
        """
        if self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            raise ConfigError(f'{ctx.info_name} has no "{args[0]}"; {suggest(args[0], self.commands)}')
        return super().resolve_command(ctx, args)


def run_command(
    command: click.Command,
    *,
    again: str = "type the same command again to go on",
    within: AbstractContextManager[None] | None = None,
) -> NoReturn:
    """Run a click command and leave the process with the documented exit code.

    Args:
        command: The command.
        again: Advice after Ctrl-C.
        within: A context that surrounds the command.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may be of no encoding at all
    try:
        with within or nullcontext():
            code = command.main(standalone_mode=False) or 0
        sys.exit(code)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(BAD_INPUT)
    except click.ClickException as error:
        click.echo(f"error: {error.format_message()}; see --help", err=True)
        sys.exit(BAD_INPUT)
    except FsarError as error:
        click.echo(f"error: {CONTROLS.sub('?', str(error))}", err=True)
        sys.exit(BAD_INPUT)
    except (KeyboardInterrupt, click.Abort):
        click.echo(f"interrupted; {again}", err=True)
        sys.exit(INTERRUPTED)


class Place(click.ParamType[Path, object]):
    """A path, or a URL as `RemotePath`."""

    name = "path or URL"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:  # noqa: ANN401, ARG002
        """Convert a text; leave a path that was converted before."""
        return value if isinstance(value, Path) else place_of(str(value))


class LocalFolder(click.ParamType[Path, object]):
    """A path of this machine; a URL is refused with a sentence."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:  # noqa: ANN401
        """Convert a text; leave a path that was converted before."""
        place = value if isinstance(value, Path) else place_of(str(value))
        if isinstance(place, RemotePath):
            self.fail(
                f"{place} is at a URL, and a folder of this machine is needed: copy it here, or give another",
                param,
                ctx,
            )
        return place


def shards_option(help_text: str = "Folder of the shards.", *, required: bool = True) -> Callable[..., Any]:
    """Return a decorator that adds --shards and its cache; the command gets `folder`."""

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
