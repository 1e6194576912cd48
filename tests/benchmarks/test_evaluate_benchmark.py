"""The benchmark of evaluation does the same work in each of its ways."""

from __future__ import annotations

import torch

from benchmarks import evaluate
from benchmarks.sides.synthetic_index import make_set
from pipelines.episodes.rules import EpisodeRules
from shards_spec import ShardSet
from shards_spec.index.build import build_index


def test_each_way_counts_all_episodes_and_gives_the_same_answers(tmp_path, monkeypatch):
    make_set(tmp_path / "set", 500)
    build_index(tmp_path / "set")
    answers = []
    monkeypatch.setattr(evaluate, "note", answers.append)
    monkeypatch.setitem(evaluate.CHANNELS, "molo", 16)
    with ShardSet.open(tmp_path / "set") as shards:
        work = evaluate.Matched("molo", shards, EpisodeRules(queries=2, frames=4, groups="any"), torch.device("cpu"))
        said = []
        for way in (work.in_batches, work.from_table, work.one_by_one):
            answers.clear()
            assert sum(way(7)) == 7
            said.append(torch.cat(answers))
    torch.testing.assert_close(said[1], said[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(said[2], said[0], rtol=1e-4, atol=1e-4)
