"""What a container says about its own completeness: a file cut short is found even where decoders stay silent."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

UNKNOWN_RIFF_SIZES = {0, 0xFFFFFFFF}  # written by encoders that could not seek back


def missing_bytes(path: Path) -> int:
    """Bytes that the container declares beyond the end of the file; 0 where it is whole or does not say.

    AVI declares the size of its RIFF chunks, MP4 and MOV that of their boxes. Matroska, MPEG-TS and
    others declare nothing that can be relied on: for them only the decoder's own errors count.
    """
    total = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(12)
        if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
            end = _end_of_riff(file, total)
        elif head[4:8] in {b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip"}:
            end = _end_of_boxes(file, total)
        else:
            end = total
    return max(0, end - total)


def _end_of_riff(file: BinaryIO, total: int) -> int:
    """Where the last RIFF chunk (AVI, then AVIX for files over 1 GB) should end."""
    position: int = 0
    while position + 8 <= total:
        file.seek(position)
        name, size = file.read(4), int.from_bytes(file.read(4), "little")
        if name != b"RIFF" or size in UNKNOWN_RIFF_SIZES:
            break
        position += 8 + size + size % 2
        if position - size % 2 > total:
            return position - size % 2
    return min(position, total)


def _end_of_boxes(file: BinaryIO, total: int) -> int:
    """Where the last box of the top level should end."""
    position = 0
    while position + 8 <= total:
        file.seek(position)
        head = file.read(8)
        size = int.from_bytes(head[:4], "big")
        if not head[4:].isalnum():  # no box: something that was appended
            return total
        if size == 1:  # a 64-bit size follows
            large = file.read(8)
            size = int.from_bytes(large, "big") if len(large) == 8 else total
        if size < 8:  # 0: to the end of the file
            return total
        position += size
    return position
