"""Input that means harm: names that climb, indices that lie, archives that swell."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from fake_shards import FakeShards
from folders import command_line, write_set
from harm import Touch, refusal, write_tar
from sealed import change_metadata, lie, seal, write_column
from videos import moving_frames, write_video

from fsar.evaluation.embeddings import EmbeddingStore
from fsar.run.config import build_config
from fsar.run.recipes import read_recipe
from pipelines.episodes.labels import read_labels
from preprocess.cli import cli
from preprocess.datasets.catalogue import Video, arrange
from preprocess.datasets.folder import folder_catalogue
from preprocess.decode import VideoError
from shards_spec import Dataset, ShardSet, Split
from shards_spec.index import build as index_columns
from shards_spec.index.build import build_index
from shards_spec.index.columns import Columns, read_column
from shards_spec.index.layout import INDEX
from shards_spec.pictures import decode_picture
from shards_spec.schema import Failure
from shards_spec.splits.shipped import read_lists
from shards_spec.summary import from_tar
from shards_spec.tar import header

NAMES = {"../x.avi": "leads out", "a/../../x.avi": "leads out", "/etc/x.avi": "leads out", "a/\0.avi": "control"}
NAMES |= {"a/x\ny.avi": "control", "a/\x1b[2J.avi": "control", "a/\ud800.avi": "control"}
HARMLESS = ("a/..x.avi", "a../x.avi", "a/x...avi", "a/<script>.avi", "a/é\udce9 漢.avi", "~/x.avi", "a/C:\\x.avi")


def open_all(folder: Path) -> None:
    with ShardSet.open(folder) as shards:
        list(shards.names(np.arange(shards.num_videos)))
        for row in np.flatnonzero(shards.frames).tolist():
            shards.group_name(row)
            shards.series("rgb").kept(row)
            assert shards.series("rgb").sizes[row].min() > 0


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a shard set of five rows in three shards; one video failed."""
    videos = {0: [b"one" * 300, b""], 1: [b"two"], 3: [b"x" * 512, b"y" * 513], 4: [b"z"]}
    return write_set(tmp_path_factory.mktemp("honest") / "set", videos, rows=2, splits={"train": Split(("b",))})


@pytest.fixture
def small(honest: Path, tmp_path: Path) -> Path:
    """Copy it."""
    return Path(shutil.copytree(honest, tmp_path / "set"))


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "why"), NAMES.items())
def test_names_that_climb_or_hold_controls(tmp_path: Path, name: str, why: str) -> None:
    video = Video(name, "a", None, tmp_path / "x.avi")
    assert why in refusal(arrange, [video], tmp_path)
    listed = {"train": {"a": [name]}}
    (tmp_path / "all.json").write_text(json.dumps(listed))
    assert why in refusal(read_lists, tmp_path / "all.json")
    splits = {"train": {"classes": ["a"], "videos": [name]}}
    (tmp_path / "dataset.json").write_text(json.dumps({"format": 1, "name": "x", "classes": ["a"], "splits": splits}))
    assert why in refusal(Dataset.load, tmp_path / "dataset.json")
    line = {"row": 0, "name": name, "label": "a", "group": None, "reason": "damaged", "detail": ""}
    (tmp_path / "failures.jsonl").write_text(json.dumps(line))
    assert why in refusal(Failure.load_all, tmp_path / "failures.jsonl")
    info = {"name": name, "label": "b", "group": None, "frames": 1, "fps": 25.0, "source_size": [4, 4], "size": [4, 4]}
    members = {"00000.jpg": b"x", "cls": b"0", "json": json.dumps(info).encode()}
    assert why in refusal(from_tar, write_tar(tmp_path, {f"c00000000.{end}": data for end, data in members.items()}))


@pytest.mark.parametrize("name", HARMLESS)
def test_names_that_only_look_dangerous(tmp_path: Path, small: Path, name: str) -> None:
    assert arrange([Video(name, "a", None, Path("x.avi"))], tmp_path)
    encoded = [b"", name.encode("utf-8", "surrogateescape"), b"b/1", b"b/2", b"b/3"]
    lie(small, "videos/name_ends", np.cumsum([len(each) for each in encoded]))
    lie(small, "videos/name_bytes", np.frombuffer(b"".join(encoded), np.uint8))
    with ShardSet.open(small) as shards:
        assert shards.name(1) == name


def test_labels_and_classes_with_controls(tmp_path: Path) -> None:
    assert "control" in refusal(arrange, [Video("a/x.avi", "a\nb", None, tmp_path)], tmp_path)
    assert "control" in refusal(arrange, [Video("a/x.avi", "a", "\x1b", tmp_path)], tmp_path)
    (tmp_path / "labels.csv").write_text('video,cluster\n"../../x\n.avi",1\n')
    assert "is no stored video" in refusal(read_labels, tmp_path / "labels.csv", FakeShards(), "train")


def test_links_that_lead_out_of_the_folder(tmp_path: Path) -> None:
    write_video(tmp_path / "private" / "v.avi", moving_frames(0, 4, size=(48, 64)))
    videos = tmp_path / "in"
    (videos / "a").mkdir(parents=True)
    (videos / "a" / "w.avi").symlink_to(tmp_path / "private" / "v.avi")
    args = ["folder", "--videos", videos, "--out", tmp_path / "out", "--size", 64, "--motion", "none"]
    assert "w.avi is a link that leads out of the folder" in refusal(folder_catalogue, videos)
    (videos / "a" / "w.avi").unlink()
    (videos / "b").symlink_to(tmp_path / "private")
    assert "in/b is a link that leads out" in refusal(folder_catalogue, videos)
    shutil.copy(tmp_path / "private" / "v.avi", videos / "a" / "v.avi")
    (videos / "a" / "same.avi").symlink_to("v.avi")  # links inside the folder are the user's own
    names = [str(arg) for arg in [*args, "--follow-links"]]
    assert CliRunner().invoke(cli, names, catch_exceptions=False).exit_code == 0
    with ShardSet.open(tmp_path / "out") as shards:
        assert [shards.name(row) for row in range(3)] == ["a/same.avi", "a/v.avi", "b/v.avi"]


@pytest.mark.parametrize(
    "name", ["../../evil.jpg", "/c00000000.00000.jpg", "c00000000.../x", "c00000000.00000.jpg/../x"]
)
def test_tar_members_that_climb(tmp_path: Path, name: str) -> None:
    tar = write_tar(tmp_path, {name: b"x", "c00000000.cls": b"0", "c00000000.json": b"{}"})
    assert "rgb-000000.tar" in refusal(from_tar, tar) or "sample key" in refusal(from_tar, tar)
    assert [path.name for path in tmp_path.iterdir()] == ["rgb-000000.tar"]


def test_recipes_with_controls() -> None:
    recipe = read_recipe("demo")
    for key in ("trunk_weights", "labels", "feature_cache", "class_text", "dataset"):
        assert f"{key} holds a control character" in refusal(build_config, recipe | {key: "x\0/../y"})
    assert "expected one below" in refusal(build_config, recipe | {"episodes": 10**400})
    assert "expected a finite number" in refusal(build_config, recipe | {"lr_steps": [0.0, float("nan")]})


# --- indices that lie -----------------------------------------------------------------------------


LIES = {
    "videos/label": ([0, 1, 0, 1, 7], "label holds numbers outside -1 to 1"),
    "videos/group": ([-1, -1, -1, -1, 5], "group holds numbers outside"),
    "videos/frames": ([2, 1, 0, -2, 1], "frames holds numbers outside"),
    "videos/fps": ([np.nan] * 5, "fps holds numbers that cannot be"),
    "series/rgb/shard": ([0, 0, -1, 1, 1], "shards that it does not list"),
    "series/rgb/offset": ([0, 0, 0, 0, 0], "overlap"),
    "series/rgb/first": ([0, 2, 3, 3, 9, 6], "belong to no video or to several"),
    "series/rgb/size": ([900, 0, 4_000_000_000, 512, 513, 1], "overlap|another size"),
    "series/rgb/tail": (np.full((5, 2), 2**32 - 1), "overlap|another size"),
    "series/rgb/shard_number": ([0, 1, -7], "impossible numbers"),
    "series/rgb/shard_bytes": ([2**62, 2**62, 2**62], "another size"),
    "series/rgb/stored_size": (np.full((5, 2), 10**9), "stored_size holds numbers outside 0 to 65535"),
    "series/rgb/frame": ([0, 1, 0, -1, 1, 0], "frame holds numbers outside 0 to 99999"),
    "videos/name_ends": ([9, 8, 7, 6, 5], "strings that overlap"),
}


@pytest.mark.parametrize(("column", "values", "why"), [(key, *value) for key, value in LIES.items()])
def test_columns_that_lie(small: Path, column: str, values: list, why: str) -> None:
    path = small / INDEX / column
    lie(small, column, np.array(values).astype(read_column(path)[0].dtype))
    assert any(part in refusal(open_all, small) for part in why.split("|"))


def test_checksums_that_are_too_few(small: Path) -> None:
    lie(small, "series/rgb/crc32", np.zeros(1, np.uint32))
    assert "crc32 has not one number for each member" in refusal(lambda: ShardSet.open(small, check=True))


def test_columns_of_other_types_and_lengths(small: Path) -> None:
    for column, values in {
        "videos/label": np.zeros(6, np.int32),
        "series/rgb/offset": np.zeros(5, np.float64),
        "series/rgb/size": np.zeros((6, 1), np.uint32),
        "series/rgb/first": np.zeros(5, np.int64),
    }.items():
        copy = Path(shutil.copytree(small, small.with_name(column.replace("/", "-"))))
        lie(copy, column, values)
        assert "announces" in refusal(open_all, copy)


@pytest.mark.parametrize("rows", [10**8, 10**12, 2**63, 10**400])
def test_rows_that_are_only_announced(small: Path, rows: int) -> None:
    """Refuse columns without chunks, which zarr would fill with zeros up to any number."""
    for path in (small / INDEX / "videos").iterdir():
        if path.is_dir() and path.name.split("_")[-1] not in ("bytes", "ends"):
            shape = json.loads((path / "zarr.json").read_bytes())["shape"]
            change_metadata(path, shape=[rows, *shape[1:]])
            shutil.rmtree(path / "c", ignore_errors=True)
    tracemalloc.start()
    assert "announces" in refusal(open_all, small)
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


def test_chunks_that_swell(small: Path) -> None:
    """Refuse 32 KB of zstd that would become 1 GB."""
    block = ((128 << 10) << 3 | 1 << 1).to_bytes(3, "little") + b"\0"
    bomb = b"\x28\xb5\x2f\xfd\x00\x58" + block * 8000
    (small / INDEX / "videos/name_bytes/c/0").write_bytes(bomb)
    tracemalloc.start()
    assert "is damaged" in refusal(open_all, small)
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


def test_arrays_with_pickled_content_are_never_read(small: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    column = small / INDEX / "videos" / "label"
    shutil.rmtree(column)
    column.mkdir()
    old = {"zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "|O", "compressor": None, "fill_value": None}
    (column / ".zarray").write_text(json.dumps(old | {"order": "C", "filters": [{"id": "pickle", "protocol": 5}]}))
    (column / "0").write_bytes(pickle.dumps(np.array([Touch()], dtype=object)))
    assert "label/zarr.json is missing" in refusal(open_all, small)
    part = tmp_path / "store" / "key" / "part-000000"
    shutil.copytree(column, part / "number")
    (part / "zarr.json").write_text('{"attributes": {"columns": ["number"]}}')
    store = EmbeddingStore(tmp_path / "new")
    store.path = tmp_path / "store"
    monkeypatch.setattr("fsar.evaluation.store.key_of", lambda _: "key")
    assert "zarr.json is missing" in refusal(store.fetch, {}, np.arange(2), iter, device=torch.device("cpu"))
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize(
    "column", ["series/../../x/shard", "series/RGB/shard", "/etc/passwd", "series/rgb/../x", "videos"]
)
def test_names_of_series_that_climb(small: Path, column: str) -> None:
    seal(small, **{column.replace("/", "__"): "0" * 64})
    assert "which is none of ours" in refusal(open_all, small)


def test_a_row_that_would_fill_the_memory(tmp_path: Path, monkeypatch) -> None:
    """Refuse one video where nothing is known of the 99,999,998 before it."""
    folder = write_set(tmp_path / "set", {0: [b"x"]})
    tar = folder / "rgb-000000.tar"
    tar.write_bytes(tar.read_bytes().replace(b"c00000000", b"c99999998"))
    data = bytearray(tar.read_bytes())
    for start in (i for i in range(0, len(data), 512) if data[i : i + 9] == b"c99999998"):
        name = bytes(data[start : start + 100]).rstrip(b"\0").decode()
        size = int(bytes(data[start + 124 : start + 135]), 8)
        data[start : start + 512] = header(name, size)
    tar.write_bytes(data)
    for path in (folder / "rgb-000000.idx", folder / "rgb-000000.json"):
        path.unlink()
    monkeypatch.setattr(index_columns, "MOST_GAPS", 1000)
    assert "nothing is known of over 1,000 videos before row 99999998" in refusal(build_index, folder)


def test_members_that_are_only_announced(tmp_path: Path) -> None:
    path = tmp_path / "rgb-000000.tar"
    path.write_bytes(header("c00000000.00000.jpg", 8**11 - 1).ljust(10_240, b"\0"))
    tracemalloc.start()
    assert "cut short inside c00000000.00000.jpg" in refusal(from_tar, path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_picture_of_four_billion_pixels() -> None:
    side = struct.pack(">H", 65_500)
    picture = b"\xff\xd8\xff\xc0\x00\x11\x08" + side * 2 + b"\x03\x01\x22\x00\x02\x11\x01\x03\x11\x01" + b"\xff\xd9"
    assert "is damaged" in refusal(decode_picture, picture, "rgb", 0)


def test_pipes_in_the_place_of_files(small: Path) -> None:
    """Refuse pipes: to open one would wait for ever."""
    for name in ("dataset.json", "rgb-000000.tar", f"{INDEX}/zarr.json", f"{INDEX}/videos/label/c/0"):
        copy = Path(shutil.copytree(small, small.with_name(name.replace("/", "-"))))
        (copy / name).unlink()
        os.mkfifo(copy / name)
        assert refusal(open_all, copy)


def test_sentence_and_exit_code(small: Path) -> None:
    lie(small, "videos/label", np.full(5, 2**31 - 1, np.int32))
    done = command_line("info", small, module="shards_spec.cli.shards")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: ")


def test_frame_numbers_of_a_large_index_shrink_and_are_read(small: Path) -> None:
    """Read 80 MB of clips of 32 frames, which zstd makes 20 KB: the whole index is compared."""
    frames = np.tile(np.arange(32, dtype=np.int32), 640_000)
    sha256 = write_column(small / INDEX / "series/rgb/frame", frames)
    columns = Columns(small / INDEX, "series/rgb", {"series/rgb/frame": sha256})
    assert len(columns["frame"]) == len(frames)
    assert "announces" in refusal(read_column, small / INDEX / "series/rgb/frame")


def test_what_is_written_is_what_readers_take(small: Path, tmp_path: Path) -> None:
    error = VideoError("damaged", "title: a\x1b[2J\nb\x85")
    failure = Failure(0, "a", "a", None, error.reason, error.detail)
    (tmp_path / "failures.jsonl").write_bytes(Failure.dump_all([failure]))
    assert Failure.load_all(tmp_path / "failures.jsonl")[0].detail == "title: a?[2J?b?"
    write_video(tmp_path / "in" / "a" / "v.mp4", moving_frames(0, 8, size=(48, 64)))
    words = ["folder", "--videos", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--name", "a\tb"]
    assert "control" in str(CliRunner().invoke(cli, words).exception)
    assert not (tmp_path / "out").exists()
