from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.draw import PhiloxDraw
from pipelines.sampling import FRAME_RULES, ClassPool, distinct, frame_rule, kinetics, kinetics_whole, segment, still
from shards_spec.errors import ConfigError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "molo" / "frame_sampling.json").read_text())
SEGMENT, KINETICS_TEST, KINETICS_TRAIN = GOLDEN.values()


def settings_of(case: str) -> dict[str, float]:
    return {name: float(value) for name, value in re.findall(r"(\w+)=([\d.]+)", case)}


@pytest.mark.parametrize("case", SEGMENT)
def test_segment_draws_what_the_reference_draws(case):
    given_ = settings_of(case)
    length, draw = int(given_["length"]), random.Random(int(given_["seed"]))
    frames = segment(draw, length, steps=8, random_frames=True)
    if isinstance(SEGMENT[case], str):  # the reference fails under 8 frames; here they are repeated
        assert frames == [0, 0, 1, 1, 2, 3, 3, 4]
    else:
        assert frames == SEGMENT[case]


@pytest.mark.parametrize("case", [*KINETICS_TEST, *KINETICS_TRAIN])
def test_kinetics_window_is_that_of_the_reference(case):
    given_ = settings_of(case)
    length, train = int(given_["length"]), "seed" in given_
    draw = random.Random(int(given_.get("seed", 0)))
    frames = kinetics(draw, length, steps=8, random_frames=train, fps=given_["fps"])
    if length < 64:  # the reference's frames run backwards there
        assert frames == segment(draw, length, steps=8, random_frames=False)
    else:
        assert frames == (KINETICS_TRAIN if train else KINETICS_TEST)[case]


def test_centres():
    assert segment(random.Random(0), 80, steps=8, random_frames=False) == [5, 15, 25, 35, 45, 55, 65, 75]
    assert segment(random.Random(0), 8, steps=8, random_frames=False) == list(range(8))
    assert still(random.Random(0), 21, steps=4, random_frames=True) == [10] * 4


def test_the_whole_kinetics_window_reaches_its_end():
    whole = {"steps": 8, "fps": 30.0}
    assert kinetics_whole(random.Random(0), 301, random_frames=False, **whole)[::7] == [2, 297]
    assert kinetics_whole(random.Random(0), 40, random_frames=False, **whole) == [0, 5, 11, 16, 22, 27, 33, 39]
    long = kinetics_whole(random.Random(0), 10_000, random_frames=False, **whole)
    assert (long[0], long[-1]) == (4650, 5349)  # 700 frames in the middle


@given(
    st.sampled_from(sorted(FRAME_RULES)),
    st.integers(1, 2000),
    st.integers(1, 70),
    st.booleans(),
    st.sampled_from([1.0, 10.0, 23.976, 30.0, 120.0]),
    st.integers(0, 2**32),
)
@settings(max_examples=400)
def test_every_rule_gives_ordered_frames_of_the_video(name, length, steps, random_frames, fps, seed):
    frames = FRAME_RULES[name](PhiloxDraw(seed, 0), length, steps=steps, random_frames=random_frames, fps=fps)
    assert len(frames) == steps
    assert frames == sorted(frames)
    assert all(isinstance(frame, int) and 0 <= frame < length for frame in frames)


def test_an_unknown_rule_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match='no frame rule "segmant": did you mean "segment"'):
        frame_rule("segmant")


@given(st.integers(0, 300), st.integers(0, 2**64 - 1))
def test_distinct_is_a_permutation(population, seed):
    assert sorted(distinct(PhiloxDraw(seed, 0), population)) == list(range(population))


def test_distinct_is_uniform():
    counts = np.zeros((5, 5))
    for n in range(5000):
        for place, item in enumerate(distinct(PhiloxDraw(0, n), 5)):
            counts[place, item] += 1
    assert np.abs(counts - 1000).max() < 140


class CountingDraw(PhiloxDraw):
    def __init__(self, seed: int, n: int) -> None:
        super().__init__(seed, n)
        self.count = 0

    def randint(self, a: int, b: int, /) -> int:
        self.count += 1
        return super().randint(a, b)


def test_cost_does_not_depend_on_the_number_of_videos():
    for videos in (30, 300_000):
        pool = ClassPool.build(0, np.arange(videos), None)
        draw = CountingDraw(0, 0)
        pool.choose(draw, 5, 6)
        assert draw.count < 30


def splits_exactly(sizes: list[int], shot: int, queries: int) -> bool:
    """Brute force: does some set of groups hold `shot` videos and leave `queries` to the rest?"""
    sums = {0}
    for size in sizes:
        sums |= {total + size for total in sums}
    return any(total >= shot and sum(sizes) - total >= queries for total in sums)


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=6),
    st.integers(0, 3),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(0, 10**6),
)
@settings(max_examples=500)
def test_groups_are_divided_whenever_they_can_be(sizes, unknown, shot, queries, seed):
    groups = [g for g, size in enumerate(sizes) for _ in range(size)] + [-1] * unknown
    random.Random(seed).shuffle(groups)
    pool = ClassPool.build(0, 100 + np.arange(len(groups)), np.array(groups, dtype=np.int32))
    possible = splits_exactly([*sizes, *[1] * unknown], shot, queries)
    assert pool.can_serve(shot, queries) == possible
    if possible:
        support, query = pool.choose(PhiloxDraw(seed, 0), shot, queries)
        assert (len(set(support)), len(set(query))) == (shot, queries)
        assert not set(support) & set(query)
        of = {100 + i: group for i, group in enumerate(groups)}
        assert not {of[row] for row in support} & {of[row] for row in query} - {-1}


def test_a_class_without_videos_cannot_serve():
    assert not ClassPool.build(0, np.arange(0), None).can_serve(1, 1)


def test_every_video_is_drawn_about_equally_often():
    pool = ClassPool.build(0, np.arange(12), np.repeat(np.arange(4, dtype=np.int32), 3))
    counts = np.zeros((2, 12))
    for n in range(6000):
        support, query = pool.choose(PhiloxDraw(3, n), 1, 1)
        counts[0, support] += 1
        counts[1, query] += 1
    assert np.abs(counts - 500).max() < 110
