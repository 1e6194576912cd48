"""One picture of a stored result: what is usual, ours and the bound as bars.

python -m benchmarks.chart NAME draws benchmarks/results/NAME.json as NAME.png.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from shards_spec.cli.console import run_command
from shards_spec.errors import ConfigError, suggest

Row = Mapping[str, Any]

RESULTS = Path(__file__).parent / "results"
COLOURS = {"usual": "#8c8c8c", "ours": "#1f6fb4", "bound": "#e0b354", "part": "#efdcae", "between": "#9cc3e2"}
LOG_ABOVE = 20  # times the shortest bar
LARGE = 1000  # numbers from here on are written whole
NOTE_ROOM = 0.4  # for what is written behind a bar, as a part of the longest


@dataclass(frozen=True)
class Bar:
    """One bar."""

    label: str
    side: str  # of COLOURS
    value: float
    note: str = ""


@dataclass(frozen=True)
class Panel:
    """Bars of one unit."""

    title: str
    unit: str
    bars: list[Bar]


@dataclass(frozen=True)
class Tall:
    """A bar a row, a panel for each value of `group`; `bounds` names the bound of ours, where it stands in its row."""

    value: str
    unit: str
    labels: tuple[str, ...] = ("name",)
    group: str | None = None
    ratio: str = "ratio_to_usual"
    share: str = "part_of_bound"
    bound: str | None = None

    def panels(self, rows: Sequence[Row]) -> list[Panel]:
        """In the order of the rows."""
        groups = dict.fromkeys(str(row[self.group]) if self.group else "" for row in rows)
        return [
            Panel(f"{self.group}: {group}" if self.group else "", self.unit, [bar for row in rows
                  if not self.group or str(row[self.group]) == group for bar in self._bars(row)])
            for group in groups
        ]  # fmt: skip

    def _bars(self, row: Row) -> Iterable[Bar]:
        label = _label(row, self.labels)
        ratio = row.get(self.ratio) if row["side"] != "usual" else None
        yield Bar(label, row["side"], row[self.value], _note(ratio, row.get(self.share)))
        if self.bound and row["side"] == "ours":
            yield Bar(f"bound of {label}", "bound", row[self.bound])


@dataclass(frozen=True)
class Wide:
    """Up to three bars a row, from the columns of the sides."""

    title: str
    unit: str
    labels: tuple[str, ...]
    columns: dict[str, str]  # side -> column
    lower_is_better: bool = True

    def panels(self, rows: Sequence[Row]) -> list[Panel]:
        """One."""
        unit = f"{self.unit} (less is better)" if self.lower_is_better else self.unit
        return [Panel(self.title, unit, [bar for row in rows for bar in self._bars(row)])]

    def _bars(self, row: Row) -> Iterable[Bar]:
        label = _label(row, self.labels)
        values = {side: row[column] for side, column in self.columns.items() if row.get(column) is not None}
        note = _note(*(self._times(values, other) for other in ("usual", "bound")))
        for number, (side, value) in enumerate(values.items()):
            yield Bar(f"{label}: {side}" if number == 0 else side, side, value, note if side == "ours" else "")

    def _times(self, values: Mapping[str, float], other: str) -> float | None:
        """Return how many times as fast as another side ours is."""
        if not {"ours", other} <= values.keys():
            return None
        ratio = values["ours"] / values[other]
        return 1 / ratio if self.lower_is_better else ratio


FROZEN = {"usual": "usual", "ours": "cached"}
EVALUATED = {"usual": "usual_per_second", "ours": "batched_per_second", "bound": "bound_per_second"}
# By the part of a result's name before its first "-"
CHARTS: dict[str, list[Tall | Wide]] = {
    "preprocess": [Tall("videos_per_second", "videos/s", ("side", "product"), "workers")],
    "episodes": [Tall("episodes_per_second", "episodes/s", group="output")],
    "index": [
        Wide("set opened", "s", ("videos",), {"ours": "open_s", "bound": "open_bound_s"}),
        Wide("index built", "s", ("videos",), {"ours": "build_s", "bound": "build_bound_s"}),
        Wide("episode planned", "µs", ("videos",), {"ours": "disjoint_plan_us", "bound": "disjoint_draws_us"}),
    ],
    "step": [Tall("frames_per_second", "frames/s", ratio="ratio", bound="bound_frames_per_second")],
    "methods": [Wide("", "ms", ("name",), {"usual": "reference_ms", "ours": "ours_ms", "bound": "bound_ms"})],
    "evaluate": [Wide("", "episodes/s", ("method", "shot"), EVALUATED, lower_is_better=False)],
    "pretrain": [Tall("samples_per_second", "videos/s", group="method", bound="bound_per_second")],
    "pretraining": [Tall("recall_at_1", "R@1")],
    "frozen": [Wide("", "episodes/s", ("trunk", "method"), FROZEN, lower_is_better=False)],
}


def panels_of(name: str, rows: Sequence[Row]) -> list[Panel]:
    """Choose the panels of a result; an empty list where no declaration fits it."""
    declared = CHARTS.get(name.partition("-")[0]) or _guess(rows)
    return [panel for each in declared for panel in each.panels(rows)]


def _guess(rows: Sequence[Row]) -> list[Tall | Wide]:
    """A declaration for rows with a side each and a rate, as most benchmarks have."""
    columns = list(rows[0]) if rows else []
    rates = [column for column in columns if column.endswith("_per_second")]
    if "side" not in columns or not rates:
        return []
    words = [key for key, value in rows[0].items() if isinstance(value, str) and key != "side"]
    labels = ("name",) if "name" in columns else ("side", *words)
    ratio = next((column for column in columns if column.startswith("ratio")), "ratio")
    return [Tall(rates[0], rates[0].replace("_per_second", "/s").replace("_", " "), labels, ratio=ratio)]


def _label(row: Row, keys: Sequence[str]) -> str:
    return ", ".join(f"{row[key]:,} {key}" if isinstance(row[key], int) else str(row[key]) for key in keys)


def _note(ratio: float | None, share: float | None) -> str:
    parts = [f"{ratio:.3g} x usual" if ratio < LARGE else f"{ratio:,.0f} x usual"] if ratio else []
    return ", ".join([*parts, f"{share:.0%} of bound"] if share else parts)


def is_available() -> bool:
    """Tell whether the library that draws is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(path: Path) -> Path | None:
    """Draw the result in a JSON file, next to it; None where there is nothing to draw.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    content = json.loads(path.read_text())
    panels = panels_of(path.stem, content["rows"])
    if not panels:
        return None
    if not is_available():
        raise ConfigError('charts are drawn with matplotlib, which is not installed: pip install "fsar[bench]"')
    importlib.import_module("matplotlib").use("Agg")
    plots: Any = importlib.import_module("matplotlib.pyplot")
    counts = [len(panel.bars) for panel in panels]
    figure, axes = plots.subplots(
        len(panels), squeeze=False, figsize=(11, 1.1 + 0.24 * sum(counts) + 0.7 * len(panels)),
        height_ratios=[count + 1 for count in counts], layout="constrained",
    )  # fmt: skip
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        _draw_panel(axis, panel)
    figure.suptitle(f"{path.stem}: {describe(content)}", fontsize=10)
    out = path.with_suffix(".png")
    figure.savefig(out, dpi=110)
    plots.close(figure)
    return out


def describe(content: Mapping[str, Any]) -> str:
    """The machine of a result, and its episode where it says that in words."""
    hardware, context = content["hardware"], content.get("context", {})
    machine = hardware["accelerator"] or f"{hardware['cpu']}, {hardware['cores']} cores"
    episode = context.get("episode")
    return f"{machine}; {episode}" if isinstance(episode, str) else machine


def _draw_panel(axis: Any, panel: Panel) -> None:  # noqa: ANN401 -- of a library without types
    values = [bar.value for bar in panel.bars]
    places = list(range(len(values)))
    axis.barh(places, values, color=[COLOURS.get(bar.side, COLOURS["between"]) for bar in panel.bars])
    axis.set_yticks(places, [bar.label for bar in panel.bars], fontsize=8)
    axis.set_ylim(len(values) - 0.4, -0.6)  # the first on top
    if max(values) > LOG_ABOVE * min(values) > 0:
        axis.set_xscale("log")
        low = 10 ** math.floor(math.log10(min(values)) - 0.01)
        axis.set_xlim(low, max(values) * (max(values) / low) ** NOTE_ROOM)
    else:
        axis.set_xlim(0, max(values) * (1 + NOTE_ROOM))
    for place, bar in zip(places, panel.bars, strict=True):
        text = f" {bar.value:.3g}" if bar.value < LARGE else f" {bar.value:,.0f}"
        axis.text(bar.value, place, f"{text}  {bar.note}", va="center", fontsize=8)
    axis.set_xlabel(panel.unit, fontsize=8)
    axis.set_title(panel.title, fontsize=9, loc="left")
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


@click.command()
@click.argument("names", nargs=-1, required=True)
def main(names: tuple[str, ...]) -> None:
    """Draw stored results by their NAMES, as benchmarks/results has them without .json."""
    stored = sorted(path.stem for path in RESULTS.glob("*.json"))
    for name in names:
        if name not in stored:
            raise ConfigError(f'there is no result "{name}" in {RESULTS}: {suggest(name, stored)}')
        drawn = draw(RESULTS / f"{name}.json")
        click.echo(f"written: {drawn}" if drawn else f"{name}: it has no rates to draw")


if __name__ == "__main__":
    run_command(main, again="nothing was written")
