"""What every command does alike: our errors become one sentence and exit code 2, Ctrl-C exit code 130."""

from __future__ import annotations

import io
import re
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import NoReturn

import click

from shards_spec.errors import ConfigError, FsarError, suggest

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a terminal would obey those in a name
BAD_INPUT, WITH_FAILURES, INTERRUPTED = 2, 3, 130


class SuggestingGroup(click.Group):
    """A group of commands that offers the nearest name for one that it does not have."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that the first argument names.

        Raises:
            ConfigError: there is none.
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
    """Run a click command, `within` what surrounds it, and leave the process with the documented exit code."""
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
