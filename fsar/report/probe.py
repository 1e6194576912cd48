"""`report.html` of a probe: its figures, queries with their nearest videos, activation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fsar.probing.neighbours import Retrieval
from fsar.report.html import render
from fsar.report.pictures import jpeg_uri, middle_frame, png_uri
from shards_spec import ShardSet
from shards_spec.splits.divisions import Division

QUERIES, NEIGHBOURS = 12, 5  # shown
SIDE = 264  # pixels of a frame, twice what is shown, for screens of many pixels


class Video(NamedTuple):
    """A video by its name, its class and the address of its middle frame."""

    name: str
    label: str
    frame: str


class Neighbours(NamedTuple):
    """A query and its nearest videos, the nearest first."""

    query: Video
    nearest: list[Video]


def figures(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """List a name and a text for each figure of a result, as the command prints them."""
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


def page(result: Mapping[str, Any], *, retrieval: Sequence[Neighbours] = (), activation: Path | None = None) -> str:
    """Write the whole page.

    Args:
        result: The result of the command.
        retrieval: Queries with their nearest videos.
        activation: A PNG file that shows where the trunk responds.
    """
    modes = ", ".join(result["probes"]) or "where it responds"  # the mode activation has no figures
    return render(
        "probe.html",
        heading=f"{result['weights']['trunk']} on {result['dataset']}: {modes}",
        figures=list(figures(result)),
        provenance=list(_provenance(result)),
        activation=None if activation is None else png_uri(activation),
        retrieval=retrieval,
    )


def _provenance(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key in ("weights", "overlap", "division", "clips"):
        for name, value in result[key].items():
            yield f"{key}: {name}", str(value)
    for key in ("shards_sha256", "seed", "precision", "device", "fsar", "torch"):
        yield key, str(result[key])


def retrieval_examples(shards: ShardSet, division: Division, found: Retrieval, *, seed: int = 0) -> list[Neighbours]:
    """Choose some queries at random, each with its nearest videos.

    Raises:
        ShardError: a frame cannot be read.
    """
    order = np.random.default_rng(seed).permutation(len(division.test))[:QUERIES]
    examples = []
    for n in sorted(order.tolist()):
        nearest = division.train[found.found[n, :NEIGHBOURS].numpy()]
        videos = [_video(shards, row) for row in nearest.tolist()]
        examples.append(Neighbours(_video(shards, int(division.test[n])), videos))
    return examples


def _video(shards: ShardSet, row: int) -> Video:
    label = shards.dataset.classes[int(shards.labels[row])]
    return Video(shards.name(row), label, jpeg_uri(middle_frame(shards, row), side=SIDE))
