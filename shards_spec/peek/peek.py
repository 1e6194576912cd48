"""Make a contact sheet of a shard set: choose videos and frames, turn motion into colour."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shards_spec.errors import ConfigError, suggest
from shards_spec.peek.sheet import Block, Legend, Row, Sheet, draw_sheet
from shards_spec.peek.sheet_page import write_page
from shards_spec.pictures import COLOURS, HUES, decode_picture, flow_field, segment_centres, series_kind
from shards_spec.reader import ShardSet
from shards_spec.schema import Failure, flow_pairs
from shards_spec.series import Series

GAIN = 4  # how many times its grey levels a difference is shown
USUAL = 99  # percentile of a row's flow that has the full colour: one wild vector would bleach all others
STILL = 1.0  # pixel of the frame: a row of flow that moves it by less is coloured as if this were its percentile
WHEEL_SIZE = 72  # pixels of the legend
MANY_SIZES = 4  # more stored sizes than that are not listed


def choose_rows(
    shards: ShardSet, count: int, *, seed: int = 0, classes: Sequence[str] = (), split: str | None = None
) -> list[int]:
    """Choose at most `count` stored videos: one of each class before a second of any.

    Args:
        shards: The shard set.
        count: Most videos.
        seed: Another seed chooses other videos.
        classes: Only videos of these classes; of all when empty.
        split: Only videos of this split.

    Raises:
        ConfigError: no such class, or nothing is left to choose from.
        ShardError: no such split.
    """
    rows = np.flatnonzero(shards.frames > 0) if split is None else shards.split_rows(split)
    if classes:
        rows = rows[np.isin(shards.labels[rows], [_class_number(shards, name) for name in classes])]
    if not len(rows):
        where = f' in the split "{split}"' if split else ""
        raise ConfigError(f"{shards.path} holds no stored video of {' or '.join(classes) or 'any class'}{where}")
    by_class: dict[int, list[int]] = {}
    for row in sorted(rows.tolist(), key=lambda row: _shuffled(seed, f"video {row}")):
        by_class.setdefault(int(shards.labels[row]), []).append(row)
    order = sorted(by_class, key=lambda label: _shuffled(seed, f"class {label}"))
    rounds = [by_class[label][turn] for turn in range(count) for label in order if turn < len(by_class[label])]
    return sorted(rounds[:count])


def find_rows(shards: ShardSet, names: Sequence[str]) -> list[int]:
    """Return the rows of the videos of these names, in the same order.

    Raises:
        ConfigError: no such video, or one that failed in preprocessing.
    """
    known = {shards.name(row): row for row in range(shards.num_videos)}
    for name in names:
        if name not in known:
            raise ConfigError(f'{shards.path} has no video "{name}"; {_nearest(name, list(known))}')
        if shards.frames[known[name]] == 0:
            raise ConfigError(f'"{name}" failed in preprocessing and is not stored: {_why(shards, known[name])}')
    return [known[name] for name in dict.fromkeys(names)]


def choose_series(shards: ShardSet, text: str | None) -> list[str]:
    """Return the names of the series to show, from a comma-separated list; None: all.

    Raises:
        ConfigError: the list is empty.
        ShardError: the set has no such series.
    """
    if text is None:
        return shards.series_names
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise ConfigError(f"--series is empty; name some of {', '.join(shards.series_names)}")
    for name in names:
        shards.series(name)
    return names


def contact_sheet(shards: ShardSet, rows: Sequence[int], *, frames: int, series: Sequence[str]) -> Image.Image:
    """Draw the sheet as a picture: a block a video, with a row of `frames` thumbnails a series.

    Raises:
        ShardError: a picture cannot be read.
    """
    title, subtitles, blocks, legend = _sheet(shards, rows, frames=frames, series=series)
    return draw_sheet(title, subtitles, blocks, legend=legend)


def contact_page(shards: ShardSet, rows: Sequence[int], *, frames: int, series: Sequence[str]) -> str:
    """Write the same as a page of HTML that refers to nothing outside itself.

    Raises:
        ShardError: a picture cannot be read.
    """
    title, subtitles, blocks, legend = _sheet(shards, rows, frames=frames, series=series)
    return write_page(title, subtitles, blocks, legend=legend)


def _sheet(shards: ShardSet, rows: Sequence[int], *, frames: int, series: Sequence[str]) -> Sheet:
    """Collect the content of the sheet."""
    return Sheet(
        title=_title(shards, len(rows)),
        subtitles=(_sizes(shards), ", ".join(series)),
        blocks=[_block(shards, row, place, frames=frames, series=series) for place, row in enumerate(rows, 1)],
        legend=flow_legend() if any(series_kind(name)[0] == "flow" for name in series) else None,
    )


def flow_colours(flow: NDArray[np.floating], limit: float) -> NDArray[np.uint8]:
    """Show flow in the colours of Baker et al. (2011): hue is direction, white is no motion.

    Args:
        flow: [h, w, 2] u to the right and v downwards, in any unit.
        limit: Length of the full colour, in that unit; longer vectors get the same colour.

    Returns:
        [h, w, 3] RGB.
    """
    u, v = flow[..., 0].astype(np.float64), flow[..., 1].astype(np.float64)  # [h, w] each
    turn = np.arctan2(v, u) / (2 * np.pi) % 1 * HUES[-1]  # [h, w] place on the wheel
    colours = np.stack([np.interp(turn, HUES, channel) for channel in zip(*COLOURS, strict=True)], axis=-1)
    length = np.minimum(np.hypot(u, v) / limit, 1)[..., None] if limit > 0 else np.zeros((*u.shape, 1))
    result: NDArray[np.uint8] = np.rint(255 - length * (255 - colours)).astype(np.uint8)  # [h, w, 3]
    return result


def amplify_difference(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Show a stored difference [h, w, 3] as 128 + `GAIN` * (next - this), clipped."""
    stronger = 128 + 2 * GAIN * (picture.astype(np.int32) - 128)  # the code is 128 + half the difference
    result: NDArray[np.uint8] = stronger.clip(0, 255).astype(np.uint8)
    return result


def flow_legend() -> Legend:
    """Draw the colour wheel: each place has the colour of motion from the centre towards it."""
    axis = (np.arange(WHEEL_SIZE) + 0.5) * 2 / WHEEL_SIZE - 1
    flow = np.stack(np.meshgrid(axis, axis), axis=-1)  # [h, w, 2]
    wheel = flow_colours(flow, 1.0)
    wheel[np.hypot(flow[..., 0], flow[..., 1]) > 1] = 255
    return Legend(
        (
            "flow: colour = direction, as on the wheel;",
            "the stronger the colour, the faster;",
            "white = no motion; px = pixels of the",
            "stored field, not of the frame",
        ),
        wheel,
    )


def _title(shards: ShardSet, shown: int) -> str:
    labels = shards.labels[shards.frames > 0]
    missing = shards.num_videos - len(labels)
    failed = f", {missing} failed" if missing else ""
    return f"{shards.dataset.name}: {shown} of {len(labels)} videos of {len(np.unique(labels))} classes{failed}"


def _sizes(shards: ShardSet) -> str:
    sizes = np.unique(shards.series("rgb").sizes[shards.frames > 0], axis=0).tolist()
    texts = [f"{height}x{width}" for height, width in sizes]
    several = len(texts) > MANY_SIZES
    return "stored height x width: " + (
        f"{texts[0]} to {texts[-1]}, {len(texts)} sizes" if several else ", ".join(texts)
    )


def _block(shards: ShardSet, row: int, place: int, *, frames: int, series: Sequence[str]) -> Block:
    rgb = shards.series("rgb")
    kept = rgb.kept(row)
    shown = kept[segment_centres(len(kept), frames)].tolist()  # source frame numbers
    height, width = rgb.sizes[row].tolist()
    facts = [
        f"class {shards.dataset.classes[shards.labels[row]]}",
        f"split {', '.join(_splits_of(shards, row)) or 'none'}",
        f"group {shards.group_name(row) or 'none'}",
        f"{shards.frames[row]} frames",
        f"{shards.fps[row]:.4g} fps",
        f"{height}x{width}",
    ]
    rows = [_row(shards.series(name), row, shown, size=(height, width)) for name in series]
    return Block(f"{place}.  {shards.name(row)}", "  |  ".join(facts), (height, width), rows)


def _row(series: Series, row: int, shown: list[int], *, size: tuple[int, int]) -> Row:
    """Make a row of the members of the frames `shown`; None where a member is missing."""
    kind, step = series_kind(series.name)
    places = {number: place for place, number in enumerate(series.kept(row).tolist())}
    grid = (flow_pairs(series.name) or (0, 1))[1]
    before = ((number - number % grid, number) for number in shown)
    shown = [start if start in places else number for start, number in before]  # the field at or before each frame
    found = [number for number in shown if number in places]
    raw = size if series.codec == "raw" else None
    payloads = series.read(row, [places[number] for number in found])
    members = [decode_picture(data, series.name, row, raw=raw) for data in payloads]
    label: tuple[str, ...] = (series.name,)
    if kind == "diff":
        members = [amplify_difference(member) for member in members]
        label = (series.name, f"change x{GAIN}", "grey: same")
    elif kind == "flow":
        scales = series.scale(row)
        fields = [flow_field(m, float(scales[places[n]])) for m, n in zip(members, found, strict=True)]
        lengths = np.concatenate([np.zeros(1), *(np.hypot(field[..., 0], field[..., 1]).ravel() for field in fields)])
        still = STILL * series.sizes[row, 0] / 2 / size[0]  # in pixels of the field; its picture is u above v
        limit = max(float(np.percentile(lengths, USUAL)), still)
        members = [flow_colours(field, limit) for field in fields]
        label = (series.name, f"max {lengths.max():.1f} px", f"full at {limit:.1f} px")
    pictures = dict(zip(found, members, strict=True))
    numbers = [f"{n} to {n + step}" if step and n in pictures else str(n) for n in shown]
    return Row(label, [pictures.get(number) for number in shown], numbers)


def _splits_of(shards: ShardSet, row: int) -> list[str]:
    label, name = shards.dataset.classes[shards.labels[row]], shards.name(row)
    return [
        split
        for split, held in shards.dataset.splits.items()
        if label in held.classes and (held.videos is None or name in held.videos)
    ]


def _class_number(shards: ShardSet, name: str) -> int:
    if name not in shards.dataset.classes:
        raise ConfigError(f'{shards.path} has no class "{name}"; {suggest(name, shards.dataset.classes)}')
    return shards.dataset.classes.index(name)


def _shuffled(seed: int, what: str) -> bytes:
    """Return a sort key for an order of chance that is the same on every machine."""
    return hashlib.sha256(f"{seed} {what}".encode()).digest()


def _nearest(name: str, known: Sequence[str]) -> str:
    """Offer the name most like `name`; a list of hundreds of thousands would not help."""
    parts = [other for other in known if name and name in other] or difflib.get_close_matches(name, known, n=1)
    return f'did you mean "{min(parts, key=len)}"?' if parts else "a name is CLASS/FILE as in the videos folder"


def _why(shards: ShardSet, row: int) -> str:
    failure = Failure.load_all(shards.files / "failures.jsonl").get(row)
    return f"{failure.reason} ({failure.detail})" if failure else "see failures.jsonl"
