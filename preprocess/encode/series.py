"""Encode frames as the members of each series: frames (JPEG or raw), differences, optical flow."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor, Future
from typing import Any, Protocol

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from preprocess.decode import Geometry, Planes, ffmpeg_version, to_rgb
from preprocess.encode.flow_estimators import DIS, FlowEstimator, create_estimator, estimator_plan
from preprocess.encode.motion_scores import SCORE_VARIANT, WINDOW, ChangeScores
from shards_spec.errors import ConfigError
from shards_spec.pictures import FLOW_CODES, FLOW_ZERO
from shards_spec.schema import MOTION, flow_pairs, motion_series, picture_name

QUALITY = 90  # of all JPEGs
FRAMES_BEHIND = 16  # that an encoder in another thread may hold


def series_plans(
    geometry: Geometry, motion: Iterable[str], *, codec: str = "jpeg", estimators: Mapping[str, str] | None = None
) -> dict[str, dict[str, Any]]:
    """Return settings and tool versions of each series: all that decides its bytes.

    Args:
        geometry: Size of the frames.
        motion: Names as in the command's --motion.
        codec: Codec of the frames.
        estimators: Series of flow -> name of its estimator, where it is not DIS.
    """
    source = {"geometry": str(geometry), "decoder": ffmpeg_version()}
    coding = {"codec": "jpeg", "quality": QUALITY, "encoder": f"simplejpeg {simplejpeg.__version__}"}
    raw = {"codec": "raw", "opencv": cv2.__version__}
    frames = raw if codec == "raw" else coding | {"chroma": "4:2:0"}
    plans: dict[str, dict[str, Any]] = {"rgb": source | frames | {"frames": "all"}}
    for series in motion_series(motion):
        plans[series] = source | coding | _motion_plan(series, (estimators or {}).get(series, DIS))
    return plans


def _motion_plan(series: str, estimator: str) -> dict[str, Any]:
    pairs = flow_pairs(series)
    if pairs is None:
        return {"displacement": 1, "opencv": cv2.__version__}
    plan = {"displacement": pairs[0]} | estimator_plan(estimator)
    return plan if series == MOTION["flow"] else plan | {"grid": pairs[1], "scores": SCORE_VARIANT}


def make_opencv_deterministic() -> None:
    """Make OpenCV's results the same on every machine; call it in every thread that encodes.

    DIS cuts a picture into as many stripes as OpenCV has threads, and its result depends on them.
    Intel's library IPP chooses its code by the CPU; each thread must switch it off for itself.
    """
    cv2.setNumThreads(1)
    cv2.ipp.setUseIPP(False)


class Encoder(Protocol):
    """Turns the frames of one video into the members and the description of one series."""

    def add(self, frame: Planes) -> None:
        """Take the next frame."""

    def members(self) -> dict[str, bytes]:
        """Return the content of each stored picture by its extension."""

    def info(self) -> dict[str, Any]:
        """Return what the sample's JSON says of this series."""


def create_encoder(series: str, *, codec: str = "jpeg", estimator: str = DIS) -> Encoder:
    """Create the encoder of a series, for one video.

    Args:
        series: Its name, such as "rgb", "diff1" or "flow1".
        codec: Codec of frames.
        estimator: Estimator of flow.

    Raises:
        ConfigError: there is no such estimator.
    """
    pairs = flow_pairs(series)
    if pairs is not None:
        return FlowEncoder(*pairs, estimator=create_estimator(estimator), scored=series != MOTION["flow"])
    if series == MOTION["diff"]:
        return DifferenceEncoder()
    return RawEncoder() if codec == "raw" else FrameEncoder()


def member(number: int) -> str:
    """Return the extension of the JPEG whose first frame is source frame `number`."""
    return picture_name(number, "jpeg")


class ThreadedEncoder:
    """An encoder at work in another thread, a few frames behind; its pictures are the same.

    The pool must have one thread, so that frames stay in order.
    """

    def __init__(self, encoder: Encoder, pool: Executor) -> None:
        self._encoder, self._pool = encoder, pool
        self._pending: deque[Future[None]] = deque()

    def add(self, frame: Planes) -> None:
        """Take the next frame; waits while too many are held."""
        if len(self._pending) == FRAMES_BEHIND:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(self._encoder.add, frame))

    def members(self) -> dict[str, bytes]:
        """Return the encoder's members, when all frames are done."""
        self._wait()
        return self._encoder.members()

    def info(self) -> dict[str, Any]:
        """Return the encoder's description, when all frames are done."""
        self._wait()
        return self._encoder.info()

    def _wait(self) -> None:
        while self._pending:
            self._pending.popleft().result()


class FrameEncoder:
    """An encoder of frames as baseline JPEG, straight from their YUV planes.

    There is no colour conversion, and no loss but that of JPEG.
    """

    def __init__(self) -> None:
        self._members: dict[str, bytes] = {}
        self._size = (0, 0)

    def add(self, frame: Planes) -> None:
        """Take the next frame."""
        self._size = frame.y.shape
        self._members[member(len(self._members))] = encode_planes(frame)

    def members(self) -> dict[str, bytes]:
        """Return one member a frame."""
        return self._members

    def info(self) -> dict[str, Any]:
        """Return the stored size and the source frames that are kept."""
        return {"size": list(self._size), "kept": list(range(len(self._members)))}


class RawEncoder:
    """An encoder of frames as RGB bytes: ten times as many as a JPEG has, and nothing to decode."""

    def __init__(self) -> None:
        self._members: dict[str, bytes] = {}
        self._size = (0, 0)

    def add(self, frame: Planes) -> None:
        """Take the next frame."""
        self._size = frame.y.shape
        self._members[picture_name(len(self._members), "raw")] = to_rgb(frame).tobytes()

    def members(self) -> dict[str, bytes]:
        """Return one member a frame."""
        return self._members

    def info(self) -> dict[str, Any]:
        """Return the stored size, the source frames that are kept, and that they are raw."""
        return {"size": list(self._size), "kept": list(range(len(self._members))), "codec": "raw"}


class DifferenceEncoder:
    """An encoder of the difference of each frame and the next, halved and centred on 128, as JPEG.

    The planes are subtracted in YUV. The conversion to RGB is linear, so the decoded RGB is
    128 + (next - this) / 2 in each channel. The root mean square error on real clips is 2.2 grey
    levels, in a range of -255 to 255; the rounding of the halves makes up to 0.7 of it.
    """

    def __init__(self) -> None:
        self._before: Planes | None = None
        self._members: dict[str, bytes] = {}
        self._magnitude: list[float] = []

    def add(self, frame: Planes) -> None:
        """Take the next frame."""
        if self._before is not None:
            halved = Planes(*(difference(a, b) for a, b in zip(self._before, frame, strict=True)))
            self._members[member(len(self._members))] = encode_planes(halved)
            total = cv2.norm(frame.y, self._before.y, cv2.NORM_L1)  # a sum of whole numbers: exact
            self._magnitude.append(round(total / frame.y.size, 3))
        self._before = frame

    def members(self) -> dict[str, bytes]:
        """Return one member a pair of frames."""
        return self._members

    def info(self) -> dict[str, Any]:
        """Return the stored size and the mean absolute difference of the luma, in grey levels."""
        size = [] if self._before is None else list(self._before.y.shape)
        return {"size": size, "magnitude": self._magnitude}


class FlowEncoder:
    """An encoder of optical flow from frame i to i + D, for i = 0, G, 2G, ...

    Each field is a grey JPEG [2h, w], u above v, of the values 128 + 127 * value / scale. `scale`
    is the largest component of the field, in pixels of the stored field. The root mean square error
    of JPEG and rounding on real clips is 0.4 % of it: 0.013 pixels between neighbouring frames.
    """

    def __init__(self, displacement: int, grid: int, *, estimator: FlowEstimator, scored: bool) -> None:
        self._displacement, self._grid, self._estimator = displacement, grid, estimator
        # First frame of a pair -> its picture, until the pair is complete.
        self._started: dict[int, NDArray[np.uint8]] = {}
        self._count = 0
        self._size = (0, 0)
        self._members: dict[str, bytes] = {}
        self._scale: list[float] = []
        self._magnitude: list[float] = []
        self._scores = ChangeScores() if scored else None

    def add(self, frame: Planes) -> None:
        """Take the next frame.

        Raises:
            ConfigError: the estimator failed, or its fields are of several sizes.
        """
        starts, first = self._count % self._grid == 0, self._count - self._displacement
        if starts or first in self._started:
            picture = self._estimator.prepare(frame)
            if self._count == 0:
                self._size = picture.shape[:2]
            if first in self._started:
                self._store(first, self._estimator.flow(self._started.pop(first), picture))
            if starts:
                self._started[self._count] = picture
        self._count += 1

    def _store(self, first: int, field: NDArray[np.float32]) -> None:
        size = field.shape[:2]
        if self._members and size != self._size:
            raise ConfigError(
                f"the flow estimator gave fields of {self._size} and of {size} in one video; give one size"
            )
        self._size = size
        stacked = np.concatenate([field[..., 0], field[..., 1]])  # [2h, w]
        code, scale = quantise(stacked)
        self._members[member(first)] = encode_grey(code)
        self._scale.append(scale)
        self._magnitude.append(round(mean_length(stacked), 4))
        if self._scores and min(size) >= WINDOW:
            self._scores.add(field)

    def members(self) -> dict[str, bytes]:
        """Return one member a pair of frames."""
        return self._members

    def info(self) -> dict[str, Any]:
        """Return the stored size, and each field's scale, mean length and, if asked for, score.

        The scale is what code 127 stands for; it and the lengths are in pixels of the stored field.
        """
        height, width = self._size
        info: dict[str, Any] = {"size": [2 * height, width], "scale": self._scale, "magnitude": self._magnitude}
        if self._scores:
            scores = [round(score, 4) for score in self._scores.values()]
            info["motion_score"] = scores or [None] * len(self._scale)  # None: fields are too small
        return info


def encode_planes(planes: Planes) -> bytes:
    """Encode full-range YUV planes as baseline JPEG (JFIF)."""
    encoded: bytes = simplejpeg.encode_jpeg_yuv_planes(*planes, quality=QUALITY, fastdct=False)
    return encoded


def encode_grey(image: NDArray[np.uint8]) -> bytes:
    """Encode a picture [h, w] as baseline grey JPEG."""
    encoded: bytes = simplejpeg.encode_jpeg(
        image[..., None], quality=QUALITY, colorspace="GRAY", colorsubsampling="Gray", fastdct=False
    )
    return encoded


def difference(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return 128 + (after - before) / 2, rounded half to even: -255 and 255 become 0 and 255."""
    result: NDArray[np.uint8] = cv2.addWeighted(after, 0.5, before, -0.5, 128).astype(np.uint8, copy=False)
    return result


def mean_length(stacked: NDArray[np.float32]) -> float:
    """Return the mean length of the vectors of a flow field [2h, w], u above v, in its pixels."""
    # In place: a field of float64 is large, and there is one a frame.
    squares = np.square(stacked, dtype=np.float64)
    u, v = np.split(squares, 2)
    u += v
    return float(np.sqrt(u, out=u).mean())


def quantise(field: NDArray[np.float32]) -> tuple[NDArray[np.uint8], float]:
    """Return a flow field as bytes, and how many of its pixels code 127 stands for; 0: no motion."""
    # The scale is rounded first: the JSON holds four digits, and readers multiply by those.
    scale = round(float(max(field.max(), -field.min())), 4)
    if scale == 0:
        return np.full(field.shape, FLOW_ZERO, np.uint8), 0.0
    code = field * (FLOW_CODES / scale)
    np.rint(code, out=code)
    code += FLOW_ZERO
    return np.clip(code, 0, 255, out=code).astype(np.uint8), scale
