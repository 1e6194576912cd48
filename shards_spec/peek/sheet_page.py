"""A contact sheet as a page of HTML, its pictures inside it; it knows nothing of shards."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shards_spec.peek.html import page_templates
from shards_spec.peek.sheet import HEIGHT, Block, Legend, thumbnail

QUALITY = 85


def write_page(title: str, subtitles: Sequence[str], blocks: Sequence[Block], *, legend: Legend | None = None) -> str:
    """Write all blocks below one another, under a head of title, subtitles and legend."""
    templates = page_templates(Path(__file__).parent)
    templates.filters["thumbnail"] = _thumbnail
    template = templates.get_template("sheet.html")
    return template.render(title=title, subtitles=subtitles, blocks=blocks, legend=legend)


class _Thumbnail(NamedTuple):
    """Address of a JPEG picture; the browser enlarges one of few pixels, so that these show."""

    address: str
    enlarged: bool


def _thumbnail(picture: NDArray[np.uint8]) -> _Thumbnail:
    """Write a picture [h, w, 3] into an address; scale it to the shown height if it is large."""
    height, width = picture.shape[:2]
    few = 2 * height <= HEIGHT
    scaled = Image.fromarray(picture) if few else thumbnail(picture, max(1, round(width * HEIGHT / height)))
    buffer = io.BytesIO()
    scaled.save(buffer, format="JPEG", quality=QUALITY)
    return _Thumbnail("data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(), few)
