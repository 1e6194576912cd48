from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
from fake_shards import TRAIN, FakeShards
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.episodes.clip_views import View, crop_corner
from pipelines.episodes.rules import EpisodeRules
from pipelines.episodes.stream import EpisodePlan, EpisodeStream
from shards_spec.errors import ConfigError, ShardError


def as_data(plan: EpisodePlan) -> str:
    return repr(dataclasses.asdict(plan))


def frames_of(plan: EpisodePlan, view: View) -> list[int]:
    return plan.reads[view.reads].frames[list(view.indices)].tolist()


@given(
    way=st.integers(1, 3),
    shot=st.integers(1, 3),
    queries=st.integers(1, 3),
    split=st.sampled_from(["train", "test", "all"]),
    grouped=st.booleans(),
    rule=st.sampled_from(["segment", "kinetics", "still"]),
    n=st.integers(0, 2**63),
    seed=st.integers(0, 2**63),
)
@settings(max_examples=150, deadline=None)
def test_rules_of_an_episode(way, shot, queries, split, grouped, rule, n, seed):
    groups = [row // 3 for row in range(72)] if grouped else None
    shards = FakeShards(12, groups=groups)
    shards.frames[::7] = 5
    rules = dataclasses.replace(TRAIN, way=way, shot=shot, queries=queries, frame_rule=rule)
    plan = EpisodeStream(shards, split, rules, seed=seed).plan(n)

    assert as_data(plan) == as_data(EpisodeStream(shards, split, rules, seed=seed).plan(n))
    assert len(set(plan.class_ids.tolist())) == way
    names = {shards.dataset.classes[label] for label in plan.class_ids}
    assert names <= set(shards.dataset.splits[split].classes)
    assert set(plan.support_rows) | set(plan.query_rows) <= set(shards.split_rows(split))
    assert len(set(plan.support_rows) | set(plan.query_rows)) == way * (shot + queries)
    if grouped:
        assert not set(shards.groups[plan.support_rows]) & set(shards.groups[plan.query_rows])
    assert (shards.labels[plan.support_rows] == plan.class_ids.repeat(shot)).all()
    assert (shards.labels[plan.query_rows] == plan.class_ids[plan.query_labels]).all()
    assert np.bincount(plan.query_labels, minlength=way).tolist() == [queries] * way
    for row, view in zip([*plan.support_rows, *plan.query_rows], plan.support + plan.query, strict=True):
        reads, frames = plan.reads[view.reads], frames_of(plan, view)
        assert (reads.rows[list(view.indices)] == row).all()
        assert len(frames) == rules.frames
        assert frames == sorted(frames)
        assert frames[0] >= 0
        assert frames[-1] < shards.frames[row]
    for reads in plan.reads:
        pixels = list(zip(reads.rows.tolist(), reads.frames.tolist(), strict=True))
        assert len(set(pixels)) == len(pixels)  # each read once
        assert reads.tops.min() >= 0
        assert (reads.tops + reads.size[0]).max() <= 64
        assert reads.lefts.min() >= 0
        assert (reads.lefts + reads.size[1]).max() <= 64


def test_episodes_do_not_depend_on_each_other():
    stream = EpisodeStream(FakeShards(), "all", TRAIN, seed=4)
    forwards = [as_data(stream.plan(n)) for n in range(6)]
    assert forwards == [as_data(stream.plan(n)) for n in reversed(range(6))][::-1]
    assert len(set(forwards)) == 6
    assert as_data(EpisodeStream(FakeShards(), "all", TRAIN, seed=5).plan(0)) != forwards[0]


def test_a_stored_size_equal_to_resize_reads_the_crop_itself():
    plan = EpisodeStream(FakeShards(), "all", TRAIN, seed=0).plan(0)
    (reads,) = plan.reads
    assert reads.size == (48, 48)
    assert all(view.box is None for view in plan.support + plan.query)


def test_other_stored_sizes_are_read_whole_one_reads_a_size():
    shards = FakeShards()
    shards.rgb.sizes[::2] = (50, 70)
    shards.rgb.sizes[1::4] = (64, 80)
    plan = EpisodeStream(shards, "all", TRAIN, seed=0).plan(0)
    assert {reads.size for reads in plan.reads} == {(48, 48), (50, 70), (64, 80)}
    for view in plan.support + plan.query:
        reads = plan.reads[view.reads]
        whole = reads.size != (48, 48)
        assert (view.box is not None) == whole
        if whole:
            assert not reads.tops.any()
            assert not reads.lefts.any()


def test_the_window_of_a_flipped_clip_is_the_mirrored_box():
    whole, square = FakeShards(size=(50, 70)), FakeShards(size=(64, 64))
    boxes, windows = (EpisodeStream(shards, "all", TRAIN, seed=0).plan(1) for shards in (whole, square))
    (reads,) = windows.reads
    assert {view.flip for view in windows.query} == {True, False}
    for boxed, view in zip(boxes.support + boxes.query, windows.support + windows.query, strict=True):
        top, left = boxed.box
        assert (boxed.flip, boxed.jitter) == (view.flip, view.jitter)
        assert reads.tops[view.indices[0]] == top
        assert reads.lefts[view.indices[0]] == (64 - 48 - left if view.flip else left)


def test_evaluation_takes_the_centre_and_nothing_else():
    rules = EpisodeRules(way=2, resize=64, crop=48)
    plan = EpisodeStream(FakeShards(frames=np.full(48, 80)), "all", rules, seed=0).plan(0)
    (reads,) = plan.reads
    assert set(reads.tops) == set(reads.lefts) == {8}
    assert not any(view.flip or view.jitter for view in plan.support + plan.query)
    assert frames_of(plan, plan.query[0]) == [5, 15, 25, 35, 45, 55, 65, 75]


@given(
    frames=st.lists(st.integers(8, 40), min_size=48, max_size=48),
    size=st.tuples(st.integers(32, 80), st.integers(32, 80)),
    unlabelled=st.integers(0, 2),
)
@settings(max_examples=30, deadline=None)
def test_planning_clips_together_gives_what_planning_each_gives(frames, size, unlabelled):
    rules = EpisodeRules(
        way=2, shot=2, queries=2, resize=size[0], resize_width=size[1], crop=32, unlabelled_per_class=unlabelled
    )
    usual = FakeShards(frames=np.array(frames), size=size)
    odd = FakeShards(frames=np.array([3, *frames[1:]]), size=size)  # its short video has every clip planned by itself
    plans = [EpisodeStream(shards, "all", rules, seed=0) for shards in (usual, odd)]
    for n in range(5):
        together, alone = (stream.plan(n) for stream in plans)
        if 0 not in {*together.support_rows, *together.query_rows, *together.unlabelled_rows}:
            assert as_data(together) == as_data(alone)


def test_support_is_neither_flipped_nor_jittered_and_queries_are():
    stream = EpisodeStream(FakeShards(), "all", TRAIN, seed=0)
    plans = [stream.plan(n) for n in range(40)]
    assert not any(view.flip or view.jitter for plan in plans for view in plan.support)
    assert all(view.jitter for plan in plans for view in plan.query)
    flips = [view.flip for plan in plans for view in plan.query]
    greys = [view.jitter.grey for plan in plans for view in plan.query if view.jitter]
    assert 0.4 < np.mean(flips) < 0.6
    assert 0.2 < np.mean(greys) < 0.4


def test_still_and_short_videos_read_a_frame_once():
    rules = EpisodeRules(way=2, resize=64, crop=48, frame_rule="still")
    plan = EpisodeStream(FakeShards(), "all", rules, seed=0).plan(0)
    assert len(plan.reads[0]) == 4
    shards = FakeShards(frames=np.full(48, 3))
    stream = EpisodeStream(shards, "all", EpisodeRules(way=2, resize=64, crop=48), seed=0)
    plan = stream.plan(0)
    assert len(plan.reads[0]) == 12
    assert frames_of(plan, plan.support[0]) == [0, 0, 0, 1, 1, 1, 2, 2]
    assert stream.short_videos == 48


def test_crop_corner_is_drawn_as_in_the_reference():
    golden = np.load(Path(__file__).parents[1] / "golden" / "molo" / "transforms.npz")
    top, left = crop_corner(random.Random(21), 256 - 224, 256 - 224)
    assert [left, top] == golden["train_crop_xy"].tolist()


def test_random_crops_reach_every_corner_below_the_room():
    stream = EpisodeStream(FakeShards(), "all", TRAIN, seed=0)
    lefts = {int(left) for n in range(40) for left in stream.plan(n).reads[0].lefts}
    assert min(lefts) == 0
    assert max(lefts) in (15, 16)  # 16 only for flipped clips, whose window is mirrored


def test_failed_videos_are_never_drawn():
    shards = FakeShards(4)
    shards.frames[::4] = 0
    stream = EpisodeStream(shards, "all", EpisodeRules(way=2, shot=2, resize=64, crop=48), seed=0)
    rows = {int(row) for n in range(50) for row in [*stream.plan(n).support_rows, *stream.plan(n).query_rows]}
    assert not rows & set(range(0, 24, 4))


def test_a_class_with_too_few_videos_is_refused_by_name():
    with pytest.raises(ConfigError, match=r'class "class1" of split "all" has 3 videos.* needs 5 \(2 support'):
        EpisodeStream(FakeShards([8, 3, 8]), "all", TRAIN, seed=0)
    with pytest.raises(ConfigError, match=r'class "class1" .* has 0 videos'):
        EpisodeStream(FakeShards([8, 0, 8]), "all", TRAIN, seed=0)


def test_a_class_whose_groups_cannot_be_divided_is_refused_by_name():
    shards = FakeShards([8, 8, 8], groups=[0, 1] * 4 + [2] * 7 + [3] + [0, 1] * 4)
    with pytest.raises(ConfigError, match=r'class "class1" .* has 8 videos in 2 groups .* groups = any'):
        EpisodeStream(shards, "all", TRAIN, seed=0)
    EpisodeStream(shards, "all", dataclasses.replace(TRAIN, groups="any"), seed=0).plan(0)


def test_a_split_with_too_few_classes_is_refused():
    with pytest.raises(ConfigError, match='split "test" has 3 classes and a 5-way episode needs 5'):
        EpisodeStream(FakeShards(), "test", EpisodeRules(), seed=0)


def test_unknown_split_and_bad_seed_are_refused():
    with pytest.raises(ShardError, match="tset"):
        EpisodeStream(FakeShards(), "tset", TRAIN, seed=0)
    with pytest.raises(ConfigError, match="seed"):
        EpisodeStream(FakeShards(), "test", TRAIN, seed=-1)


def test_kinetics_needs_frame_rates():
    rules = dataclasses.replace(TRAIN, frame_rule="kinetics")
    with pytest.raises(ShardError, match=r'needs the frame rate .* 48 videos .*"videos/0.avi"'):
        EpisodeStream(FakeShards(fps=0), "all", rules, seed=0)
    EpisodeStream(FakeShards(fps=0), "all", TRAIN, seed=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"way": 0}, "way is 0"),
        ({"frames": 0}, "frames is 0"),
        ({"crop": 300}, "crop 300 is larger than resize 256"),
        ({"frame_rule": "segmnt"}, 'did you mean "segment"'),
        ({"groups": "disjont"}, 'did you mean "disjoint"'),
    ],
)
def test_impossible_rules_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        EpisodeRules(**change)


def test_classes_with_too_few_videos_are_left_out_where_asked():
    shards = FakeShards([8, 3, 8, 8, 8, 8], groups=[*range(8), *range(8, 11), *[11] * 8, *range(12, 36)])
    with pytest.raises(ConfigError, match=r'class "class1".*small_classes = drop'):
        EpisodeStream(shards, "all", TRAIN, seed=0)
    stream = EpisodeStream(shards, "all", dataclasses.replace(TRAIN, small_classes="drop"), seed=0)
    assert stream.dropped == ("class1", "class2")  # too few videos; all of one group
    assert not {1, 2} & {int(label) for n in range(20) for label in stream.plan(n).class_ids}
    with pytest.raises(ConfigError, match="left out, having too few videos: class1, class2"):
        EpisodeStream(shards, "train", dataclasses.replace(TRAIN, small_classes="drop"), seed=0)


def test_a_crop_of_wide_frames_reaches_both_ends():
    shards = FakeShards()
    shards.rgb.sizes[:] = (64, 80)
    rules = EpisodeRules(
        way=2, queries=2, frames=2, resize=64, resize_width=80, crop=48, random_crop=True, groups="any"
    )
    plans = [EpisodeStream(shards, "train", rules, seed=0).plan(n) for n in range(60)]
    assert all(plan.reads[0].size == (48, 48) and len(plan.reads) == 1 for plan in plans)
    tops, lefts = (np.concatenate([getattr(plan.reads[0], edge) for plan in plans]) for edge in ("tops", "lefts"))
    assert (tops.min(), tops.max(), lefts.min(), lefts.max()) == (0, 15, 0, 31)  # the last place is never drawn
    centre = EpisodeStream(shards, "train", dataclasses.replace(rules, random_crop=False), seed=0).plan(0).reads[0]
    assert (set(centre.tops.tolist()), set(centre.lefts.tolist())) == ({8}, {16})
