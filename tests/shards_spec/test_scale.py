"""Keep a million videos cheap without a change: same episodes, same index, same refusals."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from fake_shards import TRAIN as PLAIN
from fake_shards import FakeShards
from folders import flip_bit, write_set
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import index
from benchmarks.measure import environment
from pipelines.episodes.pools import ClassPools, Labels
from pipelines.episodes.stream import EpisodePlan, EpisodeStream
from pipelines.sampling import ClassPool
from shards_spec import ShardError, ShardSet
from shards_spec.index.build import SeriesColumns, VideoColumns, build_index
from shards_spec.schema import Dataset, Failure
from shards_spec.summary import Sample, Summary

TRAIN = dataclasses.replace(PLAIN, small_classes="drop")
# Hashes of episodes as they were drawn when every pool was made at the start: they stay so for ever
PINNED = {
    "train": ({}, "18ca3e44a506e805"),
    "any": ({"groups": "any", "query_jitter": False}, "59db57ca153187a9"),
    "test": (
        {"random_frames": False, "random_crop": False, "query_flip": False, "query_jitter": False},
        "0138f6bb85947f68",
    ),
    "kinetics": ({"frame_rule": "kinetics"}, "7e09a46003b0daed"),
    "kinetics-whole": ({"frame_rule": "kinetics-whole"}, "44a88915efab7fd8"),
    "still": ({"frame_rule": "still", "way": 5}, "784e55a88b993431"),
    "unlabelled": (
        {"unlabelled_per_class": 1, "distractor_classes": 2, "distractors_per_class": 2},
        "b1654f1494f20fbd",
    ),
    "labelled part": (
        {
            "labelled_fraction": 0.6,
            "unlabelled_per_class": 1,
            "distractor_classes": 1,
            "groups": "any",
            "queries": 1,
            "shot": 1,
        },
        "694833201339b09b",
    ),
}


def uneven_shards() -> FakeShards:
    counts = [9, 14, 30, 11, 3, 40, 17, 12]
    rows = np.arange(sum(counts))
    shards = FakeShards(counts, groups=np.where(rows % 5 == 0, -1, rows // 3 + rows % 2).tolist())
    shards.frames[::7] = 5
    shards.frames[::23] = 0
    shards.rgb.sizes[::4] = (50, 70)
    return shards


def content(plan: EpisodePlan) -> bytes:
    views = [(v.reads, v.indices, v.flip, v.box, v.jitter and vars(v.jitter)) for v in plan.views]
    reads = [
        (r.modality, r.size, r.rows.tolist(), r.frames.tolist(), r.tops.tolist(), r.lefts.tolist()) for r in plan.reads
    ]
    arrays = (plan.class_ids, plan.query_labels, plan.support_rows, plan.query_rows, plan.unlabelled_rows)
    return repr((plan.n, plan.way, plan.shot, len(plan.support), views, reads, [a.tolist() for a in arrays])).encode()


def digest(streams: list[EpisodeStream]) -> str:
    found = hashlib.sha256()
    for stream in streams:
        for n in (*range(30), 2**40):
            found.update(content(stream.plan(n)))
        found.update(repr((stream.videos().tolist(), stream.dropped, stream.short_videos)).encode())
    return found.hexdigest()[:16]


@pytest.mark.parametrize("name", PINNED)
def test_episodes_are_pinned_for_ever(name: str) -> None:
    change, expected = PINNED[name]
    rules = dataclasses.replace(TRAIN, **change)
    assert digest([EpisodeStream(uneven_shards(), "all", rules, seed=seed) for seed in (0, 7)]) == expected


def test_episodes_of_single_videos_are_pinned_for_ever() -> None:
    shards, rules = uneven_shards(), dataclasses.replace(TRAIN, small_classes="refuse")
    labels = Labels.of_single_videos(shards, "all")
    streams = [EpisodeStream(shards, "all", rules, seed=seed, labels=labels) for seed in (0, 7)]
    assert digest(streams) == "74da8e55af2842b2"


@given(
    videos=st.lists(st.tuples(st.integers(0, 5), st.integers(-1, 4)), min_size=1, max_size=40),
    shot=st.integers(1, 4),
    queries=st.integers(1, 4),
)
@settings(max_examples=300)
def test_columns_of_all_classes_are_the_pools_of_each(videos: list[tuple[int, int]], shot: int, queries: int) -> None:
    of_rows, groups = (np.array(part) for part in zip(*videos, strict=True))
    used = (4, 0, 7, 2)  # in an order of their own; 7 has no videos, others are of no class that is used
    pools = ClassPools.build(Labels(tuple("abcdefgh"), used, np.arange(len(videos)), of_rows), groups)
    alone = [ClassPool.build(label, rows := np.flatnonzero(of_rows == label), groups[rows]) for label in used]
    assert pools.serve(shot, queries, 0).tolist() == [pool.can_serve(shot, queries) for pool in alone]
    assert pools.serve(shot, queries, 2).tolist() == [pool.can_serve(shot, queries, 2) for pool in alone]
    for pool, other in zip(pools, alone, strict=True):
        assert pool.label == other.label
        assert pool.rows.tolist() == other.rows.tolist()
        assert (pool.groups[:, None] == pool.groups).tolist() == (other.groups[:, None] == other.groups).tolist()
        assert (pool.sizes[pool.groups] == other.sizes[other.groups]).all()
        assert pool.biggest == other.biggest


def test_names_of_many_are_those_of_each(tiny_shards: ShardSet) -> None:
    rows = np.array([3, 0, 34, 0, 17])
    assert list(tiny_shards.names(rows)) == [tiny_shards.name(row) for row in rows.tolist()]
    assert list(tiny_shards.names(rows[:0])) == []


def sample(row: int, frames: int = 2, name: str = "video") -> Sample:
    info = {"name": f"{name} {row}", "label": "b", "group": f"g{9 - row % 3}", "frames": frames, "fps": 25.0}
    info |= {"source_size": [3, 4], "size": [5, 6]}
    return Sample(row, 512 * row, list(range(frames)), [*range(1000, 1000 + frames), 1, 2], [row] * (frames + 2), info)


def test_failed_videos_and_gaps_stand_between_the_stored_ones() -> None:
    failures = {row: Failure(row, f"bad \udcff {row}", "a", "g0", "damaged", "") for row in (0, 3, 4, 9)}
    videos = VideoColumns(Dataset("set", ("a", "b")), failures)
    videos.add(Summary(0, "", [sample(1), sample(4)]))  # 4 was stored since it failed
    videos.add(Summary(0, "", [sample(7, frames=3)]))
    columns = videos.columns()
    data, ends = columns["name_bytes"].tobytes(), [0, *columns["name_ends"].tolist()]
    names = [data[a:b].decode("utf-8", "surrogateescape") for a, b in pairwise(ends)]
    bad = [f"bad \udcff {row}" for row in (0, 3, 9)]
    assert names == [bad[0], "video 1", "", bad[1], "video 4", "", "", "video 7", "", bad[2]]
    assert columns["label"].tolist() == [0, 1, -1, 0, 1, -1, -1, 1, -1, 0]
    assert columns["group"].tolist() == [0, 1, -1, 0, 1, -1, -1, 1, -1, 0]  # g0, g8: numbered in sorted order
    assert columns["frames"].tolist() == [0, 2, 0, 0, 2, 0, 0, 3, 0, 0]


def test_an_index_is_built_from_arrays() -> None:
    series, videos, frames = SeriesColumns(), 1_000, 32
    tracemalloc.start()
    for number in range(videos):
        series.add(Summary(10, "00" * 32, [sample(number, frames)]), number, path=Path("x"))
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 1.3 * videos * (12 * frames + 100)  # size, frame, CRC-32: 12 bytes a picture; 72 a number of a list


def test_a_renamed_shard_gets_no_index(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", {row: [b"x"] for row in range(6)}, rows=2)
    for kind in ("tar", "json", "idx"):
        (folder / f"rgb-000000.{kind}").rename(folder / f"rgb-000007.{kind}")
    with pytest.raises(ShardError, match=r"rgb-000007.tar holds video 0, which belongs into a shard before it"):
        build_index(folder)


def test_open_refuses_any_flipped_bit_of_a_first_header(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", {row: [b"x" * 900] for row in range(4)}, rows=2)
    draw = random.Random(1)
    for bit in draw.sample(range(8 * 512), 40):
        flip_bit(folder / "rgb-000001.tar", bit)
        with pytest.raises(ShardError, match=r"rgb-000001\.tar"), ShardSet.open(folder):
            pass
        flip_bit(folder / "rgb-000001.tar", bit)
    with ShardSet.open(folder):
        pass


def test_the_benchmark_of_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "RESULTS", tmp_path)
    ran = CliRunner().invoke(index.main, ["--largest", "1000"], catch_exceptions=False)
    assert ran.exit_code == 0
    (row,) = json.loads((tmp_path / "index.json").read_text())["rows"]
    assert (row["videos"], row["classes"], row["shards"]) == (1000, 10, 16)
    for figure, _, _, bound in index.FIGURES:
        assert row[figure] > 0
        assert bound is None or row[bound] > 0
