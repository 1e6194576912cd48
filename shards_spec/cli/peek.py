"""Define the command `fsar-shards peek`: show what preprocessing made of some videos."""

from __future__ import annotations

from pathlib import Path

import click

from shards_spec.cli.console import LocalFolder
from shards_spec.errors import ConfigError
from shards_spec.files import write_whole
from shards_spec.reader import ShardSet

MOST_VIDEOS, MOST_FRAMES = 200, 32  # so that the sheet fits in memory, and in a viewer


@click.command()
@click.argument("folder", type=LocalFolder())
@click.option("--out", type=click.Path(path_type=Path), required=True, help="What to write: FILE.png or FILE.html.")
@click.option(
    "--videos",
    "count",
    type=click.IntRange(1, MOST_VIDEOS),
    default=8,
    show_default=True,
    help="How many videos to choose: one of each class before a second of any.",
)
@click.option(
    "--frames",
    type=click.IntRange(1, MOST_FRAMES),
    default=8,
    show_default=True,
    help="Frames a video, at the centres of equal segments.",
)
@click.option("--class", "classes", multiple=True, help="Choose from this class only; may be given again.")
@click.option("--split", help="Choose from this split only.")
@click.option("--video", "names", multiple=True, help="Show this video (original name); may be given again.")
@click.option("--series", help="Comma-separated, such as rgb,flow1.  [default: all]")
@click.option("--seed", type=int, default=0, show_default=True, help="Another one chooses other videos.")  # fmt: skip
def peek(
    folder: Path,
    out: Path,
    *,
    count: int,
    frames: int,
    classes: tuple[str, ...],
    split: str | None,
    names: tuple[str, ...],
    series: str | None,
    seed: int,
) -> None:
    """Draw a contact sheet of some videos: frames, frame differences and optical flow.

    Differences are grey where nothing changes. The hue of flow is its direction (the wheel is on
    the sheet), and white is no motion. The full colour stands for the speed that 99 % of the row
    keep to, but for none that moves the frame by less than a pixel. Each row names that speed and
    the largest, in pixels of the stored field.
    """
    from shards_spec.peek.html import write_html  # noqa: PLC0415 -- Jinja
    from shards_spec.peek.peek import choose_rows, choose_series, contact_page, contact_sheet, find_rows  # noqa: PLC0415 -- Pillow
    from shards_spec.peek.sheet import png_bytes  # noqa: PLC0415

    _check_target(out)
    if names and (classes or split):
        raise ConfigError("--video names the videos itself: give it, or --class and --split, not both")
    with ShardSet.open(folder) as shards:
        shown = choose_series(shards, series)
        if names:
            rows = find_rows(shards, names)
        else:
            rows = choose_rows(shards, count, seed=seed, classes=classes, split=split)
        if out.suffix == ".html":
            write_html(out, contact_page(shards, rows, frames=frames, series=shown))
        else:
            write_whole(out, png_bytes(contact_sheet(shards, rows, frames=frames, series=shown)))
        for place, row in enumerate(rows, 1):
            click.echo(f"{place:3}. {shards.name(row)}")
        click.echo(f"{out}: {len(rows)} of the videos in {folder}")


def _check_target(out: Path) -> None:
    if out.suffix not in {".png", ".html"}:
        raise ConfigError(f'--out "{out}": the sheet is a PNG picture or a page; end the name with .png or .html')
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}; make it first")
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder; name the file, such as {out / 'sheet.png'}")
