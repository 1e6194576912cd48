"""Decode one video file into YUV planes, by one ffmpeg process that opens nothing else.

What the container says of its own completeness is read too: a file cut short is found where decoders stay silent.
"""

from __future__ import annotations

import fcntl
import re
import signal
import stat
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple, Self

import cv2
import ffmpeg
import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray

from shards_spec import FsarError
from shards_spec.schema import Reason, printable

UNKNOWN_RIFF_SIZES = {0, 0xFFFFFFFF}  # written by encoders that could not seek back


def missing_bytes(path: Path) -> int:
    """Bytes that the container declares beyond the end of the file; 0 where it is whole or does not say.

    AVI declares the size of its RIFF chunks, MP4 and MOV that of their boxes. Matroska, MPEG-TS and
    others declare nothing that can be relied on: for them only the decoder's own errors count.
    """
    total = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(12)
        if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
            end = _end_of_riff(file, total)
        elif head[4:8] in {b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip"}:
            end = _end_of_boxes(file, total)
        else:
            end = total
    return max(0, end - total)


def _end_of_riff(file: BinaryIO, total: int) -> int:
    """Where the last RIFF chunk (AVI, then AVIX for files over 1 GB) should end."""
    position: int = 0
    while position + 8 <= total:
        file.seek(position)
        name, size = file.read(4), int.from_bytes(file.read(4), "little")
        if name != b"RIFF" or size in UNKNOWN_RIFF_SIZES:
            break
        position += 8 + size + size % 2
        if position - size % 2 > total:
            return position - size % 2
    return min(position, total)


def _end_of_boxes(file: BinaryIO, total: int) -> int:
    """Where the last box of the top level should end."""
    position = 0
    while position + 8 <= total:
        file.seek(position)
        head = file.read(8)
        size = int.from_bytes(head[:4], "big")
        if not head[4:].isalnum():  # no box: something that was appended
            return total
        if size == 1:  # a 64-bit size follows
            large = file.read(8)
            size = int.from_bytes(large, "big") if len(large) == 8 else total
        if size < 8:  # 0: to the end of the file
            return total
        position += size
    return position


# Containers only: playlists and concat scripts, which open other files, are refused whatever their name.
CONTAINERS = "mov,avi,matroska,webm,mpegts,mpeg,asf,flv"
MOST_FRAMES = 99_999  # five digits number a frame
USUAL_FRAMES = 30_000  # 17 minutes at 30 frames a second; at 256x256, with motion, 1 GB until the video is done
USUAL_PIXELS = 1 << 26  # 8192x8192: 100 MB a frame, of which a decoder holds up to 17
MOST_ALLOCATED = 1 << 30  # bytes that the decoder may ask for at once, whatever a container announces
MOST_LOG = 1 << 22  # bytes that are read of what the decoder says
MOST_SIDE = 16_384  # a JPEG's side has 16 bits, and a flow picture is two fields high
MIN_FRAMES = 2
SOURCE_SIZE = re.compile(  # not the tag "0x0002", nor a title that looks alike
    r"^\[info\] +Stream #0:\d+[^ ]*: Video: .*?\b([1-9]\d{0,4})x([1-9]\d{0,4})\b", re.MULTILINE
)

FRAME_MARK = b"FRAME\n"  # of YUV4MPEG2, before each picture
PIPE_BYTES = 1 << 20  # ten frames of 256x256 wait there, where Linux gives not even one of its own accord

ERROR_LINE = re.compile(r"(?:\[[^\]]*\] )*\[(?:error|fatal)\] ?(.*)")

TOO_MANY_PIXELS = re.compile(r"Picture size \d+x\d+ exceeds specified max pixel count (\d+)")  # edges added to the size


class VideoError(Exception):
    """A video that cannot be stored: `reason` from the closed list, `detail` without paths, times or controls."""

    def __init__(self, reason: Reason, detail: str) -> None:
        detail = printable(detail)  # ffmpeg repeats what the file says of itself, and readers refuse controls
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class DecoderKilledError(FsarError):
    """Somebody killed the decoder: it says nothing about the video."""


class Planes(NamedTuple):
    """One frame, full-range BT.601 YUV 4:2:0 as in JFIF: [h, w], [ceil(h/2), ceil(w/2)] twice, uint8."""

    y: NDArray[np.uint8]
    u: NDArray[np.uint8]
    v: NDArray[np.uint8]


@dataclass(frozen=True)
class Geometry:
    """Size of the stored frames: all squashed to `height` x `width`, or the short side scaled to `short`."""

    height: int = 0
    width: int = 0
    short: int = 0

    def scale(self) -> tuple[str, str]:
        """Width and height for ffmpeg's scale filter; -2 keeps the aspect and rounds to even."""
        if self.short:
            return f"if(gt(iw,ih),-2,{self.short})", f"if(gt(iw,ih),{self.short},-2)"
        return str(self.width), str(self.height)

    def __str__(self) -> str:
        return f"short side {self.short}" if self.short else f"{self.height}x{self.width}"


@cache
def ffmpeg_program() -> str:
    """Path of the ffmpeg to use: the system's, or the one that the imageio-ffmpeg wheel carries.

    Raises:
        FsarError: there is none.
    """
    try:
        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError as error:
        raise FsarError("no ffmpeg found; install it, or the package imageio-ffmpeg which carries one") from error


@cache
def ffmpeg_version() -> str:
    """Version of the decoder, a part of every plan."""
    first = subprocess.run([ffmpeg_program(), "-version"], capture_output=True, text=True, check=True).stdout
    return "ffmpeg " + first.split()[2]


def command(path: Path, geometry: Geometry, *, max_pixels: int = USUAL_PIXELS) -> list[str]:
    """The ffmpeg call that decodes `path` to YUV4MPEG2 on standard output, bit-exact on every CPU."""
    return [f"file:{path}" if argument == "PATH" else argument for argument in _command(geometry, max_pixels)]


@cache
def _command(geometry: Geometry, max_pixels: int) -> tuple[str, ...]:
    source = ffmpeg.input(
        "PATH",  # put in above: ffmpeg-python takes no name that is not UTF-8
        protocol_whitelist="file",
        format_whitelist=CONTAINERS,
        threads=1,
        max_pixels=max_pixels,
        flags="bitexact",
        idct="simple",
    )
    width, height = geometry.scale()
    scaled = source["V:0"].filter(  # V: a cover picture is no video
        "scale",
        width,
        height,
        flags="bilinear+accurate_rnd+bitexact",
        out_range="full",
        out_color_matrix="bt601",
    )
    output = scaled.output("pipe:1", format="yuv4mpegpipe", pix_fmt="yuvj420p", strict=-1, fps_mode="passthrough")
    log = ["-hide_banner", "-nostdin", "-nostats", "-loglevel", "level+info"]
    bounds = ["-max_alloc", str(MOST_ALLOCATED), "-filter_threads", "1"]
    return tuple(output.global_args(*log, *bounds).compile(cmd=ffmpeg_program()))


class VideoReader:
    """Iterates the `Planes` of a video; a context manager that leaves no process behind.

    Decoding begins at once and rests when the pipe is full; the time limit runs from the first frame asked for.

    Attributes:
        fps: Nominal frames a second.
        size: Height and width of the delivered frames.
        source_size: Height and width of the video's own frames.
    """

    def __init__(
        self,
        path: Path,
        geometry: Geometry,
        *,
        time_limit: float,
        max_frames: int = USUAL_FRAMES,
        max_pixels: int = USUAL_PIXELS,
    ) -> None:
        _check_file(path)
        self._path, self._late, self._max_frames = path, False, max_frames
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 -- closed with the reader; a pipe could fill up and block
        self._process = subprocess.Popen(
            command(path, geometry, max_pixels=max_pixels),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            process_group=0,  # Ctrl-C is for us: a decoder that it ends would look like a damaged video
        )
        assert self._process.stdout is not None
        with suppress(OSError):  # a user's pipes may hold only so much in all
            fcntl.fcntl(self._process.stdout, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._watch = threading.Timer(time_limit, self._stop_late)
        self.fps, self.size, self.source_size = 0.0, (0, 0), (0, 0)

    def __iter__(self) -> Iterator[Planes]:
        """Frames in order.

        Raises:
            VideoError: the video is not whole, not sound or too large; frames before the fault were delivered.
        """
        assert self._process.stdout is not None
        self._watch.start()
        count = 0
        for count, planes in enumerate(self._frames(self._process.stdout), 1):
            if count > self._max_frames:  # the decoder is ended with the reader
                raise VideoError("too-long", f"more than {self._max_frames} frames")
            yield planes
        self._check_end(count)

    def _frames(self, pipe: IO[bytes]) -> Iterator[Planes]:
        header = pipe.readline()
        if not header:
            return
        fields = {field[:1]: field[1:] for field in header.decode("ascii").split()[1:]}
        width, height = int(fields["W"]), int(fields["H"])
        rate, per = map(int, fields["F"].split(":"))
        self.fps, self.size = rate / per, (height, width)
        if max(height, width) > MOST_SIDE:
            raise VideoError("too-large", f"frames of {width}x{height}")
        half = (-(-height // 2), -(-width // 2))
        luma, chroma = height * width, half[0] * half[1]
        while True:
            data = np.empty(len(FRAME_MARK) + luma + 2 * chroma, np.uint8)
            if pipe.readinto(data) < len(data):  # type: ignore[attr-defined]  # a buffered reader, without a copy
                return
            assert data[: len(FRAME_MARK)].tobytes() == FRAME_MARK
            flat = data[len(FRAME_MARK) :]
            u, v = flat[luma : luma + chroma], flat[luma + chroma :]
            yield Planes(flat[:luma].reshape(height, width), u.reshape(half), v.reshape(half))

    def _check_end(self, count: int) -> None:
        """Decide, after the last frame, whether the video was whole."""
        code = self._process.wait()
        self._log.seek(0)
        log = self._log.read(MOST_LOG).decode("utf-8", "replace")
        if self._late:
            raise VideoError("timeout", "the decoder did not end within the time limit")
        if -code in {signal.SIGKILL, signal.SIGTERM}:  # it says nothing about the video
            raise DecoderKilledError("the decoder was killed (out of memory?); type the same command again")
        errors = [match[1] for line in log.splitlines() if (match := ERROR_LINE.match(line))]
        if large := next(filter(None, map(TOO_MANY_PIXELS.match, errors)), None):
            raise VideoError("too-large", f"frames of more than {large[1]} pixels")
        missing = missing_bytes(self._path)
        if missing:
            raise VideoError("truncated", f"the container declares {missing} bytes beyond the end of the file")
        if count == 0:
            raise _why_nothing(log)
        if errors or code:
            first = re.sub(r"0x[0-9a-f]+|'?file:.*", "", errors[0]) if errors else f"exit code {code}"
            raise VideoError("damaged", f"the decoder met {max(len(errors), 1)} errors, the first: {first.strip()}")
        if count < MIN_FRAMES:
            raise VideoError("one-frame", "a single picture: nothing moves in it")
        size = SOURCE_SIZE.search(log)
        self.source_size = (int(size[2]), int(size[1])) if size else self.size

    def _stop_late(self) -> None:
        self._late = True
        self._process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the decoder, whether it was read to its end or not."""
        self._watch.cancel()
        if self._process.poll() is None:
            self._process.kill()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process.wait()
        self._log.close()


def _why_nothing(log: str) -> VideoError:
    """The reason why a decoder delivered no picture at all."""
    if "matches no streams" in log:
        return VideoError("no-video-stream", "sound without pictures")
    if "Stream #0:" not in log:
        return VideoError("not-a-video", "no container that is known (AVI, MP4/MOV, Matroska/WebM, MPEG, ASF, FLV)")
    return VideoError("no-frames", "a video stream is declared but no picture follows")


def _check_file(path: Path) -> None:
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise VideoError("unreadable", "a folder that is named like a video")
        if not stat.S_ISREG(mode):  # to open a pipe would wait for ever
            raise VideoError("unreadable", "no regular file")
        with path.open("rb") as file:
            if not file.read(1):
                raise VideoError("not-a-video", "the file is empty")
    except OSError as error:
        raise VideoError("unreadable", error.strerror or "it cannot be opened") from error


def to_rgb(planes: Planes) -> NDArray[np.uint8]:
    """[h, w, 3] of full-range BT.601 planes; chroma is scaled up as libjpeg does (3/4 the nearer, 1/4 the farther)."""
    height, width = planes.y.shape
    chroma = [
        cv2.resize(plane, (2 * plane.shape[1], 2 * plane.shape[0]), interpolation=cv2.INTER_LINEAR_EXACT)
        for plane in (planes.v, planes.u)
    ]
    ycrcb = cv2.merge([planes.y, *(plane[:height, :width] for plane in chroma)])
    rgb: NDArray[np.uint8] = cv2.cvtColor(ycrcb, cv2.COLOR_YCrCb2RGB).astype(np.uint8, copy=False)
    return rgb


def shrink(image: NDArray[np.uint8], short_side: int) -> NDArray[np.uint8]:
    """Scale an image down by area averaging until its short side is `short_side`; smaller ones stay."""
    height, width = image.shape
    factor = short_side / min(height, width)
    if factor >= 1:
        return image
    size = (round(width * factor), round(height * factor))
    result: NDArray[np.uint8] = cv2.resize(image, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
    return result
