"""Motion of clips: which fields are read, and the exact rules of their maps."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fsar import EpisodeLoader, EpisodeRules
from pipelines.augment.motion import WHOLE, mirrored, motion_maps
from pipelines.draw import PhiloxDraw
from pipelines.episodes.motion import Cut, MotionView, draw_fields, spread_fields
from pipelines.episodes.stream import EpisodeStream
from shards_spec import ShardSet
from shards_spec.errors import ConfigError, ShardError

RULES = EpisodeRules(way=3, queries=2, frames=4, resize=72, crop=56, groups="any", streams="both")
FIELDS = np.random.default_rng(0).integers(60, 190, (6, 2 * 64, 64, 1)).astype(np.uint8)


def maps_of(codes: np.ndarray, cut: Cut = Cut(WHOLE), *, camera: str = "median", weights: np.ndarray | None = None):  # noqa: B008 -- never changed
    """[T, 2, 32, 32] of one clip whose fields are codes [n, 2h, w, 1]; three segments of two fields each."""
    rows = np.kron(np.eye(3), np.ones(2)).astype(np.float32) if weights is None else weights
    view = MotionView(0, tuple(range(len(codes))), rows, cut)
    return motion_maps([torch.from_numpy(codes)], [view], camera=camera, channels=2)[0]


@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 6), st.integers(0, 9))
def test_weights_of_a_segment_sum_to_its_length(members: int, segments: int, fields: int, seed: int) -> None:
    for positions, weights in (
        spread_fields(members, segments, fields),
        draw_fields(PhiloxDraw(seed, 1), members, segments, fields),
    ):
        assert np.allclose(weights.sum(axis=1), members / segments, atol=1e-5)
        assert (np.diff(positions) > 0).all()
        assert 0 <= positions[0] <= positions[-1] < members
        edges = np.arange(segments + 1) * members / segments
        for row, (begin, end) in zip(weights, pairwise(edges), strict=True):
            read = positions[row > 0]
            assert (read + 1 > begin - 1e-9).all()
            assert (read < end + 1e-9).all()


def test_all_fields_are_a_sum_over_the_whole_video() -> None:
    _, weights = spread_fields(10, 4, 0)
    assert np.allclose(weights.sum(axis=0), 1)
    assert weights[0].tolist() == [1, 1, 0.5, 0, 0, 0, 0, 0, 0, 0]


def test_a_mirrored_field_gives_the_mirrored_map() -> None:
    codes = FIELDS.copy()[:, :, ::-1]
    codes[:, :64] = 256 - codes[:, :64].astype(int)  # u, above v
    assert torch.allclose(maps_of(np.ascontiguousarray(codes)), mirrored(maps_of(FIELDS)), atol=1e-4)
    assert torch.equal(maps_of(FIELDS, Cut(WHOLE, flip=True)), mirrored(maps_of(FIELDS)))


def test_a_constant_motion_is_the_cameras() -> None:
    moved = FIELDS.copy()
    moved[:, :64] += 20
    assert torch.allclose(maps_of(moved), maps_of(FIELDS), atol=1e-4)
    assert not torch.allclose(maps_of(moved, camera="none"), maps_of(FIELDS, camera="none"), atol=1)


@pytest.mark.parametrize("camera", ["median", "none"])
def test_a_crop_on_borders_of_cells_is_a_part_of_the_whole(camera: str) -> None:
    whole, half = maps_of(FIELDS, camera=camera), maps_of(FIELDS, Cut((0.25, 0.5, 0.5, 0.5)), camera=camera)
    pooled = torch.nn.functional.avg_pool2d(half, 2)  # its cells are half as large
    assert torch.allclose(pooled, whole[..., 8:24, 16:32], atol=1e-3)


def test_cells_that_cut_pixels_keep_the_mean() -> None:
    one = maps_of(FIELDS, Cut((0.1, 0.2, 0.61, 0.47)), camera="none")
    field = torch.from_numpy(FIELDS[:, :64, :, 0].astype(np.float32)) - 128
    rows, columns = (0.1 * 64, 0.71 * 64), (0.2 * 64, 0.67 * 64)
    weight = torch.outer(*(overlap(*span) for span in (rows, columns)))
    mean = (field * weight).sum(dim=(1, 2)) / weight.sum()
    assert torch.allclose(one[:, 0].mean(dim=(1, 2)), mean[::2] + mean[1::2], atol=1e-3)


def overlap(first: float, last: float) -> torch.Tensor:
    """Share of each of 64 places within a span."""
    place = torch.arange(64.0)
    return (torch.clamp(place + 1, max=last) - torch.clamp(place, min=first)).clamp(min=0)


def test_no_field_is_no_motion() -> None:
    view = MotionView(0, (), np.zeros((4, 0), np.float32), Cut(WHOLE))
    assert not motion_maps([], [view], camera="median", channels=2).any()


# Episodes


def open_loader(shards: ShardSet, rules: EpisodeRules, executor: str = "portable", **options) -> EpisodeLoader:
    return EpisodeLoader(shards, "train", rules, seed=3, executor=executor, threads=1, prefetch=1, **options)


@pytest.mark.parametrize("series", ["flow1", "diff1"])
def test_both_executors_give_one_motion(tiny_shards: ShardSet, series: str) -> None:
    pytest.importorskip("nvidia.dali")
    rules = replace(RULES, motion_series=series, random_frames=True, random_crop=True, query_flip=True)
    found = []
    for executor in ("portable", "dali"):
        with open_loader(tiny_shards, rules, executor) as loader:
            found.append(next(iter(loader)))
    channels = {"flow1": 2, "diff1": 3}[series]
    assert found[0].support_motion.shape == (3, 1, 4, channels, 32, 32)
    assert found[0].query_motion.shape == (6, 4, channels, 32, 32)
    assert found[0].support_motion.any()
    for name in ("support", "query", "support_motion", "query_motion"):
        assert torch.equal(*(getattr(episode, name) for episode in found))


def test_motion_alone_reads_no_frame_and_is_the_same(tiny_shards: ShardSet) -> None:
    rules = replace(RULES, random_frames=True, random_crop=True, query_flip=True)
    with open_loader(tiny_shards, rules) as loader, open_loader(tiny_shards, replace(rules, streams="motion")) as other:
        both, alone = next(iter(loader)), next(iter(other))
    assert alone.support is None
    assert alone.query is None
    assert torch.equal(both.query_motion, alone.query_motion)
    assert (alone.way, alone.shot) == (3, 1)


def test_frames_are_the_same_with_and_without_motion(tiny_shards: ShardSet) -> None:
    rules = replace(RULES, random_frames=True, random_crop=True, query_flip=True, query_jitter=True)
    one, other = (
        EpisodeStream(tiny_shards, "train", replace(rules, streams=streams), seed=1).plan(7)
        for streams in ("frames", "both")
    )
    assert one.views == other.views
    assert not one.motion
    assert len(other.motion) == len(other.views)


def test_motion_is_of_the_part_that_frames_show(tiny_shards: ShardSet) -> None:
    rules = replace(RULES, resize=64, crop=40, random_crop=True, query_flip=True)  # frames are stored in 64 x 64
    plans = [EpisodeStream(tiny_shards, "train", rules, seed=1).plan(n) for n in range(4)]
    shown = [
        (plan.reads[view.reads], view, motion.cut)
        for plan in plans
        for view, motion in zip(plan.views, plan.motion, strict=True)
    ]
    assert len({cut.box for _, _, cut in shown}) > 12
    for reads, view, cut in shown:
        first = view.indices[0]
        assert cut.box == (reads.tops[first] / 64, reads.lefts[first] / 64, 40 / 64, 40 / 64)
        assert cut.flip == view.flip


def test_the_same_part_of_a_frame_at_any_size_has_the_same_motion(tiny_shards: ShardSet) -> None:
    found = []
    for resize, crop in ((72, 56), (144, 112), (72, 72)):
        with open_loader(tiny_shards, replace(RULES, streams="motion", resize=resize, crop=crop)) as loader:
            found.append(next(iter(loader)).query_motion)
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2], atol=0.01)  # another part


def test_backwards_is_the_order_and_the_sign_reversed(tiny_shards: ShardSet) -> None:
    stream = EpisodeStream(tiny_shards, "train", replace(RULES, query_reversal=True), seed=1)
    still = EpisodeStream(tiny_shards, "train", RULES, seed=1)
    pairs = [pair for n in range(8) for pair in zip(stream.plan(n).motion, still.plan(n).motion, strict=True)]
    turned = [(one, other) for one, other in pairs if one.cut.reverse]
    assert len(pairs) > len(turned) > 0
    assert all(np.array_equal(one.weights, -other.weights[::-1]) for one, other in turned)


def test_a_series_that_is_not_there_is_named_with_its_command(tiny_shards: ShardSet) -> None:
    with pytest.raises(ShardError, match=r'holds no series "flow8g2".*--motion flow8g2'):
        open_loader(tiny_shards, replace(RULES, motion_series="flow8g2"))
    with pytest.raises(ConfigError, match='"flwo" names no motion'):
        replace(RULES, motion_series="flwo")
