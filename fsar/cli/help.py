"""Print a short or full help of grouped options, and answer a wrong option with the right one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from fsar.run.config import DATA
from fsar.run.names import nearest
from shards_spec.errors import ConfigError

WIDTH = 120  # most columns of the help; a narrower terminal gets its own
HELP = "Help"
# Options that `shards_spec` makes, which know no headings, and those of click
PLACED = {"folder": DATA, "cache_dir": DATA, "cache_size": DATA}
MAIN = frozenset({"folder", "help_all"})


class Option(click.Option):
    """An option under a heading of the help; the short help lists it if it is `main`."""

    def __init__(self, *names: Any, group: str, main: bool, **settings: Any) -> None:  # noqa: ANN401
        super().__init__(*names, **settings)
        self.group, self.main = group, main


def option(*names: str, group: str, main: bool = True, **settings: Any) -> Callable[..., Any]:  # noqa: ANN401
    """Add an option to a command, under a heading of its help.

    `settings` are those of `click.option`.
    """
    if isinstance(settings.get("type"), click.IntRange | click.FloatRange):
        settings.setdefault("metavar", "N" if isinstance(settings["type"], click.IntRange) else "X")
    return click.option(*names, cls=Option, group=group, main=main, **settings)


class Command(click.Command):
    """A command that answers an unknown option with the nearest by meaning or spelling."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the words of a command line.

        Raises:
            ConfigError: there is no such option; the sentence names the nearest by meaning or
                spelling.
        """
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            known = {name.lstrip("-").replace("-", "_") for each in self.params for name in each.opts}
            near = nearest(error.option_name, known)
            every = "--help-all" if "help_all" in known else "--help"
            hint = f"did you mean --{near.replace('_', '-')}?" if near else f"{every} lists those that it has"
            raise ConfigError(f"{ctx.info_name} has no option {error.option_name}; {hint}") from None


class GroupedCommand(Command):
    """A command whose --help lists its main options by group, and whose --help-all lists every one.

    Args:
        name: Its name.
        more: A sentence for the end of the short help.
        settings: As `click.Command` takes them.
    """

    def __init__(self, name: str | None, *, more: str = "", **settings: Any) -> None:  # noqa: ANN401
        context = {"help_option_names": ["-h", "--help"], "max_content_width": WIDTH}
        super().__init__(name, context_settings=context, **settings)
        self.more = f"  {more}" if more else ""
        show_all: dict[str, Any] = {"is_flag": True, "is_eager": True, "expose_value": False, "callback": _show_all}
        self.params.append(click.Option(["--help-all"], help="Show every option and exit.", **show_all))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options under their headings, in the order in which these come up."""
        every = HELP in ctx.meta
        groups: dict[str, list[tuple[str, str]]] = {}
        hidden = 0
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is None:
                continue
            if every or _is_main(param):
                groups.setdefault(_group(param), []).append(record)
            else:
                hidden += 1
        for group in (*(name for name in groups if name != HELP), HELP):
            with formatter.section(group):
                formatter.write_dl(groups[group], col_max=30)
        if hidden:
            with formatter.section("More"):
                formatter.write_text(f"{ctx.command_path} --help-all lists {hidden} more options.{self.more}")


def _group(param: click.Parameter) -> str:
    return param.group if isinstance(param, Option) else PLACED.get(str(param.name), HELP)


def _is_main(param: click.Parameter) -> bool:
    return param.main if isinstance(param, Option) else param.name in MAIN or "--help" in param.opts


def _show_all(ctx: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted:
        ctx.meta[HELP] = True
        click.echo(ctx.get_help())
        ctx.exit()
