"""Optical flow between two frames: OpenCV's DIS, or a function of the user's own."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from preprocess.decode import Planes, shrink, to_rgb
from shards_spec.errors import ConfigError

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

DIS = "DIS medium"
FLOW_SHORT_SIDE = 128  # DIS runs 653 pairs a core-second here, 142 at 256; its error is a tenth of a pixel


class FlowEstimator(Protocol):
    """Fields of flow from pairs of frames; a frame is prepared once for all of its pairs."""

    def prepare(self, frame: Planes) -> Bytes:
        """The picture [h, w] or [h, w, 3] that the estimator looks at."""

    def flow(self, before: Bytes, after: Bytes) -> Floats:
        """[h, w, 2] u to the right and v downwards, in pixels of this field."""


def create_estimator(name: str) -> FlowEstimator:
    """The estimator of a name: "DIS medium", or `module:function`.

    Raises:
        ConfigError: there is no such function.
    """
    return DisEstimator() if name == DIS else NamedEstimator(name)


def estimator_plan(name: str) -> dict[str, Any]:
    """Settings of an estimator that decide its fields."""
    return {"method": name, "opencv": cv2.__version__} | ({"short_side": FLOW_SHORT_SIDE} if name == DIS else {})


class DisEstimator:
    """OpenCV's DIS, preset medium, on the luma at a short side of 128."""

    def __init__(self) -> None:
        self._dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def prepare(self, frame: Planes) -> Bytes:
        """[h, w] luma."""
        return shrink(frame.y, FLOW_SHORT_SIDE)

    def flow(self, before: Bytes, after: Bytes) -> Floats:
        """[h, w, 2] of two lumas [h, w]."""
        field: Floats = self._dis.calc(before, after, None)
        return field


class NamedEstimator:
    """A function of the user's: two RGB frames [H, W, 3] uint8 -> a field [h, w, 2] float32 of any one size."""

    def __init__(self, name: str) -> None:
        self._name, self._function = name, _find(name)

    def prepare(self, frame: Planes) -> Bytes:
        """[H, W, 3] RGB, of the stored size."""
        return to_rgb(frame)

    def flow(self, before: Bytes, after: Bytes) -> Floats:
        """What the function gives, checked.

        Raises:
            ConfigError: the function failed, or gave no such field.
        """
        try:
            field = np.asarray(self._function(before, after))
        except Exception as error:  # whatever the user's function raises
            raise ConfigError(f'flow estimator "{self._name}" failed: {error!r}') from error
        if field.ndim != 3 or field.shape[-1] != 2 or field.dtype != np.float32 or not np.isfinite(field).all():
            raise ConfigError(
                f'flow estimator "{self._name}" gave {field.dtype} {list(field.shape)}; '
                "it must give finite float32 numbers [h, w, 2] in a NumPy array"
            )
        return field


def _find(name: str) -> Callable[[Bytes, Bytes], Any]:
    if not re.fullmatch(r"[^:]+:[^:]+", name):
        raise ConfigError(f'flow estimator "{name}": give module:function, such as my_raft:flow')
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever the user's module raises
        raise ConfigError(f'flow estimator "{name}" cannot be imported ({error}); give module:function') from error
    if not callable(found):
        raise ConfigError(f'flow estimator "{name}" is no function')
    function: Callable[[Bytes, Bytes], Any] = found
    return function
