"""Read what a container declares of its own size, to find files that were cut short."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

UNKNOWN_RIFF_SIZES = {0, 0xFFFFFFFF}  # written by encoders that could not seek back


def missing_bytes(path: Path) -> int:
    """Return the bytes that the container declares beyond the end of the file.

    So a file that was cut short is found where decoders stay silent. AVI declares the size of its
    RIFF chunks, MP4 and MOV that of their boxes. Other containers, such as Matroska and MPEG-TS,
    declare no reliable size: it is 0 for them, and only errors of the decoder count.
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
    """Return the byte at which the last RIFF chunk should end: AVI; AVIX in files over 1 GB."""
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
    """Return the byte at which the last box of the top level should end."""
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
