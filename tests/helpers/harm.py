"""Share what tests of harmful input use."""

from __future__ import annotations

from pathlib import Path

import pytest

from shards_spec import FsarError
from shards_spec.schema import archive_size, padded
from shards_spec.tar import header


def refusal(call, *args: object, **options: object) -> str:
    """The one sentence of our own with which something is refused."""
    with pytest.raises(FsarError) as refused:
        call(*args, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def write_tar(folder: Path, members: dict[str, bytes]) -> Path:
    """An archive `rgb-000000.tar` with these members."""
    parts = [header(name, len(data)) + data.ljust(padded(len(data)), b"\0") for name, data in members.items()]
    body = b"".join(parts)
    path = folder / "rgb-000000.tar"
    path.write_bytes(body.ljust(archive_size(len(body)), b"\0"))
    return path


class Touch:
    """A pickle that would make a file."""

    def __reduce__(self) -> tuple:
        return Path.touch, (Path("was-run"),)
