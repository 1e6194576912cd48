"""A contact sheet as a page of HTML, its pictures inside it; it knows nothing of shards."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shards_spec.peek.sheet import HEIGHT, Block, Legend, Row, thumbnail

QUALITY = 85
STYLE = """
:root{--quiet:#57606a;--line:#d1d9e0}html{color-scheme:light;-webkit-text-size-adjust:100%}*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;color:#1f2328;max-width:1280px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.4rem;margin:0}h2{font-size:1rem;margin:0}p{margin:.2rem 0}h1,h2,p{overflow-wrap:anywhere}
.quiet{color:var(--quiet);font-size:13px}header,.legend{display:flex;gap:1rem;align-items:center;flex-wrap:wrap}
header{justify-content:space-between}section{border-top:1px solid var(--line);margin-top:1rem;padding-top:.6rem}
.row{display:grid;grid-template-columns:7rem minmax(0,1fr);gap:.5rem;margin:.4rem 0;break-inside:avoid}
.strip{display:flex;gap:4px;overflow-x:auto}figure{margin:0;flex:none;text-align:center}
figure img,.none{display:block;height:128px;border:1px solid var(--line)}.pixels{image-rendering:pixelated}
figcaption{font-size:12px;color:var(--quiet)}
@media(max-width:600px){body{margin:1rem auto}.row{grid-template-columns:1fr;gap:0}
.row br{display:none}.row .quiet{margin-left:.6rem}figure img,.none{height:96px}}
@media print{body{max-width:none;margin:0;print-color-adjust:exact}.strip{flex-wrap:wrap}}
"""


def write_page(title: str, subtitles: Sequence[str], blocks: Sequence[Block], *, legend: Legend | None = None) -> str:
    """All blocks below one another; above them title and subtitles, beside these the legend."""
    lines = "".join(f"<p class=quiet>{escape(line)}</p>" for line in subtitles)
    head = f"<header><div><h1>{escape(title)}</h1>{lines}</div>{_legend(legend) if legend else ''}</header>"
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
        f"<body>{head}{''.join(map(_block, blocks))}</body></html>\n"
    )


def _legend(legend: Legend) -> str:
    text = "<br>".join(map(escape, legend.lines))
    return f"<div class=legend><p class=quiet>{text}</p>{_image(legend.picture, 'colours of directions')}</div>"


def _block(block: Block) -> str:
    rows = "".join(_row(row, block.size) for row in block.rows)
    return f"<section><h2>{escape(block.heading)}</h2><p class=quiet>{escape(block.facts)}</p>{rows}</section>"


def _row(row: Row, size: tuple[int, int]) -> str:
    name, *more = map(escape, row.label)
    label = f"<p>{name}" + "".join(f"<br><span class=quiet>{line}</span>" for line in more)
    pairs = zip(row.pictures, row.numbers, strict=True)
    figures = "".join(_figure(picture, number, f"{row.label[0]} {number}", size) for picture, number in pairs)
    return f"<div class=row>{label}</p><div class=strip>{figures}</div></div>"


def _figure(picture: NDArray[np.uint8] | None, number: str, alt: str, size: tuple[int, int]) -> str:
    height, width = size
    shape = f"aspect-ratio:{width}/{height}"
    shown = f"<div class=none style={shape}></div>" if picture is None else _image(picture, alt, style=shape)
    return f"<figure>{shown}<figcaption>{escape(number)}</figcaption></figure>"


def _image(picture: NDArray[np.uint8], alt: str, *, style: str = "") -> str:
    """A picture [h, w, 3]; one of few pixels is left as it is, so that they show, others are made as high as shown."""
    height, width = picture.shape[:2]
    few = 2 * height <= HEIGHT
    scaled = Image.fromarray(picture) if few else thumbnail(picture, max(1, round(width * HEIGHT / height)))
    buffer = io.BytesIO()
    scaled.save(buffer, format="JPEG", quality=QUALITY)
    data = base64.b64encode(buffer.getvalue()).decode()
    kind = " class=pixels" if few else ""
    return f'<img{kind} style="{style}" alt="{escape(alt)}" src="data:image/jpeg;base64,{data}">'
