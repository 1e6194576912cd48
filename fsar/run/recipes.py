"""Give each recipe that ships as one flat table, by its name.

The data lie in `fsar/recipes`: papers.toml is a table of methods, data sets and shots, from which
the recipes METHOD-DATASET-Nshot follow; demo.toml and lite0.toml have one recipe a method.  A
recipe style is what the published code does ("reference"), or what replaces its known faults
("fixed"):

| option | reference | fixed |
|---|---|---|
| lr_clock | reference: counts the epoch twice, so that the rate falls at double speed | single |
| decay_norms | reference: weight decay on norms whose names lack "bn", on tokens and biases | none |
| test_frames | random (centre in the Kinetics rule) | centre |
| kinetics_window | reference: the last 35 frames of a window are never used | whole |
| weight_decay | 1e-3, of a base file that the data set's own value does not reach | the data set's own |
| query_flip | on (CLIP-FSAR: on Kinetics only) | off where left and right tell classes apart |
| query_jitter | on: only queries are jittered, as the authors meant it (CLIP-FSAR: on Kinetics only) | as there |
| select_on | val; `--select-on test`, as the code does, is stamped into the result | val |

The first four belong to the style and are never mixed in a run.  The others are its defaults, which
a run may change.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from fsar.methods import METHODS, method_options
from fsar.run.flat_config import parse_toml
from shards_spec.errors import ConfigError, suggest

Table = dict[str, Any]

STYLES = ("reference", "fixed")


@cache
def shipped(file: str) -> Table:
    """Read a file of `fsar/recipes`; the table is shared, so do not change it."""
    return tomllib.loads(resources.files("fsar").joinpath("recipes", file).read_text(encoding="utf-8"))


def _pick(table: Mapping[str, Any], *names: str) -> Table:
    """Choose the value for one of `names` where a key has several.

    A key that has none for them is left out.
    """
    flat = {}
    for key, value in table.items():
        if not isinstance(value, dict):
            flat[key] = value
        elif found := [value[name] for name in (*names, "others") if name in value]:
            flat[key] = found[0]
    return flat


def _settings(method: str) -> Table:
    """Look up the training settings of a method.

    A method that papers.toml lacks has those of HyRSM++.
    """
    papers = shipped("papers.toml")
    name = papers["method"].get(method, {}).get("settings", "hyrsm++")
    return {key: value for key, value in papers["settings"][name].items() if key not in ("datasets", "shots")}


def paper_rows() -> Iterator[tuple[str, str, int]]:
    """Method, data set and number of shots of each published recipe."""
    papers = shipped("papers.toml")
    for method, own in papers["method"].items():
        settings = papers["settings"][own["settings"]]
        for dataset in settings["datasets"]:
            yield from ((method, dataset, shot) for shot in settings["shots"])


def _paper_recipe(method: str, dataset: str, shot: int) -> Table:
    papers = shipped("papers.toml")
    own = {key: value for key, value in papers["method"][method].items() if key != "settings"}
    table = {"method": method, "dataset": dataset, "shot": shot, "test_shot": shot}
    return _pick(table | papers["every"] | _settings(method) | own, dataset, f"{shot}shot")


def _recipe_name(dataset: str, method: str, shot: int) -> str:
    if (dataset, shot) == ("synthetic", 1):
        return "demo" if method == "molo" else f"demo-{method}"
    return f"{method}-{dataset}-{shot}shot"


@cache
def recipe_tables() -> dict[str, Table]:
    """Make all recipes of few-shot training that ship, by name.

    The tables are shared, so do not change them.
    """
    found = {_recipe_name(dataset, method, shot): _paper_recipe(method, dataset, shot)
             for method, dataset, shot in paper_rows()}  # fmt: skip
    demo, lite0 = shipped("demo.toml"), shipped("lite0.toml")
    for method, own in demo["method"].items():
        found[_recipe_name("synthetic", method, 1)] = {"method": method} | demo["every"] | own
    for method, own in lite0["method"].items():
        found[f"{method}-lite0"] = {"method": method} | lite0["every"] | own
    return {name: found[name] for name in sorted(found, key=lambda name: f"{name}-")}  # hyrsm++ before hyrsm


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the project."""
    return list(recipe_tables())


def list_recipes() -> str:
    """List the recipes that ship in columns: method, data set, numbers of shots.

    Then the names of all others.
    """
    rows: dict[str, list[str]] = {}
    for method, dataset, shot in sorted(paper_rows(), key=lambda row: (f"{row[0]}-", *row[1:])):
        rows.setdefault(f"{method:10} {dataset:12}", []).append(str(shot))
    others = [name for name in recipe_names() if not name.endswith("shot")]
    table = [f"{row} {' '.join(shots)}" for row, shots in rows.items()]
    return "\n".join([f"{'method':10} {'data set':12} shots", *table, f"others: {', '.join(others)}"])


def read_recipe(name: str) -> Table:
    """Read a recipe: a name that ships with the project, or a TOML file.

    Raises:
        ConfigError: there is no such recipe, or it is no flat TOML.
    """
    return read_table(name, recipe_tables(), hint=_nearest)


def read_table(name: str, known: Mapping[str, Table], *, hint: Callable[[str], str]) -> Table:
    """Read a TOML file, or one of the recipes `known`; `hint` says what an unknown name may mean.

    Raises:
        ConfigError: there is no such recipe, or it is no flat TOML.
    """
    path = Path(name)
    if path.suffix == ".toml" and path.is_file():
        return parse_toml(path.read_text(encoding="utf-8", errors="replace"), name)
    if name in known:
        return dict(known[name])
    raise ConfigError(f'no recipe "{name}"; give a .toml file, or a name: {hint(name)}')


def near_names(name: str, names: list[str]) -> str:
    """Ask whether up to three names that resemble one were meant; empty where none does."""
    near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
    return "did you mean " + " or ".join(f'"{other}"' for other in near) + "? " if near else ""


def _nearest(name: str) -> str:
    return f"{near_names(name, recipe_names())}(fsar-train --recipes lists all)"


def choose_recipe(dataset: str, method: str, shot: int) -> str:
    """Name the recipe that ships for a data set, method and number of shots.

    A method of one's own takes that of MoLo, or else of HyRSM++.

    Raises:
        ConfigError: there is no such recipe, or the method is unknown.
    """
    method_options(method)
    for other in (method,) if method in METHODS else ("molo", "hyrsm++"):
        name = _recipe_name(dataset, other, shot)
        if name in recipe_tables():
            return name
    raise ConfigError(
        f'no recipe ships for data set "{dataset}", method {method}, {shot}-shot; '
        f"choose one with --recipe and override what differs: {_nearest(_recipe_name(dataset, method, shot))}"
    )


def bound_options(style: str, frame_rule: str) -> Table:
    """Give the options that a style fixes, for a frame rule.

    Raises:
        ConfigError: there is no such style.
    """
    if style == "reference":
        test_frames = "centre" if frame_rule == "kinetics" else "random"
        return {
            "lr_clock": "reference",
            "decay_norms": "reference",
            "test_frames": test_frames,
            "kinetics_window": "reference",
        }
    if style == "fixed":
        return {"lr_clock": "single", "decay_norms": "none", "test_frames": "centre", "kinetics_window": "whole"}
    raise ConfigError(f'recipe_style = "{style}": {suggest(style, STYLES)}')


def restyle(table: Mapping[str, Any], style: str) -> Table:
    """Change a recipe to another style.

    What the style fixes, and its defaults for a published data set.
    """
    values = {"recipe_style": style} | bound_options(style, table.get("frame_rule", "segment"))
    method, dataset = str(table.get("method")), table.get("dataset")
    if dataset in {row[1] for row in paper_rows()}:
        values |= _defaults_of_style(style, method, str(dataset))
    return dict(table) | values


def _defaults_of_style(style: str, method: str, dataset: str) -> Table:
    papers = shipped("papers.toml")
    if style == "fixed":
        return _pick(papers["fixed"] | papers["fixed-own"].get(method, {}), dataset)
    both = papers["every"] | _settings(method)
    return _pick({key: both[key] for key in papers["fixed"]}, dataset)
