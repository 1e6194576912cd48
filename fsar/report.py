"""`report.html` of a run: one self-contained page with curves, result, per class, confusion, provenance."""

from __future__ import annotations

import json
from html import escape
from typing import TYPE_CHECKING, Any

from shards_spec.errors import FsarError
from shards_spec.files import write_whole

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

WIDTH, HEIGHT, LEFT, BOTTOM = 560, 180, 46, 22  # pixels of a chart
COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#8250df")
STYLE = """
:root{--ink:#1f2328;--quiet:#656d76;--line:#d1d9e0;--accent:#1f6feb}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);max-width:1180px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin:0}h2{font-size:1.05rem;margin:2rem 0 .5rem}
.quiet{color:var(--quiet)}.row{display:flex;flex-wrap:wrap;gap:1.5rem}
.figure{font-size:2.6rem;font-weight:650;line-height:1.1}
.card{border:1px solid var(--line);border-radius:8px;padding:.9rem 1.1rem;min-width:210px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.2rem .6rem;text-align:right;border-bottom:1px solid var(--line);font-weight:400}
th:first-child,td:first-child{text-align:left}thead th{color:var(--quiet)}
.bar{display:inline-block;height:.7rem;background:var(--accent);border-radius:2px;vertical-align:middle}
svg text{font-size:11px;fill:var(--quiet)}
.matrix td,.matrix th{text-align:center;border:1px solid #fff;min-width:2.6rem}
.matrix th{text-align:right;white-space:nowrap}
.matrix thead th{writing-mode:vertical-rl;transform:rotate(180deg);text-align:left}
.scroll{overflow-x:auto}code{word-break:break-all;font-size:13px}
"""


def write_report(run: Path, result: dict[str, Any], config: dict[str, Any]) -> Path:
    """Write the page of a finished run from its result, configuration and log.

    Raises:
        DiskError: the disk is full.
    """
    log = read_log(run)
    path = run / "report.html"
    write_whole(path, page(run.name, result, config, log).encode(errors="backslashreplace"))
    return path


def read_log(run: Path) -> list[dict[str, Any]]:
    """The records of a run's log; none where it has no log.

    Raises:
        FsarError: it is damaged.
    """
    path = run / "log.jsonl"
    try:
        records = [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []
    except (OSError, ValueError, RecursionError) as error:
        raise FsarError(f"{path} is damaged ({error}): remove the lines that are no records") from error
    return [record for record in records if isinstance(record, dict)]


def page(title: str, result: dict[str, Any], config: dict[str, Any], log: list[dict[str, Any]]) -> str:
    """The whole page as text."""
    test = result["test"]
    cards = [_card("accuracy on novel classes", test)]
    if "shuffled_frames" in result:
        cards.append(_card("the same, each clip's frames shuffled", result["shuffled_frames"]))
    if "frozen_prototypes" in result:
        cards.append(_card("the same, prototypes of the untrained trunk", result["frozen_prototypes"]))
    heading = f"{result['method']} on {result['dataset']}: {config['test_way']}-way {config['test_shot']}-shot"
    parts = [
        f"<h1>{escape(heading)}</h1>",
        f"<p class=quiet>{escape(title)} · {escape(_selection(result))}</p>",
        f"<div class=row>{''.join(cards)}</div>",
        "<h2>Training</h2>",
        f"<div class=row>{''.join(_charts(log))}</div>",
        f"<h2>Per class</h2>{_per_class(test['per_class'], test['chance'])}",
        "<h2>Confusion</h2><p class=quiet>Rows: true class; columns: what the model said; share of the row's queries.",
        _confusion(test["confusion"]),
        f"<h2>Provenance</h2>{table(provenance_rows(result))}",
        f"<h2>Configuration</h2>{table((key, json.dumps(value)) for key, value in config.items())}",
    ]
    return document(heading, parts)


def document(heading: str, parts: Iterable[str]) -> str:
    """A whole page of HTML, which refers to nothing outside itself."""
    body = "\n".join(parts)
    return (
        f'<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f"<title>{escape(heading)}</title><style>{STYLE}</style><body>{body}</body></html>\n"
    )


def _selection(result: dict[str, Any]) -> str:
    if result["selected_on"] == "last":
        return f"last checkpoint, after {result['selected_after']} episodes"
    return f"checkpoint chosen on {result['selected_on']}, after {result['selected_after']} episodes"


def _card(name: str, test: dict[str, Any]) -> str:
    return (
        f"<div class=card><div class=quiet>{escape(name)}</div><div class=figure>{test['accuracy']:.1%}</div>"
        f"<div class=quiet>chance {test['chance']:.1%}</div>"
        f"<div>{_over_episodes(test)}</div>"
        f"<div>{_over_videos(test)}</div>"
        f"<div class=quiet>{test['queries']} queries; 95 % intervals</div></div>"
    )


def _over_episodes(test: dict[str, Any]) -> str:
    if test["interval_episodes"] is None:
        return "over 1 episode: unknown"
    return f"± {test['interval_episodes']:.1%} over {test['episodes']} episodes"


def _over_videos(test: dict[str, Any]) -> str:
    if test["interval_videos"] is None:
        return f"over {test['videos']} videos: unknown, too few a class"
    return f"± {test['interval_videos']:.1%} over {test['videos']} videos (bootstrap)"


def _charts(log: list[dict[str, Any]]) -> Iterable[str]:
    training = [record for record in log if record["kind"] == "train" and "loss" in record]
    validation = [(record["n"], record["accuracy"]) for record in log if record["kind"] == "val"]
    if not training:
        return
    accuracy = {"training": [(r["n"], r["accuracy"]) for r in training]}
    accuracy |= {"validation": validation} if validation else {}
    yield chart("accuracy", accuracy, low=0.0, high=1.0)
    yield chart("loss", {"loss": [(r["n"], r["loss"]) for r in training]})
    yield chart("episodes per second", {"episodes/s": [(r["n"], r["episodes_per_s"]) for r in training]}, low=0.0)
    yield chart(
        "share of time waiting for data", {"wait": [(r["n"], r["data_wait"]) for r in training]}, low=0.0, high=1.0
    )


def chart(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    low: float | None = None,
    high: float | None = None,
    unit: str = "episodes",
) -> str:
    """One line chart as inline SVG; `unit` says what the points (x, y) count along x."""
    points = [point for line in series.values() for point in line]
    x_high = max(x for x, _ in points)
    low = min(y for _, y in points) if low is None else low
    high = max(low + 1e-9, *(y for _, y in points)) if high is None else high

    def place(x: float, y: float) -> str:
        px = LEFT + (WIDTH - LEFT - 8) * x / x_high
        py = 8 + (HEIGHT - BOTTOM - 8) * (1 - (y - low) / (high - low))
        return f"{px:.1f},{py:.1f}"

    marks = []
    for share in (0.0, 0.5, 1.0):
        value = low + share * (high - low)
        x0, y0 = place(0, value).split(",")
        marks.append(f'<line x1={x0} x2={WIDTH - 8} y1={y0} y2={y0} stroke="#d1d9e0" />')
        marks.append(f"<text x={LEFT - 6} y={float(y0) + 4:.1f} text-anchor=end>{value:.3g}</text>")
    marks.append(f"<text x={WIDTH - 8} y={HEIGHT - 6} text-anchor=end>{x_high:.0f} {unit}</text>")
    for line, colour in zip(series.values(), COLOURS, strict=False):
        path = " ".join(place(x, y) for x, y in line)
        marks.append(f'<polyline points="{path}" fill=none stroke="{colour}" stroke-width=1.6 />')
        if len(line) == 1:
            cx, cy = path.split(",")
            marks.append(f'<circle cx={cx} cy={cy} r=3 fill="{colour}" />')
    marked = zip(series, COLOURS, strict=False) if len(series) > 1 else ()
    legend = " ".join(f'<span style="color:{colour}">■</span> {escape(name)}' for name, colour in marked)
    return (
        f"<figure style=margin:0><figcaption>{escape(title)} <span class=quiet>{legend}</span></figcaption>"
        f"<svg width={WIDTH} height={HEIGHT} role=img aria-label='{escape(title)}'>{''.join(marks)}</svg></figure>"
    )


def _per_class(accuracies: dict[str, float], chance: float) -> str:
    rows = "".join(
        f"<tr><td>{escape(name)}<td>{value:.1%}<td style=text-align:left>"
        f"<span class=bar style='width:{200 * value:.0f}px'></span></tr>"
        for name, value in sorted(accuracies.items(), key=lambda item: -item[1])
    )
    return f"<table><thead><tr><th>class<th>accuracy<th>(chance {chance:.1%})</tr></thead>{rows}</table>"


def _confusion(confusion: dict[str, dict[str, int]]) -> str:
    names = sorted(set(confusion) | {said for row in confusion.values() for said in row})
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    rows = []
    for truth in names:
        row = confusion.get(truth, {})
        total = max(sum(row.values()), 1)
        cells = "".join(_cell(row.get(said, 0) / total, diagonal=said == truth) for said in names)
        rows.append(f"<tr><th>{escape(truth)}</th>{cells}</tr>")
    return f"<div class=scroll><table class=matrix><thead><tr><th></th>{head}</tr></thead>{''.join(rows)}</table></div>"


def _cell(share: float, *, diagonal: bool) -> str:
    colour = "31,111,235" if diagonal else "209,36,47"
    text = f"{share:.0%}" if share >= 0.005 else ""
    return f"<td style='background:rgba({colour},{0.85 * share:.2f})'>{text}</td>"


def provenance_rows(result: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """What a result says of where it comes from, for a table."""
    for key in ("fsar", "torch", "device", "precision", "weights_sha256", "shards_sha256"):
        yield key, str(result[key])
    for split, sha256 in result["splits_sha256"].items():
        have = result["coverage"].get(split)
        yield f"split {split}", sha256 + (f" ({have[0]:,} of {have[1]:,} videos)" if have else "")


def table(rows: Iterable[tuple[str, str]]) -> str:
    """A table of names and values."""
    cells = "".join(f"<tr><td>{escape(k)}<td style=text-align:left><code>{escape(v)}</code></tr>" for k, v in rows)
    return f"<table>{cells}</table>"
