"""Draw random values: the interface that every sampling rule draws through, its counter-based source, colour jitter."""

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
# Of the reference code: factors in 1 +- strength, hue shift in +- strength (of a full turn), share of grey clips
BRIGHTNESS, CONTRAST, SATURATION, HUE, GREY = 0.5, 0.5, 0.5, 0.25, 0.3


class Draw(Protocol):
    """What a sampling rule may ask for; `random.Random` satisfies it as it is."""

    def random(self) -> float:
        """Return a number in [0, 1)."""

    def uniform(self, a: float, b: float, /) -> float:
        """Return a number between a and b."""

    def randint(self, a: int, b: int, /) -> int:
        """Return a whole number from a to b, both included."""

    def shuffle(self, x: MutableSequence[Any], /) -> None:
        """Put x in a random order, in place."""


class _Key(ISeedSequence):
    """Hands Philox its two key words as they are; given as `key`, NumPy would also ask the system for entropy."""

    def __init__(self, seed: int, n: int) -> None:
        self._words = seed, n

    def generate_state(self, n_words: int, dtype: npt.DTypeLike = np.uint64) -> npt.NDArray[np.uint64]:
        """Return the key [2]."""
        del n_words, dtype
        return np.array(self._words, dtype=np.uint64)


class PhiloxDraw:
    """Draws of episode n: a pure function of (seed, n), with nothing carried over from other episodes.

    Philox is keyed by (seed, n), so any episode can be planned without those before it. A whole number
    takes the high half of word * range: the bias is at most range / 2**64, which no run can notice.
    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    Raises ConfigError when the seed or the number does not fit 64 bits.
    """

    def __init__(self, seed: int, n: int) -> None:
        for name, value in (("seed", seed), ("episode number", n)):
            if not 0 <= value < _WORD:
                raise ConfigError(f"the {name} {value} is out of range: use one from 0 to 2**64 - 1")
        # NumPy documents this interface, its stubs know SeedSequence alone
        self._bits = np.random.Philox(_Key(seed, n))  # type: ignore[arg-type]
        self._words: list[int] = []

    def _fetch(self) -> list[int]:
        self._words = self._bits.random_raw(_BLOCK).tolist()
        self._words.reverse()  # taken from the end, which is cheap, yet in the order of the generator
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
    """A random order [count] of the numbers below `count`: a pure function of (seed, n), as `PhiloxDraw` is.

    It sorts the words of the generator themselves, so it is the same with every version of NumPy.
    """
    words = np.random.Philox(_Key(seed, n)).random_raw(count)  # type: ignore[arg-type]
    return np.argsort(words, kind="stable")


@dataclass(frozen=True)
class Jitter:
    """Colour jitter of one clip: three factors, a hue shift in turns, their order, grey first or not.

    order holds the places of (brightness, contrast, saturation, hue), first applied first.
    """

    brightness: float
    contrast: float
    saturation: float
    hue: float
    order: tuple[int, ...]
    grey: bool


def draw_jitter(draw: Draw) -> Jitter:
    """Factors of a clip."""
    brightness = draw.uniform(1 - BRIGHTNESS, 1 + BRIGHTNESS)
    contrast = draw.uniform(1 - CONTRAST, 1 + CONTRAST)
    saturation = draw.uniform(1 - SATURATION, 1 + SATURATION)
    hue = draw.uniform(-HUE, HUE)
    order = [0, 1, 2, 3]
    draw.shuffle(order)
    return Jitter(brightness, contrast, saturation, hue, tuple(order), draw.random() < GREY)
