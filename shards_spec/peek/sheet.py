"""Draw a contact sheet, from pictures and captions; it knows nothing of shards."""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

HEIGHT = 128  # of a thumbnail: stored pictures of 256, 128, 64 and 32 pixels are scaled by a whole number
GAP, MARGIN, LABELS = 4, 16, 92  # between thumbnails; around the sheet; width of what stands left of a row
NUMBER = 18  # height of the number under a thumbnail
LEAST_WIDTH = 800  # for the title
TITLE, HEADING, TEXT, SMALL = 18, 15, 13, 11  # font sizes
INK, GREY, LINE, PAPER = (25, 25, 25), (105, 105, 105), (205, 205, 205), (255, 255, 255)


@dataclass(frozen=True)
class Row:
    """A row of thumbnails.

    Attributes:
        label: Lines at its left.
        pictures: [h, w, 3] uint8 each; None for an empty place.
        numbers: Captions under them.
    """

    label: tuple[str, ...]
    pictures: Sequence[NDArray[np.uint8] | None]
    numbers: Sequence[str]


@dataclass(frozen=True)
class Block:
    """A video: its heading, a line of facts, [height, width] for its aspect, and its rows."""

    heading: str
    facts: str
    size: tuple[int, int]
    rows: Sequence[Row]


@dataclass(frozen=True)
class Legend:
    """A picture [h, w, 3] at the top right, and the lines at its left."""

    lines: tuple[str, ...]
    picture: NDArray[np.uint8]


class Sheet(NamedTuple):
    """The content of a sheet, to be drawn or written as a page."""

    title: str
    subtitles: Sequence[str]
    blocks: Sequence[Block]
    legend: Legend | None


def draw_sheet(
    title: str, subtitles: Sequence[str], blocks: Sequence[Block], *, legend: Legend | None = None
) -> Image.Image:
    """Draw all blocks below one another on white.

    Title and subtitles (two at most) stand above them, the legend at the top right.
    """
    columns = max((_thumbnail_width(block) + GAP) * _count(block) for block in blocks)
    width = max(LEAST_WIDTH, 2 * MARGIN + LABELS + columns - GAP)
    head = 64 if legend is None else max(64, legend.picture.shape[0])
    tops = np.cumsum([2 * MARGIN + head, *map(_block_height, blocks)]).tolist()
    sheet = Image.new("RGB", (width, tops[-1]), PAPER)
    draw = ImageDraw.Draw(sheet)
    space = width - 2 * MARGIN
    if legend is not None:
        space -= _draw_legend(sheet, draw, legend) + 2 * MARGIN
    _write(draw, (MARGIN, MARGIN), title, size=TITLE, width=space)
    for n, line in enumerate(subtitles):
        _write(draw, (MARGIN, MARGIN + 28 + 18 * n), line, size=TEXT, width=space, colour=GREY)
    for block, top in zip(blocks, tops, strict=False):
        _draw_block(sheet, draw, block, top)
    return sheet


def png_bytes(sheet: Image.Image) -> bytes:
    """Encode the sheet as PNG; the same sheet gives the same bytes."""
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return buffer.getvalue()


def printable(text: str) -> str:
    r"""Write a text in the letters of the built-in font (ASCII).

    Accents are dropped.  Other characters become `\u6f22`, control characters `\n`, bytes that are
    no UTF-8 `\xe9`.
    """
    return "".join(map(_plain, unicodedata.normalize("NFC", text)))


def shorten(text: str, width: float, font: Font) -> str:
    """Replace the middle of a text by dots where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    low, high = 0, len(text) - 1  # of the characters that stay
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(_cut(text, middle)) <= width else (low, middle - 1)
    return _cut(text, low)


def thumbnail(picture: NDArray[np.uint8], width: int) -> Image.Image:
    """Scale a picture [h, w, 3] to `HEIGHT` x `width`.

    Small pictures are scaled by nearest neighbour, so that their pixels show.
    """
    way = Image.Resampling.NEAREST if 2 * picture.shape[0] <= HEIGHT else Image.Resampling.LANCZOS
    return Image.fromarray(picture).resize((width, HEIGHT), way)


def _plain(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte that is no UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    letters = "".join(c for c in unicodedata.normalize("NFKD", character) if not unicodedata.combining(c))
    if letters and letters.isascii() and letters.isprintable():
        return letters
    return character.encode("unicode_escape").decode()


def _cut(text: str, keep: int) -> str:
    return text[: keep - keep // 2] + "..." + text[len(text) - keep // 2 :]


def _write(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    text: str,
    *,
    size: int,
    width: float,
    colour: tuple[int, int, int] = INK,
    centred: bool = False,
) -> None:
    """Write one line of text, at most `width` pixels wide, from its top left `corner`."""
    font = ImageFont.load_default(size)
    line = shorten(printable(text), width, font)
    x = corner[0] + max(0, (width - font.getlength(line)) / 2) if centred else corner[0]
    draw.text((x, corner[1]), line, fill=colour, font=font)


def _thumbnail_width(block: Block) -> int:
    height, width = block.size
    return max(1, round(width * HEIGHT / height))


def _count(block: Block) -> int:
    return max(len(row.pictures) for row in block.rows)


def _block_height(block: Block) -> int:
    return 48 + len(block.rows) * (HEIGHT + NUMBER) + MARGIN


def _draw_legend(sheet: Image.Image, draw: ImageDraw.ImageDraw, legend: Legend) -> int:
    """Draw the legend at the top right; return its width."""
    height, width = legend.picture.shape[:2]
    texts = max(ImageFont.load_default(SMALL).getlength(line) for line in legend.lines)
    sheet.paste(Image.fromarray(legend.picture), (sheet.width - MARGIN - width, MARGIN))
    left = sheet.width - MARGIN - width - 8 - int(texts)
    top = MARGIN + (height - 15 * len(legend.lines)) // 2
    for n, line in enumerate(legend.lines):
        _write(draw, (left, top + 15 * n), line, size=SMALL, width=texts + 1, colour=GREY)
    return int(sheet.width - MARGIN - left)


def _draw_block(sheet: Image.Image, draw: ImageDraw.ImageDraw, block: Block, top: int) -> None:
    space = sheet.width - 2 * MARGIN
    draw.line((MARGIN, top - 8, sheet.width - MARGIN, top - 8), fill=LINE)
    _write(draw, (MARGIN, top), block.heading, size=HEADING, width=space)
    _write(draw, (MARGIN, top + 22), block.facts, size=TEXT, width=space, colour=GREY)
    for n, row in enumerate(block.rows):
        _draw_row(sheet, draw, row, corner=(MARGIN, top + 48 + n * (HEIGHT + NUMBER)), width=_thumbnail_width(block))


def _draw_row(sheet: Image.Image, draw: ImageDraw.ImageDraw, row: Row, *, corner: tuple[int, int], width: int) -> None:
    left, top = corner
    for n, line in enumerate(row.label):
        size, colour = (SMALL, GREY) if n else (TEXT, INK)
        _write(draw, (left, top + 17 * n), line, size=size, width=LABELS - 6, colour=colour)
    for n, (picture, number) in enumerate(zip(row.pictures, row.numbers, strict=True)):
        x = left + LABELS + n * (width + GAP)
        if picture is not None:
            sheet.paste(thumbnail(picture, width), (x, top))
        draw.rectangle((x - 1, top - 1, x + width, top + HEIGHT), outline=LINE)
        _write(draw, (x, top + HEIGHT + 2), number, size=SMALL, width=width, colour=GREY, centred=True)
