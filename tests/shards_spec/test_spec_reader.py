"""Read shards by SPEC.md and the standard library only, and by the readers of other tools."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from second_reader import second_reader

from shards_spec import ShardSet

# --- the second reader: nothing of ours is used between here and the next rule -----------------


def second_catalogue(folder: Path):
    """Yield (row, json, class number, {frame number: JPEG}) of every stored video of a set."""
    for path in sorted(folder.glob("rgb-*.tar")):
        for key, files in second_reader(path):
            frames = {int(e[:5]): data for e, data in files.items() if e.endswith(".jpg")}
            yield int(key[1:]), json.loads(files["json"]), int(files["cls"]), frames


# ------------------------------------------------------------------------------------------------


def test_second_reader_sees_what_ours_sees(tiny_path: Path, tiny_shards: ShardSet) -> None:
    rgb = tiny_shards.series("rgb")
    rows = []
    for row, info, label, frames in second_catalogue(tiny_path):
        rows.append(row)
        assert info["name"] == tiny_shards.name(row)
        assert label == tiny_shards.labels[row]
        assert info["frames"] == tiny_shards.frames[row]
        assert list(frames) == rgb.kept(row).tolist() == info["kept"]
        assert rgb.read(row, range(len(frames))) == list(frames.values())
    assert rows == list(range(tiny_shards.num_videos))


def test_webdataset_reads_every_series(tiny_path: Path, tiny_shards: ShardSet) -> None:
    webdataset = pytest.importorskip("webdataset")
    for series in tiny_shards.series_names:
        urls = [str(path) for path in sorted(tiny_path.glob(f"{series}-*.tar"))]
        samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
        assert [sample["__key__"] for sample in samples] == [f"c{row:08d}" for row in range(tiny_shards.num_videos)]
        payload = tiny_shards.series(series).read(3, [0])[0]
        assert samples[3]["00000.jpg"] == payload


def test_dali_reads_a_shard_with_its_index(tiny_path: Path, tiny_shards: ShardSet) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    from nvidia.dali import fn, pipeline_def  # noqa: PLC0415 -- not installed everywhere

    @pipeline_def(batch_size=4, num_threads=1, device_id=None)
    def pipeline():
        return tuple(
            fn.readers.webdataset(
                paths=[str(tiny_path / "rgb-000000.tar")],
                index_paths=[str(tiny_path / "rgb-000000.idx")],
                ext=["00000.jpg", "cls"],
                missing_component_behavior="error",
            )
        )

    pipe = pipeline()
    pipe.build()
    frames, classes = pipe.run()
    for row in range(4):
        assert np.array(frames[row]).tobytes() == tiny_shards.series("rgb").read(row, [0])[0]
        assert int(bytes(np.array(classes[row]))) == tiny_shards.labels[row]


def test_index_for_dali_equals_that_of_its_own_tool(tiny_path: Path, tmp_path: Path) -> None:
    tool = Path(sys.executable).with_name("wds2idx")
    if not tool.exists():
        pytest.skip("DALI's wds2idx is not installed")
    subprocess.run([tool, tiny_path / "flow1-000001.tar", tmp_path / "theirs.idx"], check=True, capture_output=True)
    assert (tmp_path / "theirs.idx").read_bytes() == (tiny_path / "flow1-000001.idx").read_bytes()
