"""Input that means harm: names that climb, indices that lie, archives that swell, pickles that run, absurd videos."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from fake_shards import FakeShards
from folders import command_line, write_set
from safetensors.torch import save_file
from sealed import change_metadata, lie, seal, write_column
from videos import moving_frames, write_video

from fsar.config import build_config, read_recipe
from fsar.embedding_store import EmbeddingStore
from fsar.feature_store import FeatureStore
from fsar.label_file import read_labels
from fsar.methods import Embedding
from fsar.report import read_log
from fsar.run_state import load_seen, load_state
from fsar.weight_files import read_tensors
from preprocess.catalogue import Catalogue, Video, arrange
from preprocess.cli import cli
from preprocess.decode import USUAL_FRAMES, USUAL_PIXELS, Geometry
from preprocess.folder import folder_catalogue
from preprocess.stage import Settings, preprocess
from shards_spec import Dataset, FsarError, ShardSet, Split, index_columns
from shards_spec.column_files import read_column
from shards_spec.index import INDEX, build_index
from shards_spec.pictures import decode_picture
from shards_spec.schema import Failure
from shards_spec.splits import read_lists
from shards_spec.summary import from_tar
from shards_spec.tar import archive_size, header, padded

NAMES = {"../x.avi": "leads out", "a/../../x.avi": "leads out", "/etc/x.avi": "leads out", "a/\0.avi": "control"}
NAMES |= {"a/x\ny.avi": "control", "a/\x1b[2J.avi": "control", "a/\ud800.avi": "control"}
HARMLESS = ("a/..x.avi", "a../x.avi", "a/x...avi", "a/<script>.avi", "a/é\udce9 漢.avi", "~/x.avi", "a/C:\\x.avi")


def refusal(call, *args: object, **options: object) -> str:
    """The one sentence of our own with which something is refused."""
    with pytest.raises(FsarError) as refused:
        call(*args, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def open_all(folder: Path) -> None:
    with ShardSet.open(folder) as shards:
        list(shards.names(np.arange(shards.num_videos)))
        for row in np.flatnonzero(shards.frames).tolist():
            shards.group_name(row)
            shards.series("rgb").kept(row)
            assert shards.series("rgb").sizes[row].min() > 0


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard set of five rows, one of which failed, in three shards."""
    videos = {0: [b"one" * 300, b""], 1: [b"two"], 3: [b"x" * 512, b"y" * 513], 4: [b"z"]}
    return write_set(tmp_path_factory.mktemp("honest") / "set", videos, rows=2, splits={"train": Split(("b",))})


@pytest.fixture
def small(honest: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(honest, tmp_path / "set"))


# --- names ---------------------------------------------------------------------------------------


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


def write_tar(folder: Path, members: dict[str, bytes]) -> Path:
    parts = [header(name, len(data)) + data.ljust(padded(len(data)), b"\0") for name, data in members.items()]
    body = b"".join(parts)
    path = folder / "rgb-000000.tar"
    path.write_bytes(body.ljust(archive_size(len(body)), b"\0"))
    return path


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


# --- indices that lie --------------------------------------------------------------------------------


LIES = {
    "videos/label": ([0, 1, 0, 1, 7], "label holds numbers outside -1 to 1"),
    "videos/group": ([-1, -1, -1, -1, 5], "group holds numbers outside"),
    "videos/frames": ([2, 1, 0, -2, 1], "frames holds numbers outside"),
    "videos/fps": ([np.nan] * 5, "fps holds what is no rate"),
    "series/rgb/shard": ([0, 0, -1, 1, 1], "shards that it does not list"),
    "series/rgb/offset": ([0, 0, 0, 0, 0], "overlap"),
    "series/rgb/first": ([0, 2, 3, 3, 9, 6], "belong to no video or to several"),
    "series/rgb/size": ([900, 0, 4_000_000_000, 512, 513, 1], "overlap|another size"),
    "series/rgb/tail": (np.full((5, 2), 2**32 - 1), "overlap|another size"),
    "series/rgb/shard_number": ([0, 1, -7], "impossible numbers"),
    "series/rgb/shard_bytes": ([2**62, 2**62, 2**62], "another size"),
    "series/rgb/stored_size": (np.full((5, 2), 10**9), "numbers that cannot be"),
    "series/rgb/frame": ([0, 1, 0, -1, 1, 0], "numbers that cannot be"),
    "videos/name_ends": ([9, 8, 7, 6, 5], "strings that overlap"),
}


@pytest.mark.parametrize(("column", "values", "why"), [(key, *value) for key, value in LIES.items()])
def test_columns_that_lie(small: Path, column: str, values: list, why: str) -> None:
    path = small / INDEX / column
    lie(small, column, np.array(values).astype(read_column(path)[0].dtype))
    assert any(part in refusal(open_all, small) for part in why.split("|"))


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
    """The columns have no chunks, so that zeros would be made up to any number."""
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
    """32 KB of zstd that would become 1 GB."""
    block = ((128 << 10) << 3 | 1 << 1).to_bytes(3, "little") + b"\0"
    bomb = b"\x28\xb5\x2f\xfd\x00\x58" + block * 8000
    (small / INDEX / "videos/name_bytes/c/0").write_bytes(bomb)
    tracemalloc.start()
    assert "is damaged" in refusal(open_all, small)
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


class Touch:
    """A pickle that would make a file."""

    def __reduce__(self) -> tuple:
        return Path.touch, (Path("was-run"),)


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
    shutil.copytree(column, part / "view")
    store = EmbeddingStore(tmp_path / "new")
    store.path = tmp_path / "store"
    monkeypatch.setattr("fsar.embedding_store.key_of", lambda _: "key")
    assert "zarr.json is missing" in refusal(store.fetch, {}, np.arange(2), iter, device=torch.device("cpu"))
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize(
    "column", ["series/../../x/shard", "series/RGB/shard", "/etc/passwd", "series/rgb/../x", "videos"]
)
def test_names_of_series_that_climb(small: Path, column: str) -> None:
    seal(small, **{column.replace("/", "__"): "0" * 64})
    assert "which is none of ours" in refusal(open_all, small)


def test_a_row_that_would_fill_the_memory(tmp_path: Path, monkeypatch) -> None:
    """One video, and nothing known of the 99,999,998 before it."""
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
    """To open one would wait for ever."""
    for name in ("dataset.json", "rgb-000000.tar", f"{INDEX}/zarr.json", f"{INDEX}/videos/label/c/0"):
        copy = Path(shutil.copytree(small, small.with_name(name.replace("/", "-"))))
        (copy / name).unlink()
        os.mkfifo(copy / name)
        assert refusal(open_all, copy)


def test_sentence_and_exit_code(small: Path) -> None:
    lie(small, "videos/label", np.full(5, 2**31 - 1, np.int32))
    done = command_line("info", small, module="shards_spec.cli")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: ")


# --- weights ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # torch's, about a protocol of pickle
def test_pickles_in_checkpoints_never_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"a": Touch()}))
    torch.save({"a": Touch()}, tmp_path / "zip.pth")
    torch.save({"a": Touch()}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    shutil.copy(tmp_path / "zip.pth", tmp_path / "renamed.safetensors")
    for path in sorted(tmp_path.glob("*.*")):
        sentence = refusal(read_tensors, path)
        assert "pickled code, which is never run" in sentence or "cannot be read as weights" in sentence
        assert "no checkpoint of ours" in refusal(load_seen, path)
    assert not (tmp_path / "was-run").exists()


def test_files_of_weights_that_swell(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * (100 << 20))
    torch.save({"a": torch.zeros(1).expand(1 << 40)}, tmp_path / "wide.pth")
    one = torch.zeros(1 << 20)
    torch.save({f"t{n}": one for n in range(100)}, tmp_path / "same.pth")
    (tmp_path / "header.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    entry = {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
    text = json.dumps(entry).encode()
    (tmp_path / "length.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    for name in ("bomb.pth", "wide.pth", "same.pth"):
        assert "announces" in refusal(read_tensors, tmp_path / name)
    for name in ("header.safetensors", "length.safetensors"):
        assert "cannot be read as weights" in refusal(read_tensors, tmp_path / name)
    save_file({"seen.classes": torch.zeros(2), "seen.videos": torch.zeros(2)}, tmp_path / "s", {"loop": "{}"})
    assert "is no hashes" in refusal(load_seen, tmp_path / "s")


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"\x80\x02c__torch__\nM\n)\x81r\xff\xff\xff\x7f.", "remembers more than"),
        # a module that holds one twice, which holds one twice, ...: 2 ** 40 tensors
        (
            b"\x80\x02c__torch__\nM\n)\x81q\x00}X\x01\x00\x00\x00tctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00"
            b"storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x02tQK\x00(K\x02t(K\x01t\x89NtRsb0"
            + b"".join(
                b"c__torch__\nM\n)\x81q%c}(X\x01\x00\x00\x00ah%cX\x01\x00\x00\x00bh%cub0" % (n + 1, n, n)
                for n in range(40)
            )
            + b"h%c." % 40,
            "more than 100,000 tensors",
        ),
    ],
)
def test_archives_of_modules_that_swell(tmp_path: Path, data: bytes, sentence: str) -> None:
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as file:
        file.writestr("m/data.pkl", data)
        file.writestr("m/constants.pkl", pickle.dumps(()))
        file.writestr("m/data/0", b"\0" * 8)
    assert sentence in refusal(read_tensors, tmp_path / "m.pt")


# --- videos ------------------------------------------------------------------------------------------


def test_absurd_videos_are_reported_and_the_run_goes_on(tmp_path: Path) -> None:
    for name, (frames, size) in {"good": (8, (48, 64)), "long": (300, (16, 16)), "large": (4, (256, 512))}.items():
        write_video(tmp_path / "in" / "a" / f"{name}.mp4", moving_frames(0, frames, size=size))
    settings = Settings(Geometry(64, 64), max_frames=100, max_pixels=100_000)
    failures = preprocess(folder_catalogue(tmp_path / "in"), tmp_path / "out", settings)
    assert [(f.name, f.reason, f.detail) for f in failures] == [
        ("a/large.mp4", "too-large", "frames of more than 100000 pixels"),
        ("a/long.mp4", "too-long", "more than 100 frames"),
    ]
    with ShardSet.open(tmp_path / "out") as shards:
        assert shards.frames.tolist() == [8, 0, 0]


def test_limits_of_the_command(tmp_path: Path) -> None:
    write_video(tmp_path / "in" / "a" / "v.mp4", moving_frames(0, 30, size=(16, 16)))
    write_video(tmp_path / "in" / "a" / "w.mp4", moving_frames(0, 9, size=(16, 16)))
    shown = CliRunner().invoke(cli, ["folder", "--help"]).output
    assert str(USUAL_FRAMES) in shown
    assert str(USUAL_PIXELS) in shown
    args = ["folder", "--videos", tmp_path / "in", "--out", tmp_path / "out", "--size", 64, "--motion", "none"]
    done = CliRunner().invoke(cli, [str(arg) for arg in [*args, "--max-frames", 9]])
    assert done.exit_code == 3
    assert "a/v.mp4: too-long: more than 9 frames" in done.stderr


def test_the_limits_decide_no_byte(tmp_path: Path) -> None:
    write_video(tmp_path / "in" / "a" / "v.mp4", moving_frames(0, 8, size=(48, 64)))
    videos = folder_catalogue(tmp_path / "in")
    for name, limits in {"one": {}, "two": {"max_frames": 8, "max_pixels": 1 << 16}}.items():
        assert (
            preprocess(Catalogue(videos.dataset, videos.videos), tmp_path / name, Settings(Geometry(64, 64), **limits))
            == []
        )
    one, two = ((tmp_path / name / "rgb-000000.tar").read_bytes() for name in ("one", "two"))
    assert one == two


# --- what the fuzz has found, one of each kind -----------------------------------------------------------


def test_logs_checkpoints_and_features_that_are_broken(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"kind": "train", "n"')
    assert "log.jsonl is damaged" in refusal(read_log, tmp_path)
    np.save(tmp_path / "pooled-000000.npy", np.ones((0, 2, 3), np.float32))
    assert "holds float32 (0, 2, 3)" in refusal(FeatureStore.open, tmp_path, ("pooled",), 4)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters())
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    for state in ({"optimizer.0.exp_avg": torch.zeros(1, 2)}, {"optimizer.0.step": torch.zeros(3)}):
        save_file(weights | state, tmp_path / "c", {"loop": "{}"})
        assert "no checkpoint of ours" in refusal(load_state, tmp_path / "c", model, optimizer)
    save_file(weights, tmp_path / "c", {"loop": "[1]"})
    assert "no checkpoint of ours" in refusal(load_state, tmp_path / "c", model)


@pytest.mark.parametrize("key", ["name", "label", "group", "frames", "fps", "source_size", "size"])
def test_samples_that_do_not_say_all(tmp_path: Path, key: str) -> None:
    info = {"name": "b/x", "label": "b", "group": None, "frames": 1, "fps": 25.0, "source_size": [4, 4], "size": [4, 4]}
    text = json.dumps({other: value for other, value in info.items() if other != key}).encode()
    tar = write_tar(tmp_path, {"c00000000.00000.jpg": b"x", "c00000000.cls": b"0", "c00000000.json": text})
    assert "is none of ours" in refusal(from_tar, tar)


def test_parts_of_a_store_that_do_not_fit(tmp_path: Path) -> None:
    facts, numbers, cpu = {"a": 1}, np.arange(4), torch.device("cpu")
    store = EmbeddingStore(tmp_path / "store.zarr")
    store.fetch(facts, numbers, lambda some: [Embedding(torch.ones(len(some), 2, 3))], device=cpu)
    part = next((tmp_path / "store.zarr").glob("*/part-*"))
    wide = np.ones((5, 2, 3), np.float32)
    sha256 = write_column(part / "tokens", wide)
    change_metadata(part / "tokens", attributes={"sha256": sha256})
    assert "holds other columns" in refusal(store.fetch, facts, numbers, iter, device=cpu)


def test_deep_json_and_toml(tmp_path: Path) -> None:
    deep = "[" * 100_000
    (tmp_path / "dataset.json").write_text(deep)
    assert "nested too deeply" in refusal(Dataset.load, tmp_path / "dataset.json")
    (tmp_path / "x.toml").write_text(f"a = {'[' * 5000}")
    assert "is no TOML" in refusal(read_recipe, str(tmp_path / "x.toml"))
    assert sys.getrecursionlimit() < 100_000
