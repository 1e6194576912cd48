from __future__ import annotations

import itertools
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from fake_shards import FakeShards
from hypothesis import given
from hypothesis import strategies as st

from pipelines.clips.flow import FlowPairRules
from pipelines.clips.stream import ClipStream
from pipelines.clips.windows import PairRules, WindowRules
from pipelines.draw import PhiloxDraw
from shards_spec.errors import ConfigError, ShardError
from shards_spec.series import Series

WINDOWS = WindowRules(frames=4, crop=16)  # windows of 8 frames
FLOW = FlowPairRules(frames=4, stride=2, crop=16, flow_series="flow1", motion_filter=False)


class Scripted:
    """Gives these whole numbers, each of which must be one that was asked for."""

    def __init__(self, *numbers: int) -> None:
        self._numbers = list(numbers)

    def randint(self, a: int, b: int, /) -> int:
        number = self._numbers.pop(0)
        assert a <= number <= b, number
        return number


def fake(*frames: int) -> FakeShards:
    return FakeShards(list(frames and [len(frames)]), frames=np.array(frames), size=(48, 64))


def stream(shards, rules=WINDOWS, *, batch=2, seed=3, **place) -> ClipStream:
    return ClipStream(shards, np.arange(shards.num_videos), rules, batch=batch, seed=seed, **place)


def drawn_frames(plan, of_flow: bool = False) -> list[list[int]]:
    """Positions of each view, as the plan's reads have them."""
    views = plan.flow_views if of_flow else plan.views
    return [plan.reads[view.reads].frames[list(view.indices)].tolist() for view in views]


def test_a_window_is_whole_at_its_stride_and_in_consecutive_parts():
    whole, first, second = WindowRules().clips(5)
    assert whole == list(range(5, 37, 2))
    assert (first, second) == (list(range(5, 21)), list(range(21, 37)))


def test_an_extra_frame_stands_before_each_clip_at_its_own_stride():
    rules = WindowRules(extra_frame=True)
    whole, first, second = rules.clips(7)
    assert whole == list(range(5, 39, 2))
    assert (first, second) == (list(range(6, 23)), list(range(22, 39)))
    assert rules.usable(fake(33, 34), np.arange(2)).tolist() == [False, True]


@pytest.mark.parametrize(("windows", "gap"), [(1, 1), (2, 1), (6, 1), (6, 4), (6, 9), (1, 3)])
def test_pairs_of_windows_far_enough_apart_are_all_as_likely(windows, gap):
    rules, reach = WindowRules(min_gap=gap), min(gap, windows - 1)
    choices = windows - reach + 1
    draws = itertools.product(range(choices), range(choices - 1)) if windows > 1 else [()]
    found = sorted(rules.window_starts(Scripted(*draw), windows) for draw in draws)
    pairs = itertools.product(range(windows), repeat=2)
    assert found == [pair for pair in pairs if abs(pair[0] - pair[1]) >= reach]


def test_three_clips_a_video_take_the_next_window_or_the_last():
    rules = WindowRules(clip_per_video=3)
    pairs = {rules.window_starts(Scripted(first), 50)[1] - first for first in range(17)}
    assert pairs == {32}
    assert [rules.window_starts(Scripted(first), 50)[1] for first in (17, 18, 49)] == [49, 49, 49]


@given(
    frames=st.integers(1, 6),
    stride=st.integers(1, 4),
    parts=st.integers(1, 3),
    more=st.integers(0, 9),
    extra=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_clip_lies_in_its_video(frames, stride, parts, more, extra, seed):
    parts = parts if stride > 1 else 1
    windows = WindowRules(frames=frames, stride=stride, parts=parts, extra_frame=extra, crop=8)
    pairs = PairRules(frames=frames, stride=stride, starts="two", crop=8)
    for rules, least in ((windows, (frames + extra) * stride), (pairs, (frames - 1) * stride + 1)):
        shards = fake(least + more, least - 1)
        assert rules.usable(shards, np.arange(2)).tolist() == [True, False]
        clips, _ = rules.draw(PhiloxDraw(seed, 0), shards, 0)
        assert len(clips) == (2 * (1 + parts) if rules is windows else 2)
        for clip in clips:
            assert 0 <= min(clip.frames) <= max(clip.frames) < least + more
            assert clip.box.top + clip.box.height <= 48
            assert clip.box.left + clip.box.width <= 64
        assert len({len(clip.frames) for clip in clips}) == 1


def test_two_clips_of_the_same_start_differ_in_box_alone():
    shards = fake(40)
    same, _ = PairRules(frames=4, stride=3).draw(Random(0), shards, 0)
    two, _ = PairRules(frames=4, stride=3, starts="two").draw(Random(0), shards, 0)
    assert same[0].frames == same[1].frames
    assert same[0].box != same[1].box
    assert two[0].frames != two[1].frames


@pytest.mark.parametrize("rules", [WINDOWS, PairRules(frames=4, stride=2, crop=16), FLOW])
def test_without_flips_nothing_is_mirrored_and_all_else_is_the_same(rules, tiny_shards):
    assert any(view.flip for n in range(4) for view in stream(tiny_shards, rules).plan(n).views)
    for n in range(4):
        either, plain = (stream(tiny_shards, each).plan(n) for each in (rules, replace(rules, flip=False)))
        for kind in ("views", "flow_views"):
            assert [view._replace(flip=False) for view in getattr(either, kind)] == list(getattr(plain, kind))


def test_an_epoch_shows_each_video_once_but_the_last_ones_that_fill_no_batch():
    clips = stream(fake(*[20] * 11), batch=4)
    assert clips.epoch_steps == 2
    epochs = [np.concatenate([clips.plan(2 * epoch + step).rows for step in range(2)]) for epoch in range(20)]
    assert all(len(set(rows.tolist())) == 8 for rows in epochs)
    assert len({tuple(rows) for rows in epochs}) == 20
    assert set(np.concatenate(epochs).tolist()) == set(range(11))  # no video is the one left out each time


def test_a_step_is_a_pure_function_of_seed_and_number():
    shards = fake(*range(8, 20))
    one, other = stream(shards), stream(shards)
    later = one.plan(9)
    for n in (14, 3, 9):
        again = other.plan(n)
    assert (again.views, again.rows.tolist()) == (later.views, later.rows.tolist())
    assert drawn_frames(again) == drawn_frames(later)
    assert np.array_equal(again.coordinates, later.coordinates)
    changed = stream(shards, seed=4).plan(9)
    assert changed.views != later.views
    assert stream(shards, seed=4, batch=12).plan(0).rows.tolist() != stream(shards, batch=12).plan(0).rows.tolist()


@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_processes_share_out_the_same_step(ranks):
    shards = fake(*range(8, 20))
    whole = stream(shards, batch=6).plan(3)
    parts = [stream(shards, batch=6, rank=rank, ranks=ranks).plan(3) for rank in range(ranks)]
    assert np.concatenate([part.rows for part in parts]).tolist() == whole.rows.tolist()
    assert [frames for part in parts for frames in drawn_frames(part)] == drawn_frames(whole)
    assert np.array_equal(np.concatenate([part.coordinates for part in parts]), whole.coordinates)
    assert [part.place for part in parts] == [rank * 6 // ranks for rank in range(ranks)]


def test_each_pixel_is_read_once_and_shown_by_the_views_that_were_drawn():
    shards = fake(*[12] * 6)
    shards.rgb.sizes[3:] = (64, 48)  # videos of two sizes in a batch
    clips = stream(shards, batch=6)
    plan = clips.plan(1)
    assert {reads.size for reads in plan.reads} == {(48, 64), (64, 48)}
    for reads in plan.reads:
        assert len(set(zip(reads.rows.tolist(), reads.frames.tolist(), strict=True))) == len(reads)
    drawn = [WINDOWS.draw(PhiloxDraw(3, 6 + i), shards, row)[0] for i, row in enumerate(plan.rows.tolist())]
    everything = [crop for crops in drawn for crop in crops]
    assert drawn_frames(plan) == [crop.frames for crop in everything]
    assert [(view.box, view.flip) for view in plan.views] == [(crop.box, crop.flip) for crop in everything]
    assert plan.coordinates.shape == (6, 6, 4)
    mirrored = plan.coordinates[..., 0] > plan.coordinates[..., 2]
    assert np.array_equal(mirrored, plan.flips)


def test_short_videos_are_left_out_and_counted():
    clips = stream(fake(7, 8, 9, 3, 20))
    assert (clips.rows.tolist(), clips.skipped) == ([1, 2, 4], 2)
    assert clips.report() == "3 videos, 1 steps an epoch; 2 videos too short for these clips are left out"


@pytest.mark.parametrize(
    ("frames", "place", "sentence"),
    [
        ((7, 7), {}, "no video of fake is left to train on (2 were given, 2 of them too short for these clips)"),
        ((7, 9), {}, "a batch of 2 videos is more than the 1 of fake to train on"),
        ((9, 9, 9, 9), {"ranks": 4}, "a batch of 2 videos has no equal part for process 0 of 4: give a multiple of 4"),
    ],
)
def test_what_gives_no_batch_is_refused(frames, place, sentence):
    with pytest.raises(ConfigError) as refused:
        stream(fake(*frames), **place)
    assert sentence in str(refused.value)


def test_flow_is_of_the_same_positions_as_the_pictures_in_the_same_place(tiny_shards):
    rules = replace(FLOW, flow_fields="even", stride=1)
    plan = stream(tiny_shards, rules).plan(0)
    modalities = [reads.modality for reads in plan.reads]
    assert modalities == ["rgb", "flow1"]  # displacement 1, from every frame: the position is the frame
    assert drawn_frames(plan, of_flow=True) == [frames[::2] for frames in drawn_frames(plan)]
    assert [view.box for view in plan.flow_views] == [view.box for view in plan.views]  # 64 x 64, both
    assert plan.reads[1].size == (128, 64)


def test_both_clips_in_each_box_are_in_the_order_of_the_released_code(tiny_shards):
    own, both = (stream(tiny_shards, replace(FLOW, flow_crops=crops)).plan(4) for crops in ("own", "both"))
    query, key = (drawn_frames(own)[place::2] for place in (0, 1))
    flow = drawn_frames(both, of_flow=True)
    assert [flow[place::4] for place in range(4)] == [query, key, query, key]
    boxes = [view.box for view in both.flow_views]
    assert boxes[0::4] == boxes[1::4] != boxes[2::4] == boxes[3::4]


def test_only_clips_that_move_enough_are_drawn(tiny_shards, monkeypatch):
    def of_field(series, row):
        scores = np.zeros(len(series.kept(row)), np.float32)
        scores[[3, 4]] = 1
        return scores

    monkeypatch.setattr(Series, "scores", of_field)
    rules = FlowPairRules(frames=2, stride=1, flow_series="flow1")
    rows = tiny_shards.split_rows("train")
    starts = {rules.clip_starts(PhiloxDraw(0, n), tiny_shards.series("flow1"), int(rows[0])) for n in range(40)}
    assert {start for pair in starts for start in pair} == {2, 3, 4}  # those whose clip has a field that moves


def test_starts_that_are_scored_at_another_stride_leave_room_for_the_clip(tiny_shards, monkeypatch):
    monkeypatch.setattr(Series, "scores", lambda series, row: np.arange(len(series.kept(row)), dtype=float))
    rules = FlowPairRules(frames=2, stride=4, filter_stride=1, flow_series="flow1")
    starts = {rules.clip_starts(PhiloxDraw(0, n), tiny_shards.series("flow1"), 4) for n in range(40)}
    assert max(start for pair in starts for start in pair) == 23 - 8  # of 23 fields; the last ones score most


def test_videos_without_a_whole_clip_of_flow_go_on_at_their_beginning_or_are_skipped(tiny_shards):
    long = replace(FLOW, stride=5)  # 20 positions; the videos have 11, 14, ... 23
    looped, skipped = stream(tiny_shards, long), stream(tiny_shards, replace(long, short="skip"))
    assert looped.skipped == 0
    assert skipped.skipped == 21
    assert min(tiny_shards.frames[skipped.rows]) == 21
    assert all(max(frames) <= 22 for frames in drawn_frames(looped.plan(0)))


def test_missing_flow_and_scores_are_named_with_the_command_that_makes_them(tiny_shards):
    with pytest.raises(
        ShardError, match=r'holds no flow "flow8g2"; add it with the fsar-preprocess .* --motion flow8g2'
    ):
        stream(tiny_shards, FlowPairRules())
    with pytest.raises(ShardError, match="no motion scores"):
        stream(tiny_shards, FlowPairRules(flow_series="flow1"))


@pytest.mark.parametrize(
    ("rules", "options"),
    [
        (WindowRules, {"frames": 0}),
        (WindowRules, {"clip_per_video": 1}),
        (WindowRules, {"stride": 1}),
        (PairRules, {"starts": "three"}),
        (FlowPairRules, {"motion_rule": "relaxed"}),
        (FlowPairRules, {"flow_series": "diff1"}),
    ],
)
def test_values_that_mean_nothing_are_refused(rules, options):
    with pytest.raises(ConfigError):
        rules(**options)
