"""`report.html` of a run or an evaluation: one page with result, curves, classes, alignments, provenance."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fsar.report.matches import Sight
from fsar.report.matches_page import SIGHT_STYLE, confused_section, episodes_section
from shards_spec.errors import FsarError
from shards_spec.files import write_whole

WIDTH, HEIGHT, LEFT, BOTTOM = 560, 180, 46, 22  # pixels of a chart
MOST_CLASSES = 40  # rows of the confusion matrix
MOST_NAMED, LONGEST_NAMED = 14, 26  # columns of it with names, and letters of a name; others have numbers
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
.matrix td{min-width:3.5rem}.matrix.many td{min-width:2.6rem;padding:.2rem 0;font-size:12px}
.name{width:max-content;max-width:18rem;white-space:normal;overflow-wrap:anywhere;line-height:1.25}
.matrix .name{margin-left:auto}
.matrix.many thead th{writing-mode:initial;transform:none;text-align:center}
.columns{columns:2 26rem}
.wide{min-width:130px;width:220px;text-align:left}.wide .bar{min-width:1px}
.scroll{overflow-x:auto}code{word-break:break-all;font-size:13px}
html{color-scheme:light;-webkit-text-size-adjust:100%}h1,h2,h3,p{overflow-wrap:anywhere}td,th{overflow-wrap:break-word}
svg{max-width:100%;height:auto}.row>*{min-width:0;max-width:100%}
.note{border-left:3px solid #bc4c00;padding:.1rem .7rem;margin:.4rem 0}
@media(max-width:600px){body{margin:1rem auto}td,th{padding:.2rem .35rem}.card{width:100%}.wide{min-width:60px}
svg text{font-size:14px}.name{max-width:8.5rem}}
@media print{body{margin:0;max-width:none;print-color-adjust:exact;-webkit-print-color-adjust:exact}
h2,h3{break-after:avoid}figure,tr,.card{break-inside:avoid}.scroll,.panel{overflow:visible}}
"""


def write_report(run: Path, result: dict[str, Any], config: dict[str, Any], *, sight: Sight | None = None) -> Path:
    """Write the page of a finished run from its result, configuration and log, with the pictures of its test.

    Raises:
        DiskError: the disk is full.
    """
    path = run / "report.html"
    write_whole(path, html_bytes(page(run.name, result, config, read_log(run), sight=sight)))
    return path


def html_bytes(text: str) -> bytes:
    """A page as UTF-8; what names hold that is no text is shown by its number."""
    return text.encode("utf-8", "backslashreplace")


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
    return [record for record in records if isinstance(record, dict) and "kind" in record]


def page(
    title: str,
    result: dict[str, Any],
    config: dict[str, Any],
    log: list[dict[str, Any]],
    *,
    sight: Sight | None = None,
) -> str:
    """The whole page as text; without a log that of an evaluation, which trained nothing."""
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
        *(f"<p class=note>{escape(note)}</p>" for note in _notes(result)),
        f"<div class=row>{''.join(cards)}</div>",
        *_training(log),
        f"<h2>Per class</h2>{_per_class(test)}",
        "<h2>Confusion</h2><p class=quiet>Rows: true class; columns: what the model said; share of the row's queries.",
        _confusion(test["confusion"]),
        *(confused_section(sight.confused) if sight else ()),
        *(episodes_section(sight) if sight else ()),
        f"<h2>Provenance</h2>{table(provenance_rows(result))}",
        f"<h2>Configuration</h2>{_columns((key, json.dumps(value)) for key, value in config.items())}",
    ]
    return document(heading, parts, style=SIGHT_STYLE)


def document(heading: str, parts: Iterable[str], *, style: str = "") -> str:
    """A whole page of HTML, which refers to nothing outside itself; `style` is added to that of all pages."""
    body = "\n".join(parts)
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        f"<title>{escape(heading)}</title><style>{STYLE}{style}</style><body>{body}</body></html>\n"
    )


def _columns(rows: Iterable[tuple[str, str]]) -> str:
    return f"<div class=columns>{table(rows)}</div>"


def _selection(result: dict[str, Any]) -> str:
    if "selected_after" not in result:
        weights = result.get("weights_file") or f"checkpoint {result.get('checkpoint', 'of the trunk alone')}"
        chosen = result.get("selected_on", "last")
        return f"split {result['split']}, {weights}" + (f" chosen on {chosen}" if chosen != "last" else "")
    if result["selected_on"] == "last":
        return f"last checkpoint, after {result['selected_after']} episodes"
    return f"checkpoint chosen on {result['selected_on']}, after {result['selected_after']} episodes"


def _notes(result: dict[str, Any]) -> Iterator[str]:
    """What a reader must know before the figure."""
    if result.get("shuffled"):
        yield "The frames of each clip were shuffled: this is a control."
    overlap = result.get("overlap") or {}
    if overlap.get("classes") or overlap.get("videos"):
        yield (
            f"Training saw {overlap['classes']} of these classes and {overlap['videos']} of these videos: "
            "this is no figure of novel classes."
        )
    if result.get("left_out"):
        yield f"Left out, having too few videos: {', '.join(result['left_out'])}."
    for split, (have, of) in result.get("coverage", {}).items():
        if have < of:
            yield f"Incomplete data set: {have:,} of {of:,} videos of split {split}."


def _training(log: list[dict[str, Any]]) -> Iterator[str]:
    if charts := "".join(_charts(log)):
        yield f"<h2>Training</h2><div class=row>{charts}</div>"


def _card(name: str, test: dict[str, Any]) -> str:
    return (
        f"<div class=card><div class=quiet>{escape(name)}</div><div class=figure>{test['accuracy']:.1%}</div>"
        f"{_scale(test)}<div class=quiet>chance {test['chance']:.1%}</div>"
        f"<div>{_over_episodes(test)}</div>"
        f"<div>{_over_videos(test)}</div>"
        f"<div class=quiet>{test['queries']} queries; 95 % intervals</div></div>"
    )


def _scale(test: dict[str, Any]) -> str:
    """The accuracy between 0 and 1 with its intervals: thick over episodes, thin over videos; chance is a tick."""
    marks = [f'<line x1={200 * test["chance"]:.1f} x2={200 * test["chance"]:.1f} y1=2 y2=18 stroke="#8c959f" />']
    for name, width in (("interval_videos", 2), ("interval_episodes", 6)):
        if (half := test[name]) is not None:
            low, high = (200 * min(max(test["accuracy"] + side, 0), 1) for side in (-half, half))
            marks.append(f'<line x1={low:.1f} x2={high:.1f} y1=10 y2=10 stroke="#1f6feb" stroke-width={width} />')
    right = 200 * test["accuracy"]
    marks.append(f'<line x1={right:.1f} x2={right:.1f} y1=3 y2=17 stroke="#1f2328" stroke-width=2 />')
    axis = '<line x1=0 x2=200 y1=10 y2=10 stroke="#d1d9e0" />'
    return f'<svg viewBox="-5 0 210 20" width=210 height=20 role=img aria-label=intervals>{axis}{"".join(marks)}</svg>'


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
        f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' width={WIDTH} height={HEIGHT} role=img"
        f" aria-label='{escape(title)}'>{''.join(marks)}</svg></figure>"
    )


def _per_class(test: dict[str, Any]) -> str:
    """Accuracy of each class, and what its queries were most often taken for."""
    rows = "".join(
        f"<tr><td>{escape(name)}<td>{value:.1%}<td class=wide><span class=bar style='width:{100 * value:.1f}%'></span>"
        f"<td style=text-align:left class=quiet>{_most_taken_for(name, test['confusion'].get(name, {}))}</tr>"
        for name, value in sorted(test["per_class"].items(), key=lambda item: -item[1])
    )
    head = f"<tr><th>class<th>accuracy<th>(chance {test['chance']:.1%})<th style=text-align:left>mostly taken for</tr>"
    return f"<div class=scroll><table><thead>{head}</thead>{rows}</table></div>"


def _most_taken_for(name: str, said: dict[str, int]) -> str:
    """The wrong class that a class was taken for most often."""
    wrong = [(count, other) for other, count in said.items() if other != name]
    if not wrong:
        return ""
    count, other = max(wrong)
    return f"{escape(other)} ({count / sum(said.values()):.0%})"


def _confusion(confusion: dict[str, dict[str, int]]) -> str:
    names = sorted(set(confusion) | {said for row in confusion.values() for said in row})
    shown = sorted(sorted(names, key=lambda name: -_wrong(name, confusion))[:MOST_CLASSES])
    many = len(shown) > MOST_NAMED or max(map(len, shown)) > LONGEST_NAMED
    head = "".join(f"<th title='{escape(name)}'>{i if many else escape(name)}" for i, name in enumerate(shown, 1))
    rows = []
    for number, truth in enumerate(shown, 1):
        row = confusion.get(truth, {})
        total = max(sum(row.values()), 1)
        cells = "".join(_cell(row.get(said, 0) / total, diagonal=said == truth) for said in shown)
        label = f"{escape(truth)} · {number}" if many else escape(truth)
        rows.append(f"<tr><th><div class=name>{label}</div></th>{cells}</tr>")
    few = f"<p class=quiet>The {MOST_CLASSES} of {len(names)} classes with the most errors." if shown != names else ""
    table = (
        f"<table class='matrix{' many' if many else ''}'><thead><tr><th></th>{head}</tr></thead>{''.join(rows)}</table>"
    )
    return f"{few}<div class=scroll>{table}</div>"


def _wrong(name: str, confusion: dict[str, dict[str, int]]) -> float:
    """Share of a class's queries that were taken for another."""
    row = confusion.get(name, {})
    return 1 - row.get(name, 0) / max(sum(row.values()), 1)


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
