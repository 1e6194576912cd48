from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.draw import Draw, PhiloxDraw
from shards_spec.errors import ConfigError

WORDS = st.integers(0, 2**64 - 1)


def history(draw: Draw) -> list[object]:
    items = list(range(9))
    draw.shuffle(items)
    return [draw.random(), draw.uniform(-2, 5), draw.randint(3, 1000), items, [draw.random() for _ in range(600)]]


@given(WORDS, WORDS)
@settings(max_examples=30)
def test_draws_are_a_pure_function_of_seed_and_number(seed, n):
    assert history(PhiloxDraw(seed, n)) == history(PhiloxDraw(seed, n))


def test_neighbouring_seeds_and_numbers_differ():
    draws = [PhiloxDraw(seed, n).random() for seed in range(20) for n in range(20)]
    assert len(set(draws)) == 400


def test_draws_are_pinned_for_ever():
    # a change here changes every published episode list
    draw = PhiloxDraw(7, 3)
    assert [draw.randint(0, 999) for _ in range(6)] == [482, 724, 50, 316, 680, 195]


@given(WORDS, st.integers(-(10**9), 10**9), st.integers(0, 10**9))
def test_ranges(seed, a, width):
    draw = PhiloxDraw(seed, 0)
    assert a <= draw.randint(a, a + width) <= a + width
    assert 0 <= draw.random() < 1
    assert a <= draw.uniform(a, a + width) <= a + width


def test_randint_covers_its_range_evenly():
    draw = PhiloxDraw(1, 2)
    counts = Counter(draw.randint(0, 6) for _ in range(14_000))
    assert set(counts) == set(range(7))
    assert all(abs(count - 2000) < 200 for count in counts.values())  # 4.8 standard deviations


def test_every_order_of_a_shuffle_is_about_as_likely():
    orders: Counter[tuple[int, ...]] = Counter()
    for n in range(6000):
        items = [0, 1, 2]
        PhiloxDraw(0, n).shuffle(items)
        orders[tuple(items)] += 1
    assert len(orders) == 6
    assert all(abs(count - 1000) < 140 for count in orders.values())


def test_python_random_is_a_draw():
    assert len(history(random.Random(0))) == 5


@pytest.mark.parametrize(("seed", "n"), [(-1, 0), (0, -1), (2**64, 0), (0, 2**64)])
def test_numbers_out_of_range_are_refused(seed, n):
    with pytest.raises(ConfigError, match="out of range"):
        PhiloxDraw(seed, n)


def test_an_empty_range_is_refused():
    with pytest.raises(ValueError, match="between 3 and 2"):
        PhiloxDraw(0, 0).randint(3, 2)
