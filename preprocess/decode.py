"""Decode one video file into YUV planes, by one ffmpeg process that opens nothing else.

Why one process a video: a video that makes the decoder crash, hang or fill memory takes only its
own decoder with it. A start costs some 60 ms, which `workers.job` hides.
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
from typing import IO, NamedTuple, Self

import cv2
import ffmpeg
import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray

from preprocess.containers import missing_bytes
from shards_spec import FsarError
from shards_spec.schema import Reason, printable

# Playlists and concat scripts open other files: they are refused, whatever their name.
CONTAINERS = "mov,avi,matroska,webm,mpegts,mpeg,asf,flv"
MOST_FRAMES = 99_999  # five digits number a frame
# 17 minutes at 30 frames a second. At 256x256, with motion, they take 1 GB until the video is done.
USUAL_FRAMES = 30_000
USUAL_PIXELS = 1 << 26  # 8192x8192: 100 MB a frame, of which a decoder holds up to 17
MOST_ALLOCATED = 1 << 30  # bytes that the decoder may ask for at once: headers announce any size
MOST_LOG = 1 << 22  # bytes that are read of what the decoder says
MOST_STORED_SIDE = 16_384  # a JPEG's side has 16 bits; a flow picture is two fields high, and half is kept spare
MIN_FRAMES = 2
SOURCE_SIZE = re.compile(  # it skips codec tags such as "0x0002", and titles that look alike
    r"^\[info\] +Stream #0:\d+[^ ]*: Video: .*?\b([1-9]\d{0,4})x([1-9]\d{0,4})\b", re.MULTILINE
)

FRAME_MARK = b"FRAME\n"  # of YUV4MPEG2, before each picture
# Ten frames of 256x256 fit into the pipe: the next decoder works while this video is encoded. Linux
# gives a pipe 64 kB unless asked, which is less than one frame.
PIPE_BYTES = 1 << 20

ERROR_LINE = re.compile(r"(?:\[[^\]]*\] )*\[(?:error|fatal)\] ?(.*)")

# ffmpeg's message counts the edges that it adds, so its size is not ours to quote.
TOO_MANY_PIXELS = re.compile(r"Picture size \d+x\d+ exceeds specified max pixel count (\d+)")


class VideoError(Exception):
    """A video that cannot be stored.

    Attributes:
        reason: One of the closed list `REASONS`.
        detail: Text without paths, times or control characters: the same on every machine.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        detail = printable(detail)  # ffmpeg quotes the file, and readers refuse control characters
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class DecoderKilledError(FsarError):
    """The decoder was killed from outside, which says nothing about the video."""


class Planes(NamedTuple):
    """One frame as full-range BT.601 YUV 4:2:0, as in JFIF, uint8.

    Attributes:
        y: Luma [h, w].
        u: Blue difference [ceil(h / 2), ceil(w / 2)].
        v: Red difference of the same shape.
    """

    y: NDArray[np.uint8]
    u: NDArray[np.uint8]
    v: NDArray[np.uint8]


@dataclass(frozen=True)
class Geometry:
    """Size of the stored frames, in pixels.

    Attributes:
        height: Frames are squashed to `height` x `width`; 0 if `short` is set.
        width: As `height`.
        short: The short side is scaled to it and the aspect kept; 0 if it is not set.
    """

    height: int = 0
    width: int = 0
    short: int = 0

    def scale(self) -> tuple[str, str]:
        """Return width and height for ffmpeg's scale filter.

        -2 keeps the aspect and rounds to an even number: chroma is stored at half the size.
        """
        if self.short:
            return f"if(gt(iw,ih),-2,{self.short})", f"if(gt(iw,ih),{self.short},-2)"
        return str(self.width), str(self.height)

    def __str__(self) -> str:
        return f"short side {self.short}" if self.short else f"{self.height}x{self.width}"


@cache
def ffmpeg_program() -> str:
    """Return the path of the ffmpeg to use: the system's, or that of the wheel imageio-ffmpeg.

    Raises:
        FsarError: there is no ffmpeg.
    """
    try:
        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError as error:
        raise FsarError("no ffmpeg found; install it, or the package imageio-ffmpeg which carries one") from error


@cache
def ffmpeg_version() -> str:
    """Return the version of the decoder, a part of every plan."""
    first = subprocess.run([ffmpeg_program(), "-version"], capture_output=True, text=True, check=True).stdout
    return "ffmpeg " + first.split()[2]


def command(path: Path, geometry: Geometry, *, max_pixels: int = USUAL_PIXELS) -> list[str]:
    """Return the ffmpeg call that decodes `path` to YUV4MPEG2 on standard output.

    Its frames are the same bytes on every CPU, see `_command`.
    """
    return [f"file:{path}" if argument == "PATH" else argument for argument in _command(geometry, max_pixels)]


@cache
def _command(geometry: Geometry, max_pixels: int) -> tuple[str, ...]:
    """Return the ffmpeg call with the word PATH in place of a file.

    ffmpeg has faster code for each kind of CPU, which rounds otherwise. `bitexact` (decoder and
    scaler), `idct=simple` and `accurate_rnd` choose code that is the same everywhere. One thread
    each, as the workers share the CPUs. Frames cross the pipe as YUV 4:2:0, half the bytes of RGB
    and what JPEG stores: no colour conversion on the way. `passthrough` neither repeats nor drops
    frames to fit a rate.
    """
    source = ffmpeg.input(
        "PATH",  # `command` replaces it: ffmpeg-python takes only names in UTF-8
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
    """An iterator over the `Planes` of a video; a context manager that leaves no process behind.

    Decoding begins at once and rests when the pipe is full. The time limit runs from the first
    frame that is asked for.

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
            # Ctrl-C is for us: a decoder that it ended would look like a damaged video.
            process_group=0,
        )
        assert self._process.stdout is not None
        with suppress(OSError):  # Linux limits the bytes of all pipes of a user
            fcntl.fcntl(self._process.stdout, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._watch = threading.Timer(time_limit, self._stop_late)
        self.fps, self.size, self.source_size = 0.0, (0, 0), (0, 0)

    def __iter__(self) -> Iterator[Planes]:
        """Yield the frames in order.

        Raises:
            VideoError: the video is not whole, damaged or too large. Frames before the fault were
                yielded by then, so that a caller stores nothing before the end.
            DecoderKilledError: the decoder was killed from outside.
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
        if max(height, width) > MOST_STORED_SIDE:
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
        """Check after the last frame that the video was whole.

        Raises:
            VideoError: it was not.
            DecoderKilledError: the decoder was killed, which says nothing about the video.
        """
        code = self._process.wait()
        self._log.seek(0)
        log = self._log.read(MOST_LOG).decode("utf-8", "replace")
        if self._late:
            raise VideoError("timeout", "the decoder did not end within the time limit")
        if -code in {signal.SIGKILL, signal.SIGTERM}:
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
        """End the decoder, also one that was not read to its end."""
        self._watch.cancel()
        if self._process.poll() is None:
            self._process.kill()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process.wait()
        self._log.close()


def _why_nothing(log: str) -> VideoError:
    """Return the reason why a decoder delivered no picture at all."""
    if "matches no streams" in log:
        return VideoError("no-video-stream", "sound without pictures")
    if "Stream #0:" not in log:
        return VideoError("not-a-video", "no container that is known (AVI, MP4/MOV, Matroska/WebM, MPEG, ASF, FLV)")
    return VideoError("no-frames", "a video stream is declared but no picture follows")


def _check_file(path: Path) -> None:
    """Check that a path is a regular file with content, before ffmpeg opens it.

    Raises:
        VideoError: it is not.
    """
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
    """Convert full-range BT.601 planes to RGB [h, w, 3].

    Chroma is scaled up as libjpeg does ("fancy upsampling"): 3/4 of the nearer value and 1/4 of the
    farther one. So raw frames have the colours of decoded JPEGs.
    """
    height, width = planes.y.shape
    chroma = [
        cv2.resize(plane, (2 * plane.shape[1], 2 * plane.shape[0]), interpolation=cv2.INTER_LINEAR_EXACT)
        for plane in (planes.v, planes.u)
    ]
    ycrcb = cv2.merge([planes.y, *(plane[:height, :width] for plane in chroma)])
    rgb: NDArray[np.uint8] = cv2.cvtColor(ycrcb, cv2.COLOR_YCrCb2RGB).astype(np.uint8, copy=False)
    return rgb


def shrink(image: NDArray[np.uint8], short_side: int) -> NDArray[np.uint8]:
    """Scale a picture [h, w] down by area averaging to a short side; smaller pictures stay."""
    height, width = image.shape
    factor = short_side / min(height, width)
    if factor >= 1:
        return image
    size = (round(width * factor), round(height * factor))
    result: NDArray[np.uint8] = cv2.resize(image, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
    return result
