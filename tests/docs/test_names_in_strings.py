"""Names of our modules that stand in strings: each is a module, or something that one holds."""

from __future__ import annotations

import importlib
import importlib.util
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = ("benchmarks", "fsar", "pipelines", "preprocess", "shards_spec")
# a name within quotes, whole: "fsar.cli.train" and "fsar.methods.otam:OTAM", say
NAME = re.compile(rf"""["']((?:{"|".join(ROOMS)})(?:[.:]\w+)+)["']""")


def names_in(path: Path) -> set[str]:
    return set(NAME.findall(path.read_text(encoding="utf-8")))


def is_module(name: str) -> bool:
    """Whether there is a module of that name; it is not imported, as some are for processes of their own."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or something that one holds, however deep."""
    parts = re.split(r"[.:]", name)
    modules = [length for length in range(1, len(parts) + 1) if is_module(".".join(parts[:length]))]
    length = max(modules, default=0)
    if length == len(parts):
        return True
    found = importlib.import_module(".".join(parts[:length]))
    for part in parts[length:]:
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


def test_every_name_of_a_module_in_a_string_exists() -> None:
    paths = [path for room in (*ROOMS, "tests") for path in (ROOT / room).rglob("*.py") if path != Path(__file__)]
    names = {name for path in paths for name in names_in(path)}
    assert {"preprocess.workers.preload", "pipelines.sampling", "fsar.cli.train"} <= names
    assert sorted(name for name in names if not resolves(name)) == []


def test_commands_lead_to_functions() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert sorted(name for name in scripts.values() if not resolves(name)) == []


def test_package_data_is_there() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    missing = [f"{room}/{glob}" for room, globs in data.items() for glob in globs if not any((ROOT / room).glob(glob))]
    assert missing == []


def test_a_name_that_is_wrong_is_found() -> None:
    assert not resolves("fsar.evaluation.accuracy.no_such_function")
    assert not resolves("fsar.no_such_module")
