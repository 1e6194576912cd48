"""Refuse files that mean harm: pickles, swelling weights, absurd videos, finds of the fuzz."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from harm import Touch, refusal, write_tar
from safetensors.torch import save_file
from sealed import change_metadata, write_column
from videos import moving_frames, write_video

from fsar.checkpoints import load_state, load_training_record
from fsar.evaluation.embeddings import EmbeddingStore
from fsar.evaluation.store import Group
from fsar.methods import Embedding
from fsar.run.folder import read_log
from fsar.run.recipes import read_recipe
from fsar.trunks.weight_files import read_tensors
from preprocess.cli import cli
from preprocess.datasets.catalogue import Catalogue
from preprocess.datasets.folder import folder_catalogue
from preprocess.decode import USUAL_FRAMES, USUAL_PIXELS, Geometry
from preprocess.stage import Settings, preprocess
from shards_spec import Dataset, ShardSet
from shards_spec.summary import from_tar

# --- weights --------------------------------------------------------------------------------------


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
        assert "no checkpoint of ours" in refusal(load_training_record, path)
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
    assert "is no hashes" in refusal(load_training_record, tmp_path / "s")


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


# --- videos ---------------------------------------------------------------------------------------


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


# --- what the fuzz has found, one of each kind ----------------------------------------------------


def test_logs_checkpoints_and_features_that_are_broken(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"kind": "train", "n"')
    assert "log.jsonl is damaged" in refusal(read_log, tmp_path)
    group = Group(tmp_path / "features", {}, verify=False)
    with group.adding() as number:
        group.write(number, np.arange(4), {"pooled": torch.ones(4, 2, 3)})
    write_column(group.folder / "part-000000" / "pooled", np.ones((0, 2, 3), np.float32))
    assert "is damaged" in refusal(group.find, np.arange(4))
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
    shutil.rmtree(part / "tokens")
    assert "tokens/zarr.json is missing" in refusal(store.fetch, facts, numbers, iter, device=cpu)


def test_deep_json_and_toml(tmp_path: Path) -> None:
    deep = "[" * 100_000
    (tmp_path / "dataset.json").write_text(deep)
    assert "nested too deeply" in refusal(Dataset.load, tmp_path / "dataset.json")
    (tmp_path / "x.toml").write_text(f"a = {'[' * 5000}")
    assert "is no TOML" in refusal(read_recipe, str(tmp_path / "x.toml"))
    assert sys.getrecursionlimit() < 100_000
