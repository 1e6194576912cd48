"""The format: written, indexed, opened, read, refused, verified, indexed again."""

from __future__ import annotations

import json
import random
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from folders import command_line, digests, flip_bit, write_set
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shards_spec import ShardError, ShardSet, Split
from shards_spec.cli.shards import cli
from shards_spec.errors import FsarError
from shards_spec.files import only_writer
from shards_spec.schema import row_of_key, sample_key
from shards_spec.summary import from_tar
from shards_spec.tar import MODE, OWNER, TarSeriesWriter, header
from shards_spec.verify import verify


@pytest.fixture
def copy(tiny_path: Path, tmp_path: Path) -> Path:
    """Copy the tiny shard set, so that a test may damage it."""
    return Path(shutil.copytree(tiny_path, tmp_path / "copy"))


def refusal(path: Path) -> str:
    """Return the sentence with which a set is refused."""
    with pytest.raises(ShardError) as refused, ShardSet.open(path, series=("rgb", "flow1")):
        pass
    message = str(refused.value)
    assert "\n" not in message
    return message


payloads = st.lists(st.binary(min_size=0, max_size=1300), min_size=1, max_size=4)
video_sets = st.dictionaries(st.integers(0, 14), payloads, min_size=1, max_size=6)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(videos=video_sets, rows=st.integers(1, 5))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, videos: dict, rows: int) -> None:
    folder = write_set(tmp_path_factory.mktemp("set"), videos, rows=rows)
    assert verify(folder) == []
    with ShardSet.open(folder) as shards:
        rgb = shards.series("rgb")
        assert shards.num_videos == max(videos) + 1
        for row in range(shards.num_videos):
            assert shards.frames[row] == len(videos.get(row, []))
            assert rgb.kept(row).tolist() == list(range(len(videos.get(row, []))))
        for row, stored in videos.items():
            assert shards.name(row) == f"b/{row} é.avi"
            assert rgb.read(row, range(len(stored))) == stored


def test_equal_samples_are_equal_bytes(tmp_path: Path) -> None:
    videos = {0: [b"x" * 700, b""], 2: [b"y"]}
    assert digests(write_set(tmp_path / "one", videos)) == digests(write_set(tmp_path / "two", videos))


@given(
    name=st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=100),
    size=st.integers(0, 8**11 - 1),
)
def test_headers_are_those_of_tarfile(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime, info.uname, info.gname = size, MODE, 0, OWNER, OWNER
    assert header(name, size) == info.tobuf(tarfile.USTAR_FORMAT)


@pytest.mark.parametrize(("name", "size"), [("", 1), ("x" * 101, 1), ("é", 1), ("x", 8**11)])
def test_headers_that_ustar_cannot_hold_plainly(name: str, size: int) -> None:
    with pytest.raises(ValueError, match=r"ordinal not in range|no plain ustar header"):
        header(name, size)


@given(row=st.integers(0, 99_999_999))
def test_keys(row: int) -> None:
    assert row_of_key(sample_key(row)) == row


@pytest.mark.parametrize("key", ["", "c1", "c0000000x", "d00000001", "c000000001", "c" + 7 * chr(0x660) + "1"])
def test_other_keys_are_refused(key: str) -> None:
    with pytest.raises(ShardError, match="no sample key"):
        row_of_key(key)


def test_reading_in_threads(tiny_shards: ShardSet) -> None:
    rgb = tiny_shards.series("rgb")
    rows = [row for row in range(tiny_shards.num_videos) for _ in range(6)]
    expected = {row: rgb.read(row, [0, 3, 2]) for row in set(rows)}
    with ThreadPoolExecutor(8) as pool:
        for row, read in zip(rows, pool.map(lambda row: rgb.read(row, [0, 3, 2]), rows), strict=True):
            assert read == expected[row]


def test_what_cannot_be_read_is_refused(tiny_shards: ShardSet) -> None:
    with pytest.raises(ShardError, match="has 12 rgb members, not 12"):
        tiny_shards.series("rgb").read(0, [12])
    with pytest.raises(ShardError, match="no flow series"):
        tiny_shards.series("rgb").scale(0)
    with pytest.raises(ShardError, match='did you mean "train"'):
        tiny_shards.split_rows("trian")
    with pytest.raises(ShardError, match=r'did you mean "flow1".*--motion flow'):
        tiny_shards.series("flow2")


def test_failed_videos_are_gaps(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", {1: [b"one"], 6: [b"six"]}, splits={"train": Split(("b",))})
    with ShardSet.open(folder) as shards:
        assert shards.split_rows("train").tolist() == [1, 6]
        assert shards.labels.tolist() == [0, 1, 0, 0, 0, 0, 1]
        with pytest.raises(ShardError, match="failed in preprocessing"):
            shards.series("rgb").read(0, [0])


def test_open_refuses_what_is_missing_or_unfinished(copy: Path, tmp_path: Path) -> None:
    assert "is no folder" in refusal(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "make one with fsar-preprocess" in refusal(tmp_path / "empty")
    (copy / "rgb-000001.tar").rename(copy / "kept")
    assert "rgb-000001.tar is missing" in refusal(copy)
    (copy / "kept").rename(copy / "rgb-000001.tar")
    shutil.rmtree(copy / "index.zarr")
    assert "unfinished: type the same fsar-preprocess command again" in refusal(copy)


def test_open_refuses_what_is_truncated_or_swapped(copy: Path) -> None:
    tars = [copy / f"flow1-00000{n}.tar" for n in range(2)]
    contents = [tar.read_bytes() for tar in tars]
    tars[1].write_bytes(contents[1][:-10_240])
    assert "flow1-000001.tar has" in refusal(copy)
    size = max(map(len, contents))
    tars[1].write_bytes(contents[0].ljust(size, b"\0")[: len(contents[1])])
    assert "begins with video 0 where the index has 13: it was swapped" in refusal(copy)


def test_open_refuses_what_was_edited(copy: Path) -> None:
    text = (copy / "dataset.json").read_text()
    (copy / "dataset.json").write_text(text.replace('"fox"', '"ant"', 1))
    assert "dataset.json, plan.json or failures.jsonl changed; run fsar-shards reindex" in refusal(copy)
    (copy / "dataset.json").unlink()
    assert "changed" in refusal(copy)


def test_no_bit_of_the_index_changes_unseen(copy: Path) -> None:
    index = copy / "index.zarr"
    files = sorted(path for path in index.rglob("*") if path.is_file())
    draw = random.Random(3)
    expected = {path: path.read_bytes() for path in files}
    with ShardSet.open(copy) as shards:
        names = [shards.name(row) for row in range(shards.num_videos)]
    for path in draw.sample(files, 25):
        flip_bit(path, draw.randrange(8 * path.stat().st_size))
        try:
            faults = verify(copy)
        except FsarError as error:
            faults = [str(error)]
        if not faults:  # metadata that does not change what is read, such as a blank: the columns are proved by hash
            assert path.name == "zarr.json"
            with ShardSet.open(copy) as shards:
                assert [shards.name(row) for row in range(shards.num_videos)] == names
        path.write_bytes(expected[path])
    assert verify(copy) == []


def test_verify_finds_every_flipped_bit(tmp_path: Path) -> None:
    draw = random.Random(5)
    videos = {row: [draw.randbytes(draw.randrange(1, 3000)) for _ in range(3)] for row in (0, 1, 2, 4, 7, 8)}
    copy = write_set(tmp_path / "set", videos)
    tars = sorted(copy.glob("*.tar"))
    members = {tar: [m for sample in from_tar(tar).samples for m in spans(sample)] for tar in tars}
    for _ in range(60):
        tar = draw.choice(tars)
        bit = draw.randrange(8 * tar.stat().st_size)
        flip_bit(tar, bit)
        try:
            faults = verify(copy)
        except ShardError as error:  # not reached: verify reports what `open` would refuse
            faults = [str(error)]
        flip_bit(tar, bit)
        assert len(faults) == 1, faults
        assert str(tar) in faults[0]
        inside = [name for name, start, stop in members[tar] if start <= bit // 8 < stop]
        named = inside[0] if inside else "end of the archive"
        first_header = bit // 8 < 512  # `open` checks it, and says the offset only
        assert named in faults[0] or first_header, (faults, bit // 8)
    assert verify(copy) == []


def spans(sample) -> list[tuple[str, int, int]]:
    """Return name, first and last byte (header and padding included) of each member of a sample."""
    names = [f"{frame:05d}.jpg" for frame in sample.frames] + ["cls", "json"]
    position, result = sample.offset, []
    for name, size in zip(names, sample.sizes, strict=True):
        end = position + 512 + -(-size // 512) * 512
        result.append((f"{sample_key(sample.row)}.{name}", position, end))
        position = end
    return result


def test_verify_looks_beside_the_tars(copy: Path) -> None:
    flip_bit(copy / "diff1-000002.idx", 200)
    (copy / "rgb-000000.json").unlink()
    faults = verify(copy)
    assert [fault.split(":")[0] for fault in faults] == [
        str(copy / name) for name in ("rgb-000000.json", "diff1-000002.idx")
    ]


def test_reindex_makes_the_same_bytes_from_the_tars(copy: Path) -> None:
    expected = digests(copy)
    shutil.rmtree(copy / "index.zarr")
    for path in [*copy.glob("*.idx"), *copy.glob("*-*.json")]:
        path.unlink()
    (copy / "rgb-000000.tar.77.tmp").write_bytes(b"left by a killed run")
    assert CliRunner().invoke(cli, ["reindex", str(copy)], catch_exceptions=False).exit_code == 0
    assert digests(copy) == expected


def test_reindex_does_not_bless_damage(copy: Path) -> None:
    flip_bit(copy / "diff1-000001.tar", 8 * 700)
    with pytest.raises(ShardError, match=r"not the one that diff1-000001\.json describes"):
        CliRunner().invoke(cli, ["reindex", str(copy)], catch_exceptions=False)
    with only_writer(copy), pytest.raises(FsarError, match="being written by another process"):
        CliRunner().invoke(cli, ["reindex", str(copy)], catch_exceptions=False)


def test_a_series_of_other_videos_is_refused(copy: Path) -> None:
    for path in copy.glob("flow1-000002.*"):
        path.unlink()
    with pytest.raises(ShardError, match="flow1 and rgb do not hold the same videos"):
        CliRunner().invoke(cli, ["reindex", str(copy)], catch_exceptions=False)


def test_a_tar_of_others_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rgb-000000.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(__file__, "c00000000.json")
    with pytest.raises(ShardError, match="header at byte 0 is damaged or not ours"):
        from_tar(path)
    with TarSeriesWriter(path) as writer:
        writer.add(sample_key(1), {"00000.jpg": b"x", "cls": b"0", "json": b"{}"})
        writer.add(sample_key(0), {"00000.jpg": b"x", "cls": b"0", "json": b"{}"})
    writer.written.rename(path)
    with pytest.raises(ShardError, match="out of order"):
        from_tar(path)


def test_commands(copy: Path) -> None:
    shown = command_line("info", copy, module="shards_spec.cli.shards")
    assert shown.returncode == 0, shown.stderr
    assert "tiny: 35 videos of 7 classes" in shown.stdout
    assert "flow1" in shown.stdout
    flip_bit(copy / "rgb-000001.tar", 8 * 5000)
    found = command_line("verify", copy, module="shards_spec.cli.shards")
    assert found.returncode == 2
    assert "rgb-000001.tar: c00000013." in found.stdout
    assert "is damaged in 1 places" in found.stderr
    assert "Traceback" not in found.stderr
    typo = command_line("verfy", copy, module="shards_spec.cli.shards")
    assert typo.returncode == 2
    assert 'did you mean "verify"' in typo.stderr


def test_sidecar_says_what_the_tar_holds(tiny_path: Path) -> None:
    described = json.loads((tiny_path / "diff1-000001.json").read_bytes())
    tar = (tiny_path / "diff1-000001.tar").read_bytes()
    assert described["bytes"] == len(tar)
    sample = described["samples"][2]
    start = sample["offset"] + 512
    assert tar[start : start + sample["sizes"][0]].startswith(b"\xff\xd8")
    assert sample["info"]["frames"] == len(sample["frames"]) + 1
    assert np.all(np.diff(sample["frames"]) == 1)
