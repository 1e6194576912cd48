"""Videos to measure on, where no real ones are given: of the size, length and bit rate of UCF101's."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from preprocess.decode import ffmpeg_program

# UCF101: 320x240, 25 frames/s, XviD at 500 to 600 kb/s, 186 frames on average. Noise makes the generated pictures as
# dear to decode as filmed ones: without it nearly every block would be skipped.
_FPS, _SIZE, _RATE, _NOISE = 25, "320x240", "550k", "noise=alls=7:allf=t"
_FEWEST, _SPREAD = 128, 117


def make_clips(folder: Path, *, classes: int = 5, per_class: int = 8) -> Path:
    """Write `folder`/class_N/clip_N.avi: XviD, 320x240, 128 to 244 frames, mandelbrot zooms and test patterns."""
    numbers = range(classes * per_class)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(lambda number: _make_clip(folder, number, per_class), numbers))
    return folder


def _make_clip(folder: Path, number: int, per_class: int) -> None:
    path = folder / f"class_{number // per_class}" / f"clip_{number:03d}.avi"
    path.parent.mkdir(parents=True, exist_ok=True)
    zoom = f"mandelbrot=size={_SIZE}:rate={_FPS}:start_scale={0.5 + number / 20}:end_scale=0.05:end_pts=250"
    pattern = f"testsrc2=size={_SIZE}:rate={_FPS}"
    frames = _FEWEST + 37 * number % _SPREAD
    source = ["-f", "lavfi", "-i", pattern if number % 2 else zoom, "-vf", f"{_NOISE}:all_seed={number + 1}"]
    coding = ["-c:v", "mpeg4", "-vtag", "xvid", "-b:v", _RATE, "-g", "250", "-pix_fmt", "yuv420p"]
    words = [ffmpeg_program(), "-nostdin", "-v", "error", "-y", *source, "-frames:v", str(frames), *coding, str(path)]
    subprocess.run(words, check=True)
