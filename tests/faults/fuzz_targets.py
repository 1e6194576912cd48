"""Make the targets of the fuzz: good files of every kind that others make, and readers."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fake_shards import FakeShards, encode_frame
from folders import write_set
from mutations import Mutator
from safetensors.torch import save
from sealed import write_column
from second_reader import second_reader

from fsar.checkpoints import TrainingRecord, load_state, load_training_record, save_state
from fsar.evaluation.prediction import read_geometry
from fsar.evaluation.store import Group
from fsar.methods.class_text import ClassText, read_class_text, write_class_text
from fsar.pretraining.config import build_pretrain_config, read_pretrain_recipe
from fsar.run.config import build_config, run_config
from fsar.run.folder import read_log
from fsar.run.recipes import read_recipe
from fsar.trunks.weight_files import read_tensors
from pipelines.episodes.file import read_episodes
from pipelines.episodes.labels import read_labels
from preprocess.datasets.folder import read_class_list
from preprocess.datasets.ssv2 import ssv2_catalogue
from shards_spec import ShardSet, Split
from shards_spec.errors import FsarError
from shards_spec.files import json_line
from shards_spec.index.build import SeriesColumns, VideoColumns
from shards_spec.index.columns import read_column
from shards_spec.index.layout import INDEX, attributes_sha256
from shards_spec.pictures import decode_picture
from shards_spec.schema import Dataset, Failure, Plan, archive_size, padded, path_fault
from shards_spec.splits.divisions import listed_division
from shards_spec.splits.shipped import read_lists
from shards_spec.summary import Summary, from_tar
from shards_spec.tar import header


@dataclass
class Target:
    """Files to change one at a time, and their reader; `share` is their part of the mutations."""

    name: str
    files: list[Path]
    read: Callable[[], object]
    share: float = 1.0
    change: Callable[[Mutator], Callable[[], None]] | None = None
    good: dict[Path, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.good = {path: path.read_bytes() for path in self.files}
        self.read()  # what was not changed is read

    def run(self, mutate: Mutator) -> None:
        """Change something, read, and put all back."""
        if self.change is not None:
            restore = self.change(mutate)
        else:
            path = mutate.draw.choice(self.files)
            path.write_bytes(mutate(self.good[path], [data for data in self.good.values() if len(data) < 1 << 16]))

            def restore() -> None:
                path.write_bytes(self.good[path])

        try:
            self.read()
        except FsarError as error:
            if "\n" in str(error):
                raise AssertionError(f"more than one line: {error}") from error
        finally:
            restore()


def file_target(name: str, path: Path, data: bytes, read: Callable[[Path], object], *, share: float = 1.0) -> Target:
    """Make a target of one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return Target(name, [path], lambda: read(path), share)


def small_files(top: Path) -> list[Target]:
    """Make targets of the JSON files of a shard set and a run, and of texts of names."""
    splits = {"train": Split(("b",), ("b/1.avi", "b/2.avi")), "test": Split(("a",), ("a/x y.avi",))}
    dataset = Dataset("set", ("a", "b"), splits, {"train": (2, 3)}).to_json()
    plan = Plan("set", 4, 3, "0" * 64, {"rgb": {"geometry": "64x64", "codec": "jpeg"}}).to_json()
    failures = Failure.dump_all([Failure(n, f"a/{n}", "a", None, "damaged", "x") for n in (0, 2)])
    geometry = {"shards": "0", "geometry": {"height": 64, "width": 64}, "train": "0"}
    log = b'{"kind": "train", "n": 4, "loss": 1.5, "accuracy": 0.5}\n{"kind": "val", "n": 8, "accuracy": 0.25}\n'
    return [
        file_target("dataset.json", top / "dataset.json", json_line(dataset), Dataset.load),
        file_target("plan.json", top / "plan.json", json_line(plan), Plan.load),
        file_target("failures.jsonl", top / "failures.jsonl", failures, Failure.load_all),
        file_target(
            "data.json", top / "run" / "data.json", json_line(geometry), lambda path: read_geometry(path.parent)
        ),
        file_target("log.jsonl", top / "run" / "log.jsonl", log, lambda path: read_log(path.parent)),
        file_target("class list", top / "classes.txt", b"ant\nbee, x\n", lambda path: read_class_list(str(path))),
    ]


def lists(top: Path) -> list[Target]:
    """Make targets of split lists in each form of the field, and of the files that go with them."""
    shards = FakeShards()
    text = {f"{s}_few_shot.txt": f"{s}0//clips/{c}/v 1.avi\n{s}0//clips/{c}/v2.avi 7\n" for s, c in SPLITS.items()}
    rows = [f"{c},abcdefghij{n},{n},1{n},{s}" for s, c in SPLITS.items() for n in (0, 1)]
    table = "\n".join(["label,youtube_id,time_start,time_end,split", *rows]) + "\n"
    content = {s: {c: [f"{c}_1.avi", "x/y.mp4"]} for s, c in SPLITS.items()}
    targets = [
        _lists_target("lists of text", top / "text", {name: line.encode() for name, line in text.items()}, share=2),
        _lists_target("list of CSV", top / "csv", {"all.csv": table.encode()}, share=2),
        _lists_target("list of JSON", top / "json", {"all.json": json.dumps(content).encode()}, share=2),
    ]
    hmdb = {
        f"class{c}_test_split1.txt": b"".join(b"%d.avi %d\n" % (8 * c + n, 1 + n % 2) for n in range(4)) for c in (0, 1)
    }
    targets.append(_folder_target("official lists", top / "hmdb", hmdb, lambda path: listed_division(shards, path)))
    episode = {"n": 0, "classes": ["class0", "class1"], "support": [["videos/0.avi"], ["videos/8.avi"]]}
    episode |= {"query": ["videos/1.avi", "videos/9.avi"], "query_classes": ["class0", "class1"]}
    lines = json_line({"episodes": 1, "split": "train", "seed": 0}) + b"\n" + json_line(episode) + b"\n"
    targets.append(file_target("episodes", top / "e.jsonl", lines, lambda path: read_episodes(path, shards, "train")))
    labels = b"video,cluster\n" + b"".join(b"videos/%d.avi,%d\n" % (n, n % 2) for n in range(6))
    targets.append(file_target("labels", top / "labels.csv", labels, lambda path: read_labels(path, shards, "train")))
    return [*targets, ssv2(top / "ssv2")]


SPLITS = {"train": "Archery", "val": "Biking", "test": "Bowling"}


def _lists_target(name: str, folder: Path, contents: dict[str, bytes], *, share: float) -> Target:
    def read(path: Path) -> None:
        for entries in read_lists(path).values():
            assert not any(path_fault(entry.path) or path_fault(entry.stem) for entry in entries)

    return _folder_target(name, folder, contents, read, share=share)


def _folder_target(
    name: str, folder: Path, contents: dict[str, bytes], read: Callable[[Path], object], *, share: float = 1.0
) -> Target:
    folder.mkdir(parents=True)
    for file, data in contents.items():
        (folder / file).write_bytes(data)
    return Target(name, [folder / file for file in contents], lambda: read(folder), share)


def ssv2(top: Path) -> Target:
    (top / "videos").mkdir(parents=True)
    (top / "lists").mkdir()
    (top / "labels").mkdir()
    for n, split in enumerate(SPLITS):
        (top / "videos" / f"{n}.webm").touch()
        (top / "lists" / f"{split}_few_shot.txt").write_text(f"{split}0//{n}\n")
    entries = [{"id": str(n), "template": f"Putting [something] {n}"} for n in range(3)]
    (top / "labels" / "train.json").write_text(json.dumps(entries))
    files = [*(top / "lists").iterdir(), top / "labels" / "train.json"]
    how = {"splits": top / "lists", "labels": top / "labels"}
    return Target("Something-Something", sorted(files), lambda: ssv2_catalogue(top / "videos", **how), 0.5)


def recipes(top: Path) -> list[Target]:
    run = build_config(read_recipe("molo-ucf101-1shot")).to_toml().encode()
    before = build_pretrain_config(read_pretrain_recipe("moco-r18")).to_toml().encode()

    def read(path: Path) -> None:
        assert "\0" not in run_config(path.parent).to_toml()

    return [
        file_target("recipe", top / "a" / "config.toml", run, read),
        file_target(
            "pre-training recipe",
            top / "b" / "config.toml",
            before,
            lambda path: build_pretrain_config(read_pretrain_recipe(str(path))),
        ),
    ]


def tensors(top: Path) -> list[Target]:
    """Make targets of checkpoints, files of weights, texts of classes, stored features."""
    top.mkdir()
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    record = TrainingRecord(torch.arange(3), torch.arange(4))
    save_state(top / "c", model, optimizer, {"n": 4, "best": 0.5}, trained_on=record)

    def checkpoint(path: Path) -> None:
        load_training_record(path)
        load_state(path, model, optimizer)

    torch.save(model.state_dict(), top / "w")
    write_class_text(top / "t", ClassText(("ant", "bee"), torch.ones(2, 3), "{}", "x"))
    group = Group(top / "f", {}, verify=False)
    with group.adding() as number:
        group.write(number, np.arange(4), {"pooled": torch.ones(4, 2, 3)})
    module = (
        b"\x80\x02c__torch__\nM\n)\x81}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storage"
    )
    module += b"ctorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x02tQK\x00(K\x02t(K\x01t\x89NtRsb."
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name, data in (("m/data.pkl", module), ("m/constants.pkl", b"\x80\x02)."), ("m/data/0", b"\0" * 8)):
            file.writestr(name, data)

    def features() -> None:
        found = group.find(np.arange(4))
        found.read(np.flatnonzero(found.there))

    weights = {"pth": (top / "w").read_bytes(), "safetensors": save(model.state_dict()), "pt": archive.getvalue()}
    return [
        file_target("checkpoint", top / "c.safetensors", (top / "c").read_bytes(), checkpoint),
        *(file_target(f"weights.{end}", top / f"w.{end}", data, read_tensors) for end, data in weights.items()),
        file_target("class texts", top / "t.safetensors", (top / "t").read_bytes(), read_class_text),
        Target("features", [path for path in group.folder.rglob("*") if path.is_file()], features),
    ]


def pictures(top: Path) -> list[Target]:
    frame, raw = encode_frame(0, 24, 32), bytes(24 * 32 * 3)
    return [
        file_target("JPEG", top / "j", frame, lambda path: decode_picture(path.read_bytes(), "rgb", 0)),
        file_target(
            "raw", top / "r", raw, lambda path: decode_picture(path.read_bytes(), "rgb", 0, raw=(24, 32)), share=0.1
        ),
    ]


VIDEOS = {0: [b"one" * 300, b""], 1: [b"two"], 3: [b"x" * 512, b"y" * 513, b"z"]}


def index(top: Path) -> list[Target]:
    """Change the index of a shard set: only files, or hashes too, as an attacker would."""
    folder = write_set(top, VIDEOS, splits={"train": Split(("b",), ("b/0 é.avi", "b/3 é.avi"))}, rows=2)
    columns = sorted(path.parent for path in (folder / INDEX).rglob("c"))
    files = sorted(path for path in (folder / INDEX).rglob("*") if path.is_file())

    def read() -> None:
        with ShardSet.open(folder) as shards:
            rgb, rows = shards.series("rgb"), np.arange(shards.num_videos)
            assert shards.num_videos == 4, "an index that lies was opened"
            assert not any(path_fault(name) for name in shards.names(rows) if name)
            for row in shards.split_rows("train").tolist() if "train" in shards.dataset.splits else ():
                shards.group_name(row)
                assert 0 <= shards.labels[row] < len(shards.dataset.classes)
                assert rgb.sizes[row].min() >= 0
                for payload in rgb.read(row, range(len(rgb.kept(row)))):
                    assert len(payload) < 2048

    def change_sealed(mutate: Mutator) -> Callable[[], None]:
        root, dataset = folder / INDEX / "zarr.json", folder / "dataset.json"
        before = {path: path.read_bytes() for path in (root, dataset)}
        metadata = json.loads(before[root])
        held = metadata["attributes"]
        way = mutate.draw.randrange(5)
        if way == 0:
            held = mutate.swap_value(held)
        elif way == 1:
            dataset.write_bytes(mutate(before[dataset], ()))
            held["files"]["dataset.json"] = hashlib.sha256(dataset.read_bytes()).hexdigest()
        else:
            path = mutate.draw.choice(columns)
            before |= {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
            _change_column(mutate, path, held["columns"], path.relative_to(folder / INDEX).as_posix())
        if isinstance(held, dict) and {"format", "columns", "files"} <= held.keys():
            held["sha256"] = attributes_sha256(held)
        metadata["attributes"] = held
        root.write_text(json.dumps(metadata))

        def restore() -> None:
            for path, data in before.items():
                path.write_bytes(data)

        return restore

    names = ["index", "index, hashes that fit"]
    return [Target(names[0], files, read, 0.5), Target(names[1], files, read, 1.5, change_sealed)]


def _change_column(mutate: Mutator, path: Path, hashes: dict[str, Any], name: str) -> None:
    """Write other values, or more of them, to a column; its chunk and hash then fit."""
    values = read_column(path)[0].copy()
    info, draw = np.iinfo(values.dtype) if values.dtype.kind in "iu" else None, mutate.draw
    extremes = [info.min, info.max, 0, 1, info.max // 2] if info else [np.nan, np.inf, -1.0, 3e38]
    for _ in range(draw.choice((1, 1, 2, len(values)))):
        if values.size:
            place = draw.randrange(values.size)
            near = int(values.flat[place]) + draw.choice((1, 512)) if info else 24.0
            values.flat[place] = draw.choice((*extremes, min(near, info.max) if info else near))
    if draw.random() < 0.3:  # more or fewer rows
        values = np.resize(values, (draw.choice((0, 1, 5, 9)), *values.shape[1:]))
    hashes[name] = write_column(path, values)


def tars(top: Path) -> list[Target]:
    """Change a shard, its members written anew around a changed JSON, and its summary."""
    folder = write_set(top, VIDEOS, rows=4)
    tar, beside = folder / "rgb-000000.tar", folder / "rgb-000000.json"

    def read() -> None:
        summary = from_tar(tar)
        theirs = [[len(data) for data in files.values()] for _, files in second_reader(tar)]
        assert theirs == [sample.sizes for sample in summary.samples]  # a reader of others sees the same
        _columns(folder, summary, tar)

    def change(mutate: Mutator) -> Callable[[], None]:
        before = tar.read_bytes()
        samples = [(key, dict(files)) for key, files in second_reader(tar)]
        _, files = mutate.draw.choice(samples)
        if mutate.draw.random() < 0.8:
            files["json"] = json.dumps(mutate.swap_value(json.loads(files["json"]))).encode()
        else:
            old = mutate.draw.choice(list(files))
            files[mutate.draw.choice(("../x.jpg", "00007.jpg", "cls", "-0001.jpg", "json", "0x001.jpg"))] = files.pop(
                old
            )
        tar.write_bytes(_tar(samples))
        return lambda: tar.write_bytes(before) and None

    def read_beside() -> None:
        _columns(folder, Summary.load(beside), tar)

    return [
        Target("shard", [tar], read, 1.0),
        Target("shard, written anew", [tar], read, 1.0, change),
        Target("summary of a shard", [beside], read_beside, 1.0),
    ]


def _tar(samples: list[tuple[str, dict[str, bytes]]]) -> bytes:
    parts = []
    for key, files in samples:
        for extension, data in files.items():
            parts += [header(f"{key}.{extension}", len(data)), data.ljust(padded(len(data)), b"\0")]
    body = b"".join(parts)
    return body.ljust(archive_size(len(body)), b"\0")


def _columns(folder: Path, summary: Summary, tar: Path) -> None:
    """Make the columns of a summary, as `build_index` does before it writes."""
    series, videos = SeriesColumns(), VideoColumns(Dataset.load(folder / "dataset.json"), {})
    series.add(summary, 0, path=tar)
    videos.add(summary)
    series.columns(len(videos.columns()["label"]))


def every_target(top: Path) -> list[Target]:
    """Make all targets, in folders of their own."""
    targets = small_files(top / "small") + lists(top / "lists") + recipes(top / "recipes") + tensors(top / "tensors")
    return targets + pictures(top / "pictures") + index(top / "index") + tars(top / "tars")
