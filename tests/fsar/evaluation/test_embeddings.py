"""Embeddings made once: in memory, kept in a store, in random views; the answers are always those of the direct way."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st

from fsar import METHODS, EpisodeLoader, EpisodeRules, create_method
from fsar.evaluation.accuracy import Answers, answer, collect
from fsar.evaluation.cache_keys import model_sha256
from fsar.evaluation.embeddings import EmbeddingStore, clips_of, embed_rows, shuffle_clips
from fsar.methods import FewShotMethod, method_options
from fsar.run.build import build_model
from fsar.run.config import build_config
from pipelines.episodes.views import choose_views, draw_views, number_views
from shards_spec import ShardSet
from shards_spec.errors import ConfigError, FsarError

RULES = EpisodeRules(way=3, queries=2, frames=4, resize=72, crop=56, groups="any")
RANDOM = replace(RULES, random_frames=True, random_crop=True)
EPISODES = 6


def make_model(method: str, seed: int = 0) -> FewShotMethod:
    torch.manual_seed(seed)
    options = {"trunk": "tiny", "frames": 4, "num_classes": 3}
    known = method_options(method)
    return create_method(method, **{key: value for key, value in options.items() if key in known})


def same(one: Answers, other: Answers) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in vars(one))


def in_views(loader: EpisodeLoader, model: FewShotMethod, *, shuffled: bool = False) -> Answers:
    """The direct way: `forward` on episodes whose clips are the chosen views, rendered anew for each."""

    def episodes():
        for n in range(EPISODES):
            plan = loader.stream.plan(n)
            rows = np.concatenate([plan.support_rows, plan.query_rows])
            counts = (len(plan.support_rows), len(plan.query_rows), 0)
            chosen = np.concatenate(choose_views(plan.n, counts, loader.views, seed=loader.stream.seed, flips=False))
            drawn = draw_views(loader.stream, (rows << 16) + chosen)
            clips = clips_of(loader, drawn)
            motion = clips_of(loader, drawn, "motion") if loader.rules.reads_motion else None
            yield plan, loader.assemble(plan, shuffle_clips(clips, rows.tolist()) if shuffled else clips, motion=motion)

    return collect(model, episodes())


def open_loader(shards: ShardSet, rules: EpisodeRules = RULES, **options) -> EpisodeLoader:
    return EpisodeLoader(shards, "train", rules, seed=3, executor="portable", threads=1, prefetch=1, **options)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "motion"])  # which reads no frames
def test_memory_and_store_give_the_answers_of_the_direct_way(
    tiny_shards: ShardSet, tmp_path: Path, method: str
) -> None:
    model, path = make_model(method), tmp_path / "e.zarr"
    with open_loader(tiny_shards) as loader:
        direct = collect(model, ((plan, episode) for plan, episode, _ in loader.planned(0, EPISODES)))
        others = [None, EmbeddingStore(path), EmbeddingStore(path)]
        assert all(same(direct, answer(model, loader, EPISODES, store=store)) for store in others)
    with open_loader(tiny_shards, RANDOM, views=3) as loader:
        direct = in_views(loader, model)
        assert all(same(direct, answer(model, loader, EPISODES, store=store)) for store in others)
    assert len(np.unique(direct.said)) > 1
    assert len(list(path.glob("*/part-*"))) == 2  # one of centre views, one of random ones; read afterwards


def test_two_streams_in_memory_and_store_give_the_answers_of_the_direct_way(
    tiny_shards: ShardSet, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = {"method": "otam", "trunk": "tiny", "trunk_weights": "random", "streams": "both"}
    model, path, kept = build_model(build_config(config)), tmp_path / "e.zarr", []
    model.set_rule(0.3)
    with open_loader(tiny_shards, replace(RANDOM, streams="both"), views=2) as loader:
        direct = in_views(loader, model)
        for store in (None, Counting(path), Counting(path)):
            found = answer(model, loader, EPISODES, store=store)
            assert np.array_equal(found.said, direct.said)
            assert all(np.array_equal(found.of_streams[name], direct.of_streams[name]) for name in found.of_streams)
            kept += [store.made] if store else []
    videos = len(np.unique(np.concatenate([direct.support.ravel(), direct.query.ravel()])))
    assert kept == [2 * 2 * videos, 0]
    assert not np.array_equal(direct.of_streams["frames"], direct.of_streams["motion"])


def test_frames_are_shuffled_in_views_too(tiny_shards: ShardSet) -> None:
    model = make_model("molo")
    with open_loader(tiny_shards, RANDOM, views=2) as loader:
        assert same(in_views(loader, model, shuffled=True), answer(model, loader, EPISODES, shuffled=True))


class Counting:
    """A store that counts what is made."""

    def __init__(self, path: Path) -> None:
        self.store, self.made = EmbeddingStore(path), 0

    def fetch(self, facts, numbers, make, *, device):
        def counted(missing):
            self.made += len(missing)
            return make(missing)

        return self.store.fetch(facts, numbers, counted, device=device)


def test_only_what_is_missing_is_embedded(tiny_shards: ShardSet, tmp_path: Path) -> None:
    model, store = make_model("otam"), Counting(tmp_path / "e.zarr")
    train, counts = tiny_shards.split_rows("train"), []
    with open_loader(tiny_shards, RANDOM, views=2) as loader, open_loader(tiny_shards, RANDOM, views=3) as more:
        for source, rows, options in (
            (loader, train[:4], {}),
            (loader, train[2:6], {}),
            (loader, train[:6], {}),
            (more, train[:6], {}),  # a third view of each
            (more, train[:6], {"shuffled": True}),
            (more, train[:6], {"precision": "bf16"}),
        ):
            before = store.made
            ours = embed_rows(source, model, rows, store=store, **options)
            counts.append(store.made - before)
            anew = embed_rows(source, model, rows, **options)
            assert ours.tokens.dtype == anew.tokens.dtype
            torch.testing.assert_close(ours.tokens, anew.tokens, rtol=1e-5, atol=1e-6)
    assert counts == [8, 4, 0, 6, 18, 18]
    other = make_model("otam", seed=1)
    with open_loader(tiny_shards) as loader, open_loader(tiny_shards, replace(RULES, crop=48)) as smaller:
        made = [store.made]
        for source, network in ((loader, model), (loader, other), (smaller, other), (smaller, other)):
            embed_rows(source, network, train[:5], store=store)
            made.append(store.made)
    assert np.diff(made).tolist() == [5, 5, 5, 0]


def test_processes_make_what_any_of_them_lacks(tiny_shards: ShardSet, tmp_path: Path, monkeypatch) -> None:
    model, rows, store = make_model("otam"), tiny_shards.split_rows("train")[:4], Counting(tmp_path / "e.zarr")
    with open_loader(tiny_shards) as loader:
        first = embed_rows(loader, model, rows, store=store)
        other = number_views(np.asarray(rows[1:3], dtype=np.int64), 1)  # a process that came too early for a part
        monkeypatch.setattr("fsar.evaluation.store.ranks.gather_values", lambda own: [own, other])
        torch.testing.assert_close(embed_rows(loader, model, rows, store=store).tokens, first.tokens)
    assert store.made == 4 + 2


def test_memory_is_kept_once_a_batch_has_had_some(tiny_shards: ShardSet, monkeypatch) -> None:
    model, order = make_model("otam"), []
    embed = model.embed
    model.embed = lambda features: (order.append("batch"), embed(features))[1]
    monkeypatch.setattr("fsar.evaluation.embeddings.keep_freed_memory", lambda device: order.append(device.type))
    with open_loader(tiny_shards) as loader:
        embed_rows(loader, model, tiny_shards.split_rows("train")[:9])
    assert order == ["batch", "cpu", "batch"]


def test_a_model_differs_by_weights_tables_and_options() -> None:
    first = make_model("hyrsm")
    assert model_sha256(first) == model_sha256(make_model("hyrsm").train(mode=False))
    torch.manual_seed(0)
    other = create_method("hyrsm", trunk="tiny", frames=4, num_classes=3, position_scale=(5.0, 1.0))
    assert model_sha256(first) != model_sha256(other)  # its table of positions is no weight
    first.trunk.memory_format = torch.channels_last
    assert model_sha256(first) != model_sha256(make_model("hyrsm"))


def test_what_is_not_whole_is_never_read(tiny_shards: ShardSet, tmp_path: Path, monkeypatch) -> None:
    model, path, rows = make_model("otam"), tmp_path / "e.zarr", tiny_shards.split_rows("train")
    monkeypatch.setattr("fsar.evaluation.embeddings.PART", 1)  # a part for each batch of 8

    def dies(numbers, batches):
        yield next(batches)
        raise KeyboardInterrupt

    class Dying(Counting):
        def fetch(self, facts, numbers, make, *, device):
            return super().fetch(facts, numbers, lambda missing: dies(missing, make(missing)), device=device)

    with open_loader(tiny_shards) as loader:
        with pytest.raises(KeyboardInterrupt):
            embed_rows(loader, model, rows, store=Dying(path))
        (part,) = path.glob("*/part-*")
        shutil.copytree(part, part.with_name("part-000001.tmp"))
        (part.with_name("part-000001.tmp") / "tokens" / "zarr.json").unlink()
        store = Counting(path)
        ours = embed_rows(loader, model, rows, store=store)
        assert store.made == len(rows) - 8
        assert torch.equal(ours.tokens, embed_rows(loader, model, rows).tokens)
        assert not list(path.glob("*/*.tmp"))
        assert dict(zarr.open_group(part.parent, mode="r").attrs)["precision"] == "fp32"
        (chunk,) = (part / "tokens" / "c").glob("*/*/*")
        chunk.unlink()  # zarr alone would read zeros
        with pytest.raises(FsarError, match=r"tokens is damaged .*; delete .*part-000000"):
            embed_rows(loader, model, rows, store=store)


def test_a_folder_of_other_things_is_no_store(tiny_path: Path, tmp_path: Path) -> None:
    (tmp_path / "video.mp4").touch()
    for path in (tmp_path, tmp_path / "video.mp4", tiny_path / "index.zarr"):
        with pytest.raises(ConfigError, match="no store of embeddings"):
            EmbeddingStore(path)


@given(st.integers(0, 2**40), st.integers(1, 9), st.booleans(), st.integers(0, 2**32))
def test_views_of_an_episode_are_a_function_of_seed_and_number(n: int, views: int, flips: bool, seed: int) -> None:
    counts = (5, 30, 3)
    support, query, unlabelled = choose_views(n, counts, views, seed=seed, flips=flips)
    again = choose_views(n, counts, views, seed=seed, flips=flips)
    assert (len(support), len(query), len(unlabelled)) == counts
    assert all(np.array_equal(*pair) for pair in zip((support, query, unlabelled), again, strict=True))
    assert all(0 <= chosen.min() <= chosen.max() < views for chosen in (support, query, unlabelled))
    assert not flips or not (support % 2).any()


def test_views_differ_among_themselves_and_mirror_as_the_rules_do(tiny_shards: ShardSet) -> None:
    rows = tiny_shards.split_rows("train")[:5]
    with open_loader(tiny_shards, replace(RANDOM, query_flip=True, query_jitter=True), views=4) as loader:
        clips = draw_views(loader.stream, number_views(rows, 4))
    reads, views = clips.reads, clips.views
    assert [view.flip for view in views] == [False, True] * 10
    assert all(view.jitter is None for view in views)
    assert len(reads) == 1
    windows = {(view.box, *reads[0].frames[list(view.indices)].tolist()) for view in views}
    assert len(windows) > 15


@pytest.mark.parametrize("views", [-1, 2])
def test_views_where_all_are_alike_are_refused(tiny_shards: ShardSet, views: int) -> None:
    with pytest.raises(ConfigError, match="views = "):
        open_loader(tiny_shards, views=views)
