from __future__ import annotations

import dataclasses
import threading
import time

import numpy as np
import pytest
import torch
from fake_shards import FakeShards
from torch.utils.data import DataLoader

from fsar import EpisodeDataset, EpisodeLoader
from pipelines.augment.clips import render
from pipelines.decoding.dali import dali_is_installed
from pipelines.decoding.jpeg import PortableExecutor
from pipelines.episodes.rules import EpisodeRules
from pipelines.episodes.stream import EpisodeStream
from pipelines.loader import Loader
from pipelines.reads import Reads
from shards_spec.errors import ConfigError, ShardError

RULES = EpisodeRules(
    way=3, shot=2, queries=2, resize=64, crop=48, frames=4, random_frames=True, random_crop=True, query_flip=True
)
LOOK = {"mean": (0.5, 0.45, 0.4), "std": (0.225, 0.25, 0.225)}


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
    with Loader(executor, device="cpu", prefetch=prefetch) as loader:
        yield from loader.frames(stream, start, stop, step=step)


def episode_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("fsar-episodes")]


def test_frames_come_with_their_plan(stream):
    for plan, (frames,), _ in load(stream, ConstantExecutor(), 0, 5):
        assert frames.shape == (len(plan.reads[0]), 48, 48, 3)
        assert frames[:, 0, 0, 0].tolist() == plan.reads[0].rows.tolist()


@pytest.mark.parametrize("width", [0, 80])
@pytest.mark.parametrize("sizes", [[(64, 64)], [(64, 80), (50, 70), (80, 60)]])
def test_an_episode_is_the_rendered_plan(sizes, width):
    shards = FakeShards()
    for i, size in enumerate(sizes):
        shards.rgb.sizes[i :: len(sizes)] = size
    rules = dataclasses.replace(RULES, query_jitter=True, resize_width=width)
    with EpisodeLoader(shards, "test", rules, seed=1, executor="portable", threads=2, **LOOK) as loader:
        ((plan, episode, _),) = loader.planned(3, 4)
    executor = PortableExecutor(shards, threads=2)
    frames = [executor.decode(reads) for reads in plan.reads]
    clips = render(frames, plan.support + plan.query, crop=48, resize=rules.resized, **LOOK)
    assert torch.equal(torch.cat([episode.support.flatten(0, 1), episode.query]), clips)
    assert episode.support.shape == (3, 2, 4, 3, 48, 48)
    assert episode.class_ids.tolist() == plan.class_ids.tolist()
    assert episode.base_ids.tolist() == [-1, -1, -1]  # novel classes
    assert shards.labels[plan.query_rows].tolist() == plan.class_ids[plan.query_labels].tolist()
    executor.close()


@pytest.mark.parametrize("prefetch", [1, 2, 5])
def test_order_resuming_and_ranks(stream, prefetch):
    executor = ConstantExecutor()
    whole = {plan.n: frames for plan, (frames,), _ in load(stream, executor, 0, 9, prefetch=prefetch)}
    assert list(whole) == list(range(9))
    later = list(load(stream, executor, 4, 9, prefetch=prefetch))
    assert [plan.n for plan, _, _ in later] == [4, 5, 6, 7, 8]
    assert all(torch.equal(frames, whole[plan.n]) for plan, (frames,), _ in later)
    assert [plan.n for plan, _, _ in load(stream, executor, 1, 9, step=3)] == [1, 4, 7]
    assert list(load(stream, executor, 5, 5)) == []


def test_the_wait_is_measured_and_hidden_behind_the_model(stream):
    with Loader(ConstantExecutor(0.1), device="cpu") as loader:
        waits = []
        for _, _, wait in loader.frames(stream, 0, 4):
            waits.append(wait)
            time.sleep(0.4)  # the model computes for longer than an episode takes to decode
        assert waits[0] > 0.08
        assert max(waits[1:]) < 0.08
        assert loader.total_wait == pytest.approx(sum(waits))


def test_no_more_than_prefetch_episodes_are_prepared(stream):
    executor = ConstantExecutor()
    with Loader(executor, device="cpu", prefetch=3) as loader:
        batches = loader.frames(stream, 0, 100)
        next(batches)
        time.sleep(0.2)
        assert executor.calls == 4


def test_an_error_of_the_background_reaches_the_consumer(stream):
    executor = ConstantExecutor()
    executor.fail_at = 3
    batches = load(stream, executor, 0, 10, prefetch=1)
    assert [next(batches)[0].n, next(batches)[0].n] == [0, 1]
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
    with Loader(executor, device="cpu", prefetch=4) as loader:
        for plan, _, _ in loader.frames(stream, 0, 1000):
            if plan.n == 2:
                break
        assert episode_threads()
    assert not episode_threads()
    calls = executor.calls
    time.sleep(0.1)
    assert executor.calls == calls <= 8


def test_prefetch_under_one_is_refused():
    with pytest.raises(ConfigError, match="prefetch is 0"):
        Loader(ConstantExecutor(), device="cpu", prefetch=0)


def test_real_shards_give_the_same_episodes_through_every_executor(tiny_shards):
    rules = dataclasses.replace(RULES, queries=1, crop=56, query_jitter=True)
    made = []
    for name in ["portable", "dali"] if dali_is_installed() else ["portable", "portable"]:
        with EpisodeLoader(tiny_shards, "train", rules, seed=2, executor=name, threads=2) as loader:
            made.append(list(loader.planned(0, 3)))
    for (plan, one, _), (_, other, _) in zip(*made, strict=True):
        assert torch.equal(one.support, other.support)
        assert torch.equal(one.query, other.query)
        assert not sources(tiny_shards, plan.support_rows) & sources(tiny_shards, plan.query_rows)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataloader_delivers_the_same_episodes_in_order(tiny_path, tiny_shards, workers):
    rules = dataclasses.replace(RULES, queries=1, streams="both")
    with EpisodeLoader(tiny_shards, "train", rules, seed=3) as loader:
        wanted = list(loader.episodes(1, 6))
    dataset = EpisodeDataset(tiny_path, "train", rules, start=1, stop=6, options={"seed": 3})
    found = list(DataLoader(dataset, batch_size=None, num_workers=workers))
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.query, other.query)
        assert torch.equal(one.query_motion, other.query_motion)
        assert torch.equal(one.base_ids, other.base_ids)


def sources(shards, rows) -> set[tuple[int, int]]:
    """Class and group of each video: a group number says nothing across classes."""
    return set(zip(shards.labels[rows].tolist(), shards.groups[rows].tolist(), strict=True))


def test_memory_is_used_again_only_when_nobody_holds_it(tiny_shards):
    with EpisodeLoader(tiny_shards, "train", dataclasses.replace(RULES, queries=1), prefetch=1) as loader:
        episodes = loader.episodes()
        held = [next(episodes) for _ in range(7)]  # more than are kept
        copies = [(episode.support.clone(), episode.query.clone()) for episode in held]
        part = held[2].query[0, :, 0].numpy()  # this view keeps its episode's memory
        wanted, place = part.copy(), held[2].support.data_ptr()
        for episode, (support, query) in zip(held, copies, strict=True):
            assert torch.equal(episode.support, support)
            assert torch.equal(episode.query, query)
        places = {episode.support.data_ptr() for episode in held}
        del held, episode
        later = [next(episodes).support.data_ptr() for _ in range(8)]
        assert (part == wanted).all()
        assert place not in later
        assert set(later) & places
