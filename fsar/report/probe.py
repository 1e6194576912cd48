"""`report.html` of a probe: its figures, and a picture of retrieval with each query's nearest videos."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fsar.probing.neighbours import Retrieval
from fsar.report.pictures import data_uri, middle_frame
from fsar.report.run import document, table
from shards_spec import ShardSet
from shards_spec.splits.divisions import Division

OWN_STYLE = """
.found{display:flex;gap:.6rem;margin:.5rem 0}.found figure{margin:0;width:132px}
.found img{width:132px;height:100px;object-fit:cover;border:4px solid #8c959f;border-radius:6px}
.found .right img{border-color:#1a7f37}.found .wrong img{border-color:#d1242f}
.found figcaption{font-size:12px;overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
"""
QUERIES, NEIGHBOURS = 12, 5  # of the picture
SIDE = 264  # pixels of a frame in it, twice what is shown, for screens of many pixels
MARKS = {"query": "query: ", "right": "\u2713 ", "wrong": "\u2717 "}  # before the class, for those who see no colour


def figures(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """A name and a text for each figure of a result, as the command prints them."""
    who = "untrained" if result["weights"]["source"] == "random" else "weights"
    yield from _figures(result["probes"], who)
    if "untrained" in result:
        yield from _figures(result["untrained"], "untrained")
    for name, share in result.get("difference", {}).items():
        half = share["interval_groups"]
        text = "unknown" if half is None else f"+-{100 * half:.1f}"
        yield f"{name}, weights less untrained", f"{100 * share['value']:+.1f} points, paired 95 % interval {text}"


def _figures(probes: Mapping[str, Any], who: str) -> Iterator[tuple[str, str]]:
    for mode, found in probes.items():
        if mode == "retrieval":
            for at, share in found["recall"].items():
                yield f"{mode} {at}, {who}", _share(share, found["chance"][at])
            continue
        yield f"{mode}, {who}", _share(found["accuracy"], found["chance"])
        short = found["videos"] - found["without_short"]["videos"]
        if short and found["without_short"]["accuracy"] is not None:
            count = found["without_short"]["videos"]
            text = f"{found['without_short']['accuracy']:.1%} of {count} ({short} videos shorter than a clip left out)"
            yield f"{mode}, as published code counts, {who}", text
        if "chosen_on_test" in found:
            best = found["chosen_on_test"]
            yield f"{mode}, epoch {best['epoch']} chosen on the test videos, {who}", f"{best['accuracy']:.1%}"


def _share(share: Mapping[str, Any], chance: float) -> str:
    low, high = share["interval_wilson"]
    groups = share["interval_groups"]
    text = "" if groups is None else f"; +-{groups:.1%} over groups of videos"
    return f"{share['value']:.1%} (chance {chance:.1%}); 95 % intervals: {low:.1%} to {high:.1%} (Wilson){text}"


def page(result: Mapping[str, Any], picture: str) -> str:
    """The whole page as text."""
    what = ", ".join(result["probes"]) or "where it responds"  # a picture alone
    heading = f"{result['weights']['trunk']} on {result['dataset']}: {what}"
    parts = [
        f"<h1>{escape(heading)}</h1>",
        table(figures(result)),
        f"<h2>Provenance</h2>{table(_provenance(result))}",
        picture,
    ]
    return document(heading, parts, style=OWN_STYLE)


def _provenance(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key in ("weights", "overlap", "division", "clips"):
        for name, value in result[key].items():
            yield f"{key}: {name}", str(value)
    for key in ("shards_sha256", "seed", "precision", "device", "fsar", "torch"):
        yield key, str(result[key])


def retrieval_picture(shards: ShardSet, division: Division, found: Retrieval, *, seed: int = 0) -> str:
    """Some queries drawn by chance, each with its nearest videos: a green frame has the query's class, a red one not.

    Raises:
        ShardError: a frame cannot be read.
    """
    order = np.random.default_rng(seed).permutation(len(division.test))[:QUERIES]
    rows = [
        _row(shards, int(division.test[n]), division.train[found.found[int(n), :NEIGHBOURS].numpy()])
        for n in sorted(order.tolist())
    ]
    text = "the query, and its nearest videos of the gallery: green has its class, red has not"
    return f"<h2>Retrieval</h2><p class=quiet>{text}</p>{''.join(rows)}"


def _row(shards: ShardSet, query: int, near: NDArray[np.int64]) -> str:
    own = shards.labels[query]
    marks = ["right" if shards.labels[row] == own else "wrong" for row in near.tolist()]
    shown = [_video(shards, row, mark) for row, mark in zip(near.tolist(), marks, strict=True)]
    return f"<div class=found>{_video(shards, query, 'query')}{''.join(shown)}</div>"


def _video(shards: ShardSet, row: int, mark: str) -> str:
    name, label = shards.name(row), shards.dataset.classes[int(shards.labels[row])]
    frame = data_uri(middle_frame(shards, row), side=SIDE)
    caption = MARKS[mark] + label
    return (
        f'<figure class={mark} title="{escape(name.encode("utf-8", "replace").decode(), quote=True)}">'
        f'<img alt="{escape(caption, quote=True)}, {mark}" src="{frame}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
