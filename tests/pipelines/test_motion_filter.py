from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mscl_case import CASES, outputs

from pipelines.clips.flow import (
    chosen_offsets,
    clip_positions,
    clip_scores,
    draw_clip,
    draw_clips,
    flow_box,
    nearest,
    released_second,
)
from pipelines.draw import PhiloxDraw
from shards_spec.errors import ConfigError

SCORES = outputs("mds")
CHOSEN = CASES["mds"]["chosen_idx"]
SECOND = CASES["sampler"]["second_clip_rule"]


class Scripted:
    """Draws one number eleven times, then another."""

    def __init__(self, first: int, then: int) -> None:
        self.numbers = [first] * 11 + [then]

    def randint(self, _a: int, _b: int) -> int:
        return self.numbers.pop(0)


@pytest.mark.parametrize("case", CHOSEN)
def test_clip_scores_and_chosen_offsets_are_those_of_the_reference(case):
    variant, stride = case.rsplit("_s", 1)
    frames, clip = SCORES[f"frame_score_{variant}"], {"stride": int(stride), "length": 8}
    np.testing.assert_allclose(clip_scores(frames, **clip), SCORES[f"clip_score_{case}"], rtol=1e-5)
    assert chosen_offsets(frames, rule="released", **clip).tolist() == CHOSEN[case]


@pytest.mark.parametrize("case", SECOND)
def test_the_second_clip_is_that_of_the_reference(case):
    assert released_second(case["chosen"], case["target"]) == case["second"]


@pytest.mark.parametrize("case", [case for case in SECOND if abs(case["target"] - case["first"]) <= 64])
def test_both_clips_are_those_of_the_reference(case):
    draw = Scripted(case["drawn_first"], case["target"] - case["first"])
    clips = draw_clips(draw, case["chosen"], 200, stride=8, length=8, rule="released")
    assert clips == (case["first"], case["second"])


@pytest.mark.parametrize("case", CASES["sampler"]["crop_mapping"])
def test_the_box_in_flow_fields_is_that_of_the_reference(case):
    def box(edges):
        left, top, right, bottom = edges
        return top, left, bottom - top, right - left

    found = flow_box(box(case["image_box_ltrb"]), case["image_hw"], case["flow_hw"])
    assert found == box(case["flow_box_ltrb"])


@given(st.lists(st.floats(0, 100), max_size=90), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_clips_are_chosen_ones_and_within_the_video(scores, stride, length, seed):
    clip, positions = {"stride": stride, "length": length}, max(len(scores), 1)
    last = max(positions - stride * length, 0)
    chosen = chosen_offsets(scores, **clip).tolist()
    assert 2 * len(chosen) <= last + 1
    for first, second in (
        draw_clips(PhiloxDraw(seed, 0), chosen, positions, **clip),
        (draw_clip(PhiloxDraw(seed, 0), chosen, positions, **clip),) * 2,
    ):
        assert {first, second} <= set(chosen or range(last + 1))
        assert abs(second - first) <= last
        places = clip_positions(first, positions, **clip)
        assert all(0 <= place < positions for place in places)
        if positions >= stride * length:
            assert places == list(range(first, first + stride * length, stride))


@given(st.sets(st.integers(0, 200), min_size=1), st.integers(-300, 300))
def test_nearest_is_the_nearest(chosen, target):
    assert nearest(sorted(chosen), target) == min(sorted(chosen), key=lambda start: abs(start - target))


def test_the_fixed_rule_draws_every_chosen_clip_alike():
    chosen = [3, 40, 41, 80]
    firsts = Counter(draw_clips(PhiloxDraw(1, n), chosen, 200, stride=8, length=8)[0] for n in range(4000))
    assert set(firsts) == set(chosen)
    assert max(firsts.values()) < 1.15 * min(firsts.values())


def test_a_short_clip_is_looped_and_a_wrong_rule_refused():
    assert clip_positions(0, 5, stride=2, length=4) == [0, 2, 4, 1]
    assert chosen_offsets([1.0] * 100, stride=2, length=4).tolist() == []  # nothing stands out
    with pytest.raises(ConfigError, match='choose "fixed" or "released"'):
        chosen_offsets([1.0], stride=2, length=4, rule="nearest")
