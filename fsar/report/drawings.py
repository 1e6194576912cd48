"""Geometry of the drawings in a page: line charts, intervals on an axis, lines of matches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fsar.matching import Pair

WIDTH, HEIGHT = 560, 180  # pixels of a chart
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 22  # pixels of its margins
COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#8250df")
MUTUAL = 0.5  # share of the stronger weight that the weaker one has in a line of both directions


class Tick(NamedTuple):
    """A horizontal line of a chart at `y` pixels and its label."""

    y: float
    label: str


class Curve(NamedTuple):
    """A line of a chart: `points` are "x,y x,y" in pixels; `single` is a line's only point.

    An SVG polyline of one point shows nothing, so that point is drawn as a circle.
    """

    name: str
    colour: str
    points: str
    single: tuple[float, float] | None


@dataclass(frozen=True)
class Chart:
    """A line chart as a template draws it, in pixels from its top left corner."""

    title: str
    end: str  # label of the right end
    ticks: list[Tick]
    curves: list[Curve]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT


def chart(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    low: float | None = None,
    high: float | None = None,
    unit: str = "episodes",
) -> Chart:
    """Lay out a line chart.

    Args:
        title: Its caption.
        series: Name of a line -> its points (x, y); x starts at 0.
        low: The lowest y; by default that of the points.
        high: The highest y; by default that of the points.
        unit: Name of what x counts.
    """
    points = [point for line in series.values() for point in line]
    x_high = max(x for x, _ in points)
    low = min(y for _, y in points) if low is None else low
    high = max(low + 1e-9, *(y for _, y in points)) if high is None else high

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * x / x_high
        down = TOP + (HEIGHT - TOP - BOTTOM) * (1 - (y - low) / (high - low))
        return round(across, 1), round(down, 1)

    values = [low + share * (high - low) for share in (0.0, 0.5, 1.0)]
    ticks = [Tick(place(0, value)[1], f"{value:.3g}") for value in values]
    curves = []
    for (name, line), colour in zip(series.items(), COLOURS, strict=False):
        places = [place(x, y) for x, y in line]
        text = " ".join(f"{x},{y}" for x, y in places)
        curves.append(Curve(name, colour, text, places[0] if len(places) == 1 else None))
    return Chart(title, f"{x_high:.0f} {unit}", ticks, curves)


@dataclass(frozen=True)
class Axis:
    """A horizontal axis of `width` pixels for shares between `low` and `high`."""

    low: float
    high: float
    width: int

    def x(self, value: float) -> str:
        """Place a value in pixels; one outside of the axis stands at its end."""
        inside = min(max(value, self.low), self.high)
        return f"{self.width * (inside - self.low) / (self.high - self.low):.1f}"

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


class MatchLine(NamedTuple):
    """A line between two rows of pictures, from picture `above` to picture `below`.

    Attributes:
        kind: `query`, `support` or `mutual`: the direction in which the match counts.
        opacity: Weight of the match as a share of the largest of its panel.
    """

    above: int
    below: int
    kind: str
    opacity: float
    pair: Pair


def match_lines(pairs: Sequence[Pair], *, query_below: bool) -> list[MatchLine]:
    """Draw matched pairs as lines; the row of the query is the lower one, or the upper one."""
    largest = max((max(pair.of_query, pair.of_support) for pair in pairs), default=1.0)
    return [_match_line(pair, largest, query_below=query_below) for pair in pairs]


def _match_line(pair: Pair, largest: float, *, query_below: bool) -> MatchLine:
    above, below = (pair.support, pair.query) if query_below else (pair.query, pair.support)
    weaker, stronger = sorted((pair.of_query, pair.of_support))
    kind = "mutual" if weaker >= MUTUAL * stronger else "query" if pair.of_query >= pair.of_support else "support"
    return MatchLine(above, below, kind, stronger / largest, pair)
