"""A reader of shards from SPEC.md alone and the standard library alone: nothing of ours is used."""

from __future__ import annotations

from pathlib import Path


def second_reader(path: Path):
    """Yield (key, {extension: bytes}) of each sample of a tar, as SPEC.md describes it."""
    with open(path, "rb") as file:  # noqa: PTH123
        sample, files = None, {}
        while (block := file.read(512)) != bytes(512):
            checksum = sum(block[:148]) + 8 * 32 + sum(block[156:])
            if len(block) < 512 or checksum != int(block[148:154], 8):
                raise ValueError(f"{path}: damaged header at byte {file.tell() - 512}")
            name = block[:100].rstrip(b"\0").decode("ascii")
            size = int(block[124:135], 8)
            data = file.read(size)
            file.read(-size % 512)
            key, _, extension = name.partition(".")
            if key != sample and sample is not None:
                yield sample, files
                files = {}
            sample = key
            files[extension] = data
        if sample is not None:
            yield sample, files
