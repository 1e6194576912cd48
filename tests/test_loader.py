from __future__ import annotations

import dataclasses
import threading
import time

import numpy as np
import pytest
import torch
from fake_shards import FakeShards

from pipelines.augment import render
from pipelines.dali import dali_is_installed
from pipelines.executors import create_executor
from pipelines.loader import EpisodeLoader
from pipelines.plan import EpisodeRules, EpisodeStream, Reads
from pipelines.portable import PortableExecutor
from shards_spec.errors import ConfigError, ShardError

RULES = EpisodeRules(
    way=3, shot=2, queries=2, resize=64, crop=48, frames=4, random_frames=True, random_crop=True, query_flip=True
)
LOOK = {"mean": (0.45, 0.45, 0.45), "std": (0.225, 0.225, 0.225)}


class ConstantExecutor:
    """Frames whose every pixel is their video's row, after a delay."""

    def __init__(self, delay: float = 0.0) -> None:
        self.delay, self.calls, self.fail_at = delay, 0, -1

    def decode(self, reads: Reads) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.fail_at:
            raise ShardError("the disk is gone")
        time.sleep(self.delay)
        rows = torch.from_numpy(reads.rows.astype(np.uint8))
        return rows[:, None, None, None].expand(len(reads), *reads.size, 3).contiguous()

    def close(self) -> None:
        pass


@pytest.fixture
def stream():
    return EpisodeStream(FakeShards(), "all", RULES, seed=0)


def load(stream, executor, start, stop, *, step=1, prefetch=2):
    with EpisodeLoader(stream, executor, device="cpu", prefetch=prefetch, **LOOK) as loader:
        yield from loader.batches(start, stop, step=step)


def episode_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("fsar-episodes")]


def test_clips_come_with_their_videos_and_labels(stream):
    for batch in load(stream, ConstantExecutor(), 0, 5):
        assert batch.support.shape == (3, 2, 4, 3, 48, 48)
        assert batch.query.shape == (6, 4, 3, 48, 48)
        support = (batch.support[..., 0, 0, 0, 0].flatten() * 0.225 + 0.45) * 255
        query = (batch.query[:, 0, 0, 0, 0] * 0.225 + 0.45) * 255
        assert support.round().int().tolist() == batch.plan.support_rows.tolist()
        assert query.round().int().tolist() == batch.plan.query_rows.tolist()


@pytest.mark.parametrize("sizes", [[(64, 64)], [(64, 64), (50, 70), (80, 60)]])
def test_a_batch_is_the_rendered_plan(sizes):
    shards = FakeShards()
    for i, size in enumerate(sizes):
        shards.rgb.sizes[i :: len(sizes)] = size
    rules = dataclasses.replace(RULES, query_jitter=True)
    stream, executor = EpisodeStream(shards, "all", rules, seed=1), PortableExecutor(shards, threads=2)
    (batch,) = load(stream, executor, 3, 4)
    frames = [executor.decode(reads) for reads in stream.plan(3).reads]
    views = batch.plan.support + batch.plan.query
    clips = render(frames, views, crop=48, resize=64, **LOOK)
    assert torch.equal(torch.cat([batch.support.flatten(0, 1), batch.query]), clips)
    executor.close()


@pytest.mark.parametrize("prefetch", [1, 2, 5])
def test_order_resuming_and_ranks(stream, prefetch):
    executor = ConstantExecutor()
    whole = {batch.plan.n: batch.query for batch in load(stream, executor, 0, 9, prefetch=prefetch)}
    assert list(whole) == list(range(9))
    later = list(load(stream, executor, 4, 9, prefetch=prefetch))
    assert [batch.plan.n for batch in later] == [4, 5, 6, 7, 8]
    assert all(torch.equal(batch.query, whole[batch.plan.n]) for batch in later)
    assert [batch.plan.n for batch in load(stream, executor, 1, 9, step=3)] == [1, 4, 7]
    assert list(load(stream, executor, 5, 5)) == []


def test_the_wait_is_measured_and_hidden_behind_the_model(stream):
    with EpisodeLoader(stream, ConstantExecutor(0.1), device="cpu", **LOOK) as loader:
        waits = []
        for batch in loader.batches(0, 4):
            waits.append(batch.wait)
            time.sleep(0.4)  # the model computes for longer than an episode takes to decode
        assert waits[0] > 0.08
        assert max(waits[1:]) < 0.08
        assert loader.total_wait == pytest.approx(sum(waits))


def test_no_more_than_prefetch_episodes_are_prepared(stream):
    executor = ConstantExecutor()
    with EpisodeLoader(stream, executor, device="cpu", prefetch=3, **LOOK) as loader:
        batches = loader.batches(0, 100)
        next(batches)
        time.sleep(0.2)
        assert executor.calls == 4


def test_an_error_of_the_background_reaches_the_consumer(stream):
    executor = ConstantExecutor()
    executor.fail_at = 3
    batches = load(stream, executor, 0, 10, prefetch=1)
    assert [next(batches).plan.n, next(batches).plan.n] == [0, 1]
    with pytest.raises(ShardError, match="the disk is gone"):
        next(batches)
    assert not episode_threads()


def test_a_damaged_frame_stops_the_episodes():
    shards = FakeShards()
    shards.rgb.damaged.update(range(48))
    executor = PortableExecutor(shards, threads=2)
    with pytest.raises(ShardError, match="run fsar-shards verify"):
        next(load(EpisodeStream(shards, "all", RULES, seed=0), executor, 0, 3))
    executor.close()


def test_closing_early_leaves_no_thread_behind(stream):
    executor = ConstantExecutor(0.02)
    with EpisodeLoader(stream, executor, device="cpu", prefetch=4, **LOOK) as loader:
        for batch in loader.batches(0, 1000):
            if batch.plan.n == 2:
                break
        assert episode_threads()
    assert not episode_threads()
    calls = executor.calls
    time.sleep(0.1)
    assert executor.calls == calls <= 8


def test_prefetch_under_one_is_refused(stream):
    with pytest.raises(ConfigError, match="prefetch is 0"):
        EpisodeLoader(stream, ConstantExecutor(), device="cpu", prefetch=0, **LOOK)


def test_real_shards_give_the_same_episodes_through_every_executor(tiny_shards):
    rules = dataclasses.replace(RULES, queries=1, crop=56, query_jitter=True)
    stream = EpisodeStream(tiny_shards, "train", rules, seed=2)
    batches = []
    for name in ["portable", "dali"] if dali_is_installed() else ["portable", "portable"]:
        executor = create_executor(name, tiny_shards, threads=2)
        batches.append(list(load(stream, executor, 0, 3)))
        executor.close()
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one.support, other.support)
        assert torch.equal(one.query, other.query)
        assert not sources(tiny_shards, one.plan.support_rows) & sources(tiny_shards, one.plan.query_rows)


def sources(shards, rows) -> set[tuple[int, int]]:
    """Class and group of each video: a group number says nothing across classes."""
    return set(zip(shards.labels[rows].tolist(), shards.groups[rows].tolist(), strict=True))
