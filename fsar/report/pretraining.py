"""`report.html` of a pre-training run: one self-contained page with curves, provenance and configuration."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from fsar.report.pretraining_pictures import PICTURES
from fsar.report.run import chart, document, html_bytes, provenance_rows, read_log, table
from shards_spec.files import write_whole

ACCURACY = "accuracy_"
TOP = re.compile(r"top(\d)_acc(.*)")  # MSCL's names of accuracies
MEANINGS = {  # of MSCL's terms
    "loss_cls": "pictures to pictures",
    "loss_cls_flow": "flow to flow",
    "loss_cls_mx": "pictures to flow",
    "loss_cls_mx_r": "flow to pictures",
    "loss_cls_flow_aug": "turned flow to turned flow",
    "loss_cls_mx_aug": "pictures to turned flow",
    "loss_cls_mx_r_aug": "turned flow to pictures",
    "loss_pos": "frame by frame, pictures to flow",
}
# What a record has besides terms of the loss and accuracies.
OTHERS = frozenset({"kind", "n", "epoch", "loss", "lr", "skipped", "samples_per_s", "data_wait", "memory_mb"})


def write_pretrain_report(run: Path, result: dict[str, Any], config: dict[str, Any]) -> Path:
    """Write the page of a finished run from its result, configuration and log.

    Raises:
        DiskError: the disk is full.
    """
    path = run / "report.html"
    pictures = [png_part(run / file, heading) for file, heading in PICTURES.items() if (run / file).exists()]
    write_whole(path, html_bytes(pretrain_page(run.name, result, config, read_log(run), pictures=pictures)))
    return path


def png_part(path: Path, heading: str) -> str:
    """A PNG file as a part of a page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f"<h2>{escape(heading)}</h2><div class=scroll>"
        f'<img style="max-width:100%" alt="{escape(heading, quote=True)}" src="data:image/png;base64,{data}"></div>'
    )


def pretrain_page(
    title: str,
    result: dict[str, Any],
    config: dict[str, Any],
    log: list[dict[str, Any]],
    *,
    pictures: Iterable[str] = (),
) -> str:
    """The whole page as text; `pictures` are parts of it."""
    heading = f"{result['method']} pre-training of {result['trunk']} on {result['training']}"
    counts = f"{result['videos']:,} videos, {result['epochs']} epochs, {result['steps']:,} steps of {result['batch']}"
    parts = [
        f"<h1>{escape(heading)}</h1>",
        f"<p class=quiet>{escape(title)} · {counts} · {result['seconds'] / 3600:.2f} h</p>",
        "<h2>Training</h2>",
        f"<div class=row>{''.join(_charts(log))}</div>",
        *pictures,
        f"<h2>Provenance</h2>{table(provenance_rows(result))}",
        f"<h2>Configuration</h2>{table((key, json.dumps(value)) for key, value in config.items())}",
    ]
    return document(heading, parts)


def _charts(log: list[dict[str, Any]]) -> Iterable[str]:
    """The loss, each of its terms, the accuracies, the rate, and where the time goes."""
    records = [record for record in log if record["kind"] == "train" and "loss" in record]
    if not records:
        return
    names = [name for name in records[-1] if name not in OTHERS]
    rights = [name for name in names if name.startswith(ACCURACY)]
    terms = [name for name in names if name not in rights]
    for name in ["loss", *(terms if len(terms) > 1 else ())]:
        yield _curve(records, name, f"{name}: {MEANINGS[name]}" if name in MEANINGS else name)
    yield from _accuracies(records, rights)
    yield _curve(records, "lr", "learning rate", low=0.0)
    yield _curve(records, "samples_per_s", "videos per second", low=0.0)
    yield _curve(records, "data_wait", "share of time waiting for data", low=0.0, high=1.0)


def _accuracies(records: list[dict[str, Any]], names: Iterable[str]) -> Iterable[str]:
    """A chart a term, top 1 and top 5 in one."""
    terms: dict[str, dict[str, str]] = {}  # term -> line of its chart -> name in the log
    for name in names:
        short = name.removeprefix(ACCURACY)
        top = TOP.fullmatch(short)
        term, line = (f"loss{'' if top[2] == '_pos' else '_cls'}{top[2]}", f"top {top[1]}") if top else (short, short)
        terms.setdefault(term, {})[line] = name
    for term, lines in terms.items():
        series = {line: [(r["epoch"], r[name]) for r in records if name in r] for line, name in lines.items()}
        yield chart(f"accuracy of {term}", series, low=0.0, high=1.0, unit="epochs")


def _curve(
    records: list[dict[str, Any]], name: str, title: str, *, low: float | None = None, high: float | None = None
) -> str:
    points = [(record["epoch"], record[name]) for record in records if name in record]
    return chart(title, {name: points}, low=low, high=high, unit="epochs")
