"""Draw random values: the interface of every sampling rule, its counter-based source, jitter."""

from __future__ import annotations

from collections.abc import MutableSequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from numpy.random.bit_generator import ISeedSequence

from shards_spec.errors import ConfigError

_BLOCK = 128  # words fetched at once: one call for a test episode, a few for a training episode
_WORD = 1 << 64
# Of the reference code: factors in 1 +- strength, hue shift in +- strength (of a full turn), share
# of grey clips
BRIGHTNESS, CONTRAST, SATURATION, HUE, GREY = 0.5, 0.5, 0.5, 0.25, 0.3


class Draw(Protocol):
    """Gives a sampling rule its random values; `random.Random` satisfies it as it is."""

    def random(self) -> float:
        """Return a number in [0, 1)."""

    def uniform(self, a: float, b: float, /) -> float:
        """Return a number between a and b."""

    def randint(self, a: int, b: int, /) -> int:
        """Return a whole number from a to b, both included."""

    def shuffle(self, x: MutableSequence[Any], /) -> None:
        """Put x in a random order, in place."""


class _Key(ISeedSequence):
    """Hands Philox its two key words as they are.

    Passed as `key` instead, they would make NumPy also ask the system for entropy, which takes four
    times as long.
    """

    def __init__(self, seed: int, n: int) -> None:
        self._words = seed, n

    def generate_state(self, n_words: int, dtype: npt.DTypeLike = np.uint64) -> npt.NDArray[np.uint64]:
        """Return the key [2]."""
        del n_words, dtype
        return np.array(self._words, dtype=np.uint64)


class PhiloxDraw:
    """Draws of episode n: a pure function of (seed, n), whatever other episodes drew.

    Philox is keyed by (seed, n), so any episode can be planned without those before it. A whole
    number is the high half of word * range: its bias is at most range / 2**64, which no run can
    notice. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    Raises:
        ConfigError: the seed or the number does not fit 64 bits.
    """

    def __init__(self, seed: int, n: int) -> None:
        for name, value in (("seed", seed), ("episode number", n)):
            if not 0 <= value < _WORD:
                raise ConfigError(f"the {name} {value} is out of range: use one from 0 to 2**64 - 1")
        # NumPy documents this interface; its stubs know only SeedSequence
        self._bits = np.random.Philox(_Key(seed, n))  # type: ignore[arg-type]
        self._words: list[int] = []

    def _fetch(self) -> list[int]:
        self._words = self._bits.random_raw(_BLOCK).tolist()
        self._words.reverse()  # `pop` takes from the end, which is cheap: the words still come in their order
        return self._words

    def random(self) -> float:
        """Return a number in [0, 1) of 53 random bits."""
        return ((self._words or self._fetch()).pop() >> 11) * 2.0**-53

    def uniform(self, a: float, b: float, /) -> float:
        """Return a number between a and b."""
        return a + (b - a) * (((self._words or self._fetch()).pop() >> 11) * 2.0**-53)  # of `random`

    def randint(self, a: int, b: int, /) -> int:
        """Return a whole number from a to b, both included; ValueError when there is none."""
        if b < a:
            raise ValueError(f"no whole number lies between {a} and {b}")
        return a + (((self._words or self._fetch()).pop() * (b - a + 1)) >> 64)

    def shuffle(self, x: MutableSequence[Any], /) -> None:
        """Put x in a random order, in place (Fisher-Yates)."""
        randint = self.randint
        for i in range(len(x) - 1, 0, -1):
            j = randint(0, i)
            x[i], x[j] = x[j], x[i]


def permutation(seed: int, n: int, count: int) -> npt.NDArray[np.int64]:
    """Return a random order [count] of the numbers below `count`: a pure function of (seed, n).

    It sorts the generator's own words, so it is the same with every version of NumPy.
    """
    words = np.random.Philox(_Key(seed, n)).random_raw(count)  # type: ignore[arg-type]
    return np.argsort(words, kind="stable")


@dataclass(frozen=True)
class Jitter:
    """Colour jitter of one clip: three factors, a hue shift in turns, their order, grey or not.

    `order` holds the places of (brightness, contrast, saturation, hue), first applied first.
    """

    brightness: float
    contrast: float
    saturation: float
    hue: float
    order: tuple[int, ...]
    grey: bool


def draw_jitter(draw: Draw) -> Jitter:
    """Draw the jitter of a clip, in the order of the code of MoLo (alibaba-mmai-research/MoLo)."""
    brightness = draw.uniform(1 - BRIGHTNESS, 1 + BRIGHTNESS)
    contrast = draw.uniform(1 - CONTRAST, 1 + CONTRAST)
    saturation = draw.uniform(1 - SATURATION, 1 + SATURATION)
    hue = draw.uniform(-HUE, HUE)
    order = [0, 1, 2, 3]
    draw.shuffle(order)
    return Jitter(brightness, contrast, saturation, hue, tuple(order), draw.random() < GREY)
