"""Code blocks of the documents, and the commands in them."""

from __future__ import annotations

import importlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.testing import CliRunner
from folders import ROOT

from shards_spec.errors import FsarError

SHELL = ("", "sh", "bash")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
VARYING = re.compile(r"efficientnet-lite0|\btiny\b|\b[0-9a-f]{12}\b|[+-]*\d[\d.,]*|\b(yes|no)(?= \()|-+:")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(page.name, text.count("\n", 0, found.start()) + 2, found[1], found[2]) for found in FENCE.finditer(text)
    ]


def lines_of(block: Block) -> Iterator[str]:
    """The lines of a shell block, those that go on after a backslash joined, without comments and empty ones."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            yield line.strip()


def words_of(line: str) -> list[str]:
    """The words of a command line, or of that which sbatch wraps; an ellipsis at its end says that more may follow."""
    words = shlex.split(line, comments=True)
    if words and words[0] == "sbatch" and "--wrap" in words[:-1]:
        words = shlex.split(words[words.index("--wrap") + 1])
    return words[:-1] if words and words[-1] == "..." else words


def find_command(words: list[str]) -> tuple[click.Command, str, list[str]] | None:
    """The command of ours that a line calls, by its script's name or by `-m MODULE`, and the words after it."""
    scripts = {name: target.split(":")[0] for name, target in PROJECT["scripts"].items()}
    if words[0] in scripts:
        return importlib.import_module(scripts[words[0]]).cli, words[0], words[1:]
    after = [word for word in words[words.index("-m") + 1 :] if word != "--"] if "-m" in words else []  # of torchrun
    module = after[0] if after else ""
    if module in scripts.values() or module.startswith("benchmarks"):
        members = vars(importlib.import_module(module)).values()
        found = [value for value in members if isinstance(value, click.Command) and value.callback]
        ours = [value for value in found if value.callback.__module__ == module]
        return (ours[0], module, words[words.index(module) + 1 :]) if ours else None
    return None


def parsed(words: list[str]) -> dict[str, Any]:
    """The values that the command's own parser takes from a line: every option exists, every value is of its type."""
    command, name, rest = find_command(words)
    context = command.make_context(name, list(rest))
    while isinstance(command, click.Group):
        given, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(given, rest, parent=context)
    return context.params


def check_setup_line(words: list[str]) -> None:
    """`pip install "fsar[x]"` names extras that exist, `make x` a target."""
    if words[:2] == ["pip", "install"]:
        for word in words[2:]:
            extras = re.fullmatch(r"(?:fsar|\.)\[([\w,-]+)\]", word)
            assert not extras or set(extras[1].split(",")) <= PROJECT["optional-dependencies"].keys(), word
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets), words


def run_command_line(words: list[str]) -> tuple[int, str]:
    """Run one of our commands in this process: its exit code, and what it printed; with stderr where it failed."""
    command, name, rest = find_command(words)
    done = CliRunner().invoke(command, rest, prog_name=name)
    if isinstance(done.exception, FsarError):
        return 2, f"{done.output}\nerror: {done.exception}"
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output if done.exit_code else done.stdout


def shape_of(line: str) -> list[str]:
    """The words of a printed line without its numbers, hashes and signs, in the order of the alphabet.

    What the line of an example has in common with that of another run, whose classes may rank otherwise.
    """
    return sorted(VARYING.sub("N", line).replace(",", "").split())
