"""Small real video files for the tests: textured frames, encoded by the same ffmpeg that decodes them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import cv2
import numpy as np

from preprocess.decode import ffmpeg_program


def texture(rng: np.random.Generator, height: int, width: int, *, cells: tuple[int, int] = (6, 8)) -> np.ndarray:
    """Smooth random colours of so many `cells` down and across: [height, width, 3] uint8."""
    coarse = rng.integers(0, 256, (*cells, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def moving_frames(seed: int, count: int, *, size: tuple[int, int] = (72, 96), step: int = 2) -> np.ndarray:
    """A texture that slides to the right by `step` pixels a frame: [count, height, width, 3] uint8."""
    rng = np.random.default_rng(seed)
    wide = texture(rng, size[0], size[1] + step * count)
    return np.stack([wide[:, step * t : step * t + size[1]] for t in range(count)])


def write_video(path: Path, frames: np.ndarray, *, fps: int = 12, codec: str = "mpeg4") -> Path:
    """Encode frames to a file whose container follows from its extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = frames.shape[1:3]
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "pipe:0"]
    target = ["-c:v", codec, "-q:v", "3", "-pix_fmt", "yuv420p", "-fflags", "+bitexact", f"file:{path}"]
    call = [ffmpeg_program(), "-nostdin", "-v", "error", "-y", *source, *target]
    subprocess.run(call, input=frames.tobytes(), check=True)
    return path
