"""Define the commands `fsar-shards splits`: list known splits, show one, check two for leakage."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click

from shards_spec.cli.console import WITH_FAILURES, SuggestingGroup
from shards_spec.splits.published import published_lists, recognise
from shards_spec.splits.sets import Overlap, Part, SplitSet, leakage, load_split_set
from shards_spec.splits.shipped import shipped, shipped_names

HASH_DIGITS, FIRST_NAMES = 12, 3
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with whole hashes.")


@click.group(cls=SuggestingGroup)
def splits() -> None:
    """Look at split lists: published ones, your own, those of a shard set."""


@splits.command("list")
@AS_JSON
def list_known(*, as_json: bool) -> None:
    """Print the class lists that ship and the published lists that `show` recognises."""
    ships, known = [shipped(name) for name in shipped_names()], published_lists()
    if as_json:
        _print_json({"ships": [_shipped_json(s.name) for s in ships], "recognised": [vars(p) for p in known]})
        return
    click.echo("class lists that ship (train / val / test):")
    for split in ships:
        listed = load_split_set(split.name)
        click.echo(f"  {split.name:15} {_sizes(listed)}  classes sha256 {_short(listed.classes_sha256)}")
        click.echo(f"  {'':15} {split.dataset}: {split.source}")
    click.echo("published video lists that are recognised by their facts (bring the files; see splits show):")
    for entry in known:
        classes, videos = (" / ".join(f"{pair[i]:,}" for pair in entry.sizes.values()) for i in (0, 1))
        click.echo(f"  {entry.name:15} {classes} classes, {videos} videos of {' / '.join(entry.sizes)}")
        click.echo(f"  {'':15} {entry.dataset}: {entry.published}{'; ' if entry.note else ''}{entry.note}")


@splits.command()
@click.argument("source", metavar="X")
@AS_JSON
def show(source: str, *, as_json: bool) -> None:
    """Print what a split holds, its hashes, and the published list that it fits.

    X is a folder of lists, the name of a class list that ships, or a shard set. A published list is
    recognised by the facts in brackets, not by its videos one by one. Hashes do not depend on the
    form or order of a list.
    """
    listed = load_split_set(source)
    fits = recognise(listed)
    if as_json:
        exact, like = ([vars(fit) for fit in fits if bool(fit.but) == other] for other in (False, True))
        _print_json(_set_json(listed) | {"fits": exact, "like": like})
        return
    click.echo(f"{'':6} {'classes':>8} {'videos':>8}  {'videos a class':18} {'videos sha256':13} {'classes sha256':13}")
    for name, part in listed.parts.items():
        click.echo(
            f"{name:6} {_count(part.num_classes):>8} {_count(part.num_videos):>8}  {_spread(part):18} "
            f"{_short(part.videos_sha256):13} {_short(part.classes_sha256)}"
        )
    click.echo(f"{'all':6} {'':37} {_short(listed.videos_sha256):13} {_short(listed.classes_sha256)}")
    for fit in fits:
        click.echo(f"{'' if fit.but else 'fits '}{fit.sentence}")
    if not fits:
        click.echo("fits no published list that is known here (fsar-shards splits list)")


@splits.command()
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@AS_JSON
def check(first: str, second: str, *, as_json: bool) -> None:
    """Count what A trains or selects on and B tests, and the other way round.

    A and B are folders of lists, names of class lists that ship, or shard sets. Videos are compared
    by their stem, those of Kinetics by their YouTube id. Exit code 0: nothing is shared; 3:
    something is; 2: bad input.
    """
    a, b = load_split_set(first), load_split_set(second)
    overlaps = leakage(a, b)
    shared = [overlap for overlap in overlaps if overlap.names]
    if as_json:
        _print_json({"clean": not shared, "overlaps": [_overlap_json(overlap) for overlap in overlaps]})
    else:
        for overlap in overlaps:
            if overlap.names or overlap.fitted[0] != overlap.tested[0]:
                click.echo(_sentence(overlap))
        click.echo(_verdict(overlaps, shared))
    if shared:
        raise click.exceptions.Exit(WITH_FAILURES)


def _sentence(overlap: Overlap) -> str:
    sides = f"{' '.join(overlap.fitted)} -> {' '.join(overlap.tested)}: {overlap.what}"
    if overlap.names is None:
        return f"{sides} not compared: one side does not tell them"
    first = ", ".join(overlap.names[:FIRST_NAMES]) + (", ..." if len(overlap.names) > FIRST_NAMES else "")
    counted = f"{len(overlap.names):,} of {overlap.total:,} shared"
    return f"{sides} {counted} ({overlap.share:.1%}): {first}" if overlap.names else f"{sides} {counted}"


def _verdict(overlaps: Sequence[Overlap], shared: Sequence[Overlap]) -> str:
    if shared:
        return "leakage: what is trained or selected on is tested"
    skipped = sorted({overlap.what for overlap in overlaps if overlap.names is None})
    return "clean" + (f" as far as it can be compared (not everywhere: {', '.join(skipped)})" if skipped else "")


def _sizes(listed: SplitSet) -> str:
    classes = " / ".join(_count(part.num_classes) for part in listed.parts.values())
    videos = " / ".join(_count(part.num_videos) for part in listed.parts.values())
    return f"{classes} classes, {videos} videos"


def _count(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"


def _short(digest: str | None) -> str:
    return digest[:HASH_DIGITS] if digest else "-"


def _spread(part: Part) -> str:
    counts = part.counts
    return f"{counts[0]} / {counts[len(counts) // 2]} / {counts[-1]}" if counts else "-"


def _part_json(part: Part) -> dict[str, Any]:
    spread = part.counts and {
        "least": part.counts[0],
        "median": part.counts[len(part.counts) // 2],
        "most": part.counts[-1],
    }
    return {
        "classes": part.num_classes,
        "videos": part.num_videos,
        "videos_a_class": spread,
        "videos_sha256": part.videos_sha256,
        "classes_sha256": part.classes_sha256,
        "class_names": part.labels,
    }


def _set_json(listed: SplitSet) -> dict[str, Any]:
    return {
        "source": listed.name,
        "kind": listed.kind,
        "splits": {name: _part_json(part) for name, part in listed.parts.items()},
        "videos_sha256": listed.videos_sha256,
        "classes_sha256": listed.classes_sha256,
    }


def _shipped_json(name: str) -> dict[str, Any]:
    split = shipped(name)
    return _set_json(load_split_set(name)) | {"dataset": split.dataset, "published": split.source}


def _overlap_json(overlap: Overlap) -> dict[str, Any]:
    fitted, tested = (dict(zip(("source", "split"), side, strict=True)) for side in (overlap.fitted, overlap.tested))
    count = None if overlap.names is None else len(overlap.names)
    known = {"what": overlap.what, "shared": count, "of": overlap.total, "share": overlap.share, "names": overlap.names}
    return {"seen": fitted, "tested": tested} | known


def _print_json(content: dict[str, Any]) -> None:
    click.echo(json.dumps(content, indent=1))
