"""What tests of whole folders share."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from shards_spec import ShardSet, Split
from shards_spec.files import json_bytes, json_line, publish
from shards_spec.index.build import build_index
from shards_spec.index.layout import shard_path
from shards_spec.peek.peek import contact_sheet, find_rows
from shards_spec.peek.sheet import Block, Row
from shards_spec.schema import Dataset, Failure, sample_key
from shards_spec.summary import Summary, summarise, write_sidecars
from shards_spec.tar import TarSeriesWriter, file_sha256

ROOT = Path(__file__).parents[2]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def stamps(folder: Path, pattern: str) -> dict[str, tuple[int, int]]:
    """Inode and modification time of some files: equal stamps mean that nobody touched them."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob(pattern)}


def flip_bit(path: Path, bit: int) -> None:
    """Turn one bit of a file over."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ (1 << bit % 8)]))


def command_line(*args: object, module: str = "preprocess.cli", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one of our commands as a user does."""
    call = [sys.executable, "-c", f"import sys; sys.argv[0] = 'fsar'; from {module} import main; main()", *args]
    call = [arg if isinstance(arg, bytes) else str(arg) for arg in call]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(call, capture_output=True, text=True, errors="replace", check=False, env=environment)


def write_set(
    folder: Path,
    videos: Mapping[int, Sequence[bytes]],
    *,
    rows: int = 4,
    splits: Mapping[str, Split] | None = None,
    size: tuple[int, int] = (48, 64),
) -> Path:
    """A shard set of one series, `rgb`, with these payloads; rows that are absent are videos that failed."""
    folder.mkdir(parents=True, exist_ok=True)
    count = max(videos) + 1
    failed = [Failure(row, f"a/{row}", "a", None, "damaged", "") for row in range(count) if row not in videos]
    (folder / "dataset.json").write_bytes(json_bytes(Dataset("set", ("a", "b"), dict(splits or {})).to_json()))
    (folder / "failures.jsonl").write_bytes(Failure.dump_all(failed))
    for number in range(-(-count // rows)):
        held = {row: videos[row] for row in range(number * rows, (number + 1) * rows) if row in videos}
        if held:
            _write_shard(shard_path(folder, "rgb", number), held, size)
    build_index(folder)
    return folder


def _write_shard(path: Path, videos: Mapping[int, Sequence[bytes]], size: tuple[int, int]) -> None:
    infos = {}
    with TarSeriesWriter(path) as writer:
        for row, payloads in videos.items():
            n = len(payloads)
            infos[row] = {"name": f"b/{row} é.avi", "label": "b", "group": None, "frames": n, "fps": 25.0}
            infos[row] |= {"source_size": list(size), "size": list(size), "kept": list(range(n))}
            files = {f"{i:05d}.jpg": data for i, data in enumerate(payloads)}
            writer.add(sample_key(row), files | {"cls": b"1", "json": json_line(infos[row])})
    samples = summarise(writer.members, infos, path)
    summary = Summary(writer.written.stat().st_size, file_sha256(writer.written), samples)
    publish(writer.written, path)
    write_sidecars(path, summary)


def decode(payload: bytes) -> np.ndarray:
    """[h, w, 3] or [h, w] uint8 of a JPEG."""
    grey = simplejpeg.decode_jpeg_header(payload)[2] == "Gray"
    picture = simplejpeg.decode_jpeg(payload, colorspace="GRAY" if grey else "RGB", fastdct=False, fastupsample=False)
    return picture[..., 0] if grey else picture


def shown(path: Path, video: str, series: str, monkeypatch: pytest.MonkeyPatch) -> Row:
    """The row of a video's series as it is handed to the drawing."""
    drawn: list[Block] = []
    monkeypatch.setattr("shards_spec.peek.peek.draw_sheet", lambda _, __, blocks, **___: drawn.extend(blocks))
    with ShardSet.open(path) as shards:
        contact_sheet(shards, find_rows(shards, [video]), frames=12, series=[series])
    return drawn[0].rows[0]
