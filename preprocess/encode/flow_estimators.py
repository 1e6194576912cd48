"""Estimate optical flow between two frames: by OpenCV's DIS, or by a function of the user."""

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

# Fields a core-second at a short side of 128: DIS medium 653, DIS fast 2,762, Farneback 338,
# TV-L1 3.
DIS = "DIS medium"
# At a short side of 256 DIS makes only 142 fields a core-second; at 128 its error is a tenth of a
# pixel.
FLOW_SHORT_SIDE = 128


class FlowEstimator(Protocol):
    """An estimator of flow from pairs of frames; a frame is prepared once for all of its pairs."""

    def prepare(self, frame: Planes) -> Bytes:
        """Return the picture [h, w] or [h, w, 3] that the estimator reads."""

    def flow(self, before: Bytes, after: Bytes) -> Floats:
        """Return the field [h, w, 2]: u to the right and v downwards, in pixels of this field."""


def create_estimator(name: str) -> FlowEstimator:
    """Create the estimator of a name: "DIS medium", or `module:function`.

    Raises:
        ConfigError: there is no such function.
    """
    return DisEstimator() if name == DIS else NamedEstimator(name)


def estimator_plan(name: str) -> dict[str, Any]:
    """Return the settings of an estimator that decide its fields, for the plan."""
    return {"method": name, "opencv": cv2.__version__} | ({"short_side": FLOW_SHORT_SIDE} if name == DIS else {})


class DisEstimator:
    """OpenCV's DIS, preset medium, on the luma at a short side of 128.

    Source: Kroeger et al., "Fast Optical Flow using Dense Inverse Search", ECCV 2016
    (arXiv 1603.03590).
    """

    def __init__(self) -> None:
        self._dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def prepare(self, frame: Planes) -> Bytes:
        """Return the luma [h, w], scaled down."""
        return shrink(frame.y, FLOW_SHORT_SIDE)

    def flow(self, before: Bytes, after: Bytes) -> Floats:
        """Return the field [h, w, 2] of two lumas [h, w]."""
        # No field is handed over to start from: a field then depends on its two frames only.
        field: Floats = self._dis.calc(before, after, None)
        return field


class NamedEstimator:
    """A function of the user: two RGB frames [H, W, 3] uint8 -> a field [h, w, 2] float32.

    The fields of a video are of one size, which need not be that of its frames.
    """

    def __init__(self, name: str) -> None:
        self._name, self._function = name, _find(name)

    def prepare(self, frame: Planes) -> Bytes:
        """Return the frame as RGB [H, W, 3], of the stored size."""
        return to_rgb(frame)

    def flow(self, before: Bytes, after: Bytes) -> Floats:
        """Return the field [h, w, 2] that the function gives, checked.

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
