"""Files of episodes: what is broken is named, what was written is read again."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from fake_shards import FakeShards

from pipelines.episodes.file import read_episodes, write_episodes
from pipelines.episodes.rules import EpisodeRules
from pipelines.episodes.stream import EpisodeStream
from shards_spec import ShardError, ShardSet

GOOD = {
    "n": 0,
    "classes": ["fox", "gnu"],
    "support": [["fox/fox_g0_0.mp4"], ["gnu/gnu_g0_0.mp4"]],
    "query": ["gnu/gnu_g1_2.mp4", "fox/fox_g1_2.mp4"],
    "query_classes": ["gnu", "fox"],
}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"n": 2}, "n is 2 and not 1"),
        ({"classes": ["fox", "ant"]}, 'split "test" has no class "ant"'),
        ({"classes": ["fox", "fox"]}, "each once"),
        ({"classes": 7}, '"classes" is no list'),
        ({"support": [["fox/fox_g0_0.mp4"]]}, "one list of videos for each class"),
        (
            {"support": [["gnu/gnu_g0_0.mp4"], ["fox/fox_g0_0.mp4"]]},
            'no stored video "gnu/gnu_g0_0.mp4" of class "fox"',
        ),
        ({"support": [["fox/fox_g0_0.mp4"], ["gnu/9.mp4"]]}, 'no stored video "gnu/9.mp4"'),
        ({"support": [["fox/fox_g0_0.mp4", "fox/fox_g0_1.mp4"], ["gnu/gnu_g0_0.mp4"]]}, "unequal numbers"),
        ({"query": ["gnu/gnu_g0_0.mp4", "fox/fox_g1_2.mp4"]}, "stands in two places"),
        ({"query_classes": ["gnu"]}, "not equally long"),
        ({"query": [None, {}]}, "no stored video null"),
        ({"query": GOOD["query"][:1], "query_classes": ["gnu"]}, "1 queries, where the first episode has"),
        ({"n": True}, "n is True and not 1"),
        ({"unlabelled": None}, '"unlabelled" is no list'),
        ({"unlabelled": "fox"}, '"unlabelled" is no list'),
        ({"unlabelled": ["fox/fox_g1_3.mp4"]}, '"unlabelled" and "unlabelled_classes" are not equally long'),
        ({"unlabelled": ["fox/fox_g1_3.mp4"], "unlabelled_classes": ["gnu"]}, "no stored video"),
        ({"unlabelled": ["fox/fox_g1_3.mp4"], "unlabelled_classes": ["fox"]}, "unequal numbers of unlabelled videos"),
        (
            {"unlabelled": ["fox/fox_g1_3.mp4", "gnu/gnu_g1_3.mp4"], "unlabelled_classes": ["fox", "gnu"]},
            "(1 unlabelled videos of each class, 0 of each of 0 others), where the first episode has 2 classes",
        ),
    ],
)
def test_a_broken_line_is_named(tiny_shards: ShardSet, tmp_path: Path, changes: dict, sentence: str) -> None:
    path = tmp_path / "e.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD | {"n": 1}) + "\n")
    assert read_episodes(path, tiny_shards, "test").shape.queries == 2
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD | {"n": 1} | changes) + "\n")
    with pytest.raises(ShardError) as refused:
        read_episodes(path, tiny_shards, "test")
    assert f"{path}, line 2: " in str(refused.value)
    assert sentence in str(refused.value)


def test_no_json_a_wrong_header_and_a_cut_file_are_refused(tiny_shards: ShardSet, tmp_path: Path) -> None:
    path, good = tmp_path / "e.jsonl", json.dumps(GOOD).encode()
    for data, sentence in (
        (b"\xff\xfe", "line 1: no JSON"),
        (b"[1]", "line 1: no JSON object"),
        (b'{"episodes": "two"}\n' + good, 'line 1: "episodes" of the header is "two"'),
        (b'{"episodes": true}\n' + good, 'line 1: "episodes" of the header is true'),
        (b'{"episodes": 1, "left_out": [1]}\n' + good, '"left_out" of the header is [1]'),
        (b'{"clips": 3}', "neither an episode"),
        (b'{"episodes": 2}\n' + good, "holds 1 of 2 episodes: it was cut short"),
        (b"", "holds 0 of its episodes"),
    ):
        path.write_bytes(data)
        with pytest.raises(ShardError) as refused:
            read_episodes(path, tiny_shards, "test")
        assert sentence in str(refused.value)


def test_many_episodes_are_written_and_read_in_seconds(tmp_path: Path) -> None:
    shards, path = FakeShards(100, classes=24), tmp_path / "e.jsonl"
    stream = EpisodeStream(shards, "all", EpisodeRules(shot=5, resize=64, crop=64), seed=0)
    began = time.perf_counter()
    write_episodes(path, shards, stream, 2000)
    given = read_episodes(path, shards, "all")
    assert time.perf_counter() - began < 10
    assert given.chosen[::999] == tuple(stream.choose(n) for n in range(0, 2000, 999))
    again = EpisodeStream(shards, "all", stream.rules, seed=0, given=given.chosen)
    assert np.array_equal(again.plan(77).support_rows, stream.plan(77).support_rows)
    assert np.array_equal(again.plan(77).query_labels, stream.plan(77).query_labels)
