"""Generate videos whose class is only their motion: a textured sprite moves over a background."""

from __future__ import annotations

import hashlib
import math
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import cv2
import ffmpeg
import numpy as np
from numpy.typing import NDArray

from preprocess.datasets.synthetic_motion import CLASSES, Poses
from preprocess.decode import ffmpeg_program
from shards_spec.errors import ConfigError, FsarError
from shards_spec.files import disk_errors, json_bytes, publish, read_json, temporary, write_whole

Image = NDArray[np.float32]

FPS = 12
SPECIFICATION = "synthetic.json"
EDITION = 1  # of the generator: higher when the same seed would give other videos
PATCH = 64  # side of the sprite's own image
# Ranges of what is drawn anew for every video; lengths in sides of the frame.
SPRITE_SIDE = (0.34, 0.46)
AMPLITUDE = (0.2, 0.26)
ANCHOR = 0.12  # the anchor is this far from the middle of the frame at most, in x and in y
TILT = 0.2  # radians
DRIFT = 0.2  # way of a drifting background
CONTRAST = (0.1, 0.5)  # of the background: 1 would be as strong as the sprite's own texture


def palette(rng: np.random.Generator, *, away_from: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
    """Draw two random colours [2, 3] in [0, 255].

    Args:
        rng: The random generator.
        away_from: A colour [3]; of four pairs the one farthest from it is taken.
    """
    draws = rng.uniform(0, 255, (4, 2, 3))
    if away_from is None:
        return np.asarray(draws[0])
    distance = np.linalg.norm(draws - away_from, axis=2).min(axis=1)  # [4]
    return np.asarray(draws[distance.argmax()])


def texture(rng: np.random.Generator, size: int, cells: int, *, colours: NDArray[np.float64]) -> Image:
    """Draw smooth noise between two colours.

    Args:
        rng: The random generator.
        size: Side of the picture in pixels.
        cells: Random values along a side; between them the noise is smooth.
        colours: The two colours [2, 3].

    Returns:
        A picture, float32 [size, size, 3] in [0, 255].
    """
    grid = rng.random((cells, cells), dtype=np.float32)
    mix = cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC).clip(0, 1)[..., None]
    return np.asarray(colours[0] * mix + colours[1] * (1 - mix), dtype=np.float32)


def outline(rng: np.random.Generator) -> Image:
    """Draw the soft-edged opacity of a random polygon, float32 [PATCH, PATCH, 1] in [0, 1]."""
    count = int(rng.integers(3, 13))
    angles = (np.arange(count) + rng.uniform(-0.25, 0.25, count)) * 2 * math.pi / count
    radii = rng.uniform(0.55, 1.0, count) * 0.46 * PATCH
    aspect = rng.uniform(0.7, 1.0)
    points = np.stack([np.cos(angles) * radii, np.sin(angles) * radii * aspect], axis=1) + PATCH / 2
    mask = np.zeros((PATCH, PATCH), np.float32)
    cv2.fillPoly(mask, [points.round().astype(np.int32)], 1.0)
    return np.asarray(cv2.GaussianBlur(mask, (5, 5), 0)[..., None])


def sprite(rng: np.random.Generator, *, colours: NDArray[np.float64]) -> Image:
    """Draw a random textured shape: colours and opacity, float32 [PATCH, PATCH, 3 + 1].

    The colours are multiplied by the opacity already, so that warping blends edges correctly.
    """
    alpha = outline(rng)
    pattern = texture(rng, PATCH, int(rng.integers(2, 7)), colours=colours)
    return np.concatenate([pattern * alpha, alpha], axis=2)


def placements(poses: Poses, rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    """Return affine maps [T, 2, 3] from sprite to frame.

    They are the poses of the class from a random anchor, size, angle and tilt.
    """
    amplitude = rng.uniform(*AMPLITUDE) * size
    anchor = size / 2 + rng.uniform(-ANCHOR, ANCHOR, 2) * size
    tilt = rng.uniform(-TILT, TILT)
    x = anchor[0] + amplitude * (math.cos(tilt) * poses.x - math.sin(tilt) * poses.y)  # [T]
    y = anchor[1] + amplitude * (math.sin(tilt) * poses.x + math.cos(tilt) * poses.y)
    scale = rng.uniform(*SPRITE_SIDE) * size / PATCH * 2.0**poses.zoom
    angle = rng.uniform(0, 2 * math.pi) + poses.angle
    a, b = scale * np.cos(angle), scale * np.sin(angle)
    half = PATCH / 2
    rows = [[a, -b, x - a * half + b * half], [b, a, y - b * half - a * half]]
    return np.moveaxis(np.asarray(rows), 2, 0)


def backgrounds(rng: np.random.Generator, frames: int, size: int, *, colours: NDArray[np.float64]) -> Image:
    """Draw a random texture that rests or drifts at constant speed, float32 [T, size, size, 3]."""
    margin = math.ceil(DRIFT * size / 2) + 1  # pixels that a drift can bring into view
    canvas = texture(rng, size + 2 * margin, int(rng.integers(4, 14)), colours=colours)
    angle, distance = rng.uniform(0, 2 * math.pi), rng.uniform(0, DRIFT) * size / 2 * (rng.random() < 0.6)
    direction = np.asarray([math.cos(angle), math.sin(angle)])
    centre = canvas.shape[0] / 2
    steps = np.linspace(-1, 1, frames)[:, None] * direction * distance + centre  # [T, 2]
    views = [cv2.getRectSubPix(canvas, (size, size), (float(x), float(y))) for x, y in steps]
    return np.stack(views)


def pace(rng: np.random.Generator, frames: int) -> NDArray[np.float64]:
    """Draw how much of the path is done in each frame [T], with a random rest before and after."""
    first, last = rng.uniform(0.0, 0.1), rng.uniform(0.9, 1.0)
    return ((np.linspace(0, 1, frames) - first) / (last - first)).clip(0, 1)


def splits() -> dict[str, tuple[str, ...]]:
    """Return the class names of each split; no kind of motion is in two splits."""
    return {
        split: tuple(name for name, motion in CLASSES.items() if motion.split == split)
        for split in ("train", "val", "test")
    }


def render_video(name: str, number: int, *, seed: int, frames: int = 24, size: int = 80) -> NDArray[np.uint8]:
    """Render one video, uint8 [T, size, size, 3]: a pure function of seed, class and number."""
    # Philox is counter-based: its stream is the same on every machine, and a hash as the key makes
    # the streams of two videos independent, in whatever order they are rendered.
    key = hashlib.sha256(f"{seed}/{name}/{number}".encode()).digest()[:16]
    rng = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    poses = CLASSES[name].path(pace(rng, frames), rng)
    maps = placements(poses, rng, size)
    colours = palette(rng)
    colours = colours.mean(axis=0) + rng.uniform(*CONTRAST) * (colours - colours.mean(axis=0))
    shape = sprite(rng, colours=palette(rng, away_from=colours.mean(axis=0)))
    video = backgrounds(rng, frames, size, colours=colours)
    for t in range(frames):
        layer = cv2.warpAffine(shape, maps[t], (size, size), flags=cv2.INTER_LINEAR)
        video[t] = video[t] * (1 - layer[..., 3:]) + layer[..., :3]
    return np.rint(video).clip(0, 255).astype(np.uint8)


def write_videos(
    folder: Path,
    *,
    seed: int = 0,
    per_class: int = 24,
    workers: int = 2,
    on_written: Callable[[int], None] | None = None,
) -> list[Path]:
    """Write `CLASS/CLASS_NUMBER.mp4` for every class; keep the files that a former run finished.

    Args:
        folder: Top of the tree, made when it does not exist.
        seed: Seed of all videos.
        per_class: Videos of each class.
        workers: Videos rendered and encoded at a time.
        on_written: Called with the number of videos that were written since the last call.

    Raises:
        ConfigError: the folder holds videos of another seed, number or edition.
        FsarError: ffmpeg cannot encode, or the disk refuses.
    """
    claim(folder, seed=seed, per_class=per_class)
    paths = {
        folder / name / f"{name}_{number:03d}.mp4": (name, number) for name in CLASSES for number in range(per_class)
    }
    missing = [path for path in paths if not path.exists()]
    report = on_written or (lambda _count: None)
    report(len(paths) - len(missing))
    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(write_video, path, *paths[path], seed=seed) for path in missing]
        try:
            for job in as_completed(jobs):
                job.result()
                report(1)
        finally:
            pool.shutdown(cancel_futures=True)
    return list(paths)


def claim(folder: Path, *, seed: int, per_class: int) -> None:
    """Make the folders and note seed, number and edition of their videos, before the first one.

    Raises:
        ConfigError: the folder holds videos of another seed, number or edition.
    """
    wanted = {"edition": EDITION, "per_class": per_class, "seed": seed}
    note = folder / SPECIFICATION
    if note.exists():
        found = read_json(note)
        if found != wanted:
            raise ConfigError(
                f"{folder} holds other synthetic videos ({found}, asked for {wanted}); choose a new folder"
            )
    with disk_errors(folder):
        for name in CLASSES:
            (folder / name).mkdir(parents=True, exist_ok=True)
    write_whole(note, json_bytes(wanted))


def write_video(path: Path, name: str, number: int, *, seed: int) -> None:
    """Render and encode one video; `path` appears when it is whole.

    Raises:
        FsarError: ffmpeg cannot encode, or the disk refuses.
    """
    frames = render_video(name, number, seed=seed)
    unfinished = temporary(path)
    call = encode_command(unfinished, size=frames.shape[1])
    done = subprocess.run(call, input=frames.tobytes(), capture_output=True, check=False)
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no reason given"]
        raise FsarError(f"ffmpeg cannot write {path}: {reason[0]}; make room or install another ffmpeg")
    publish(unfinished, path)


def encode_command(path: Path, *, size: int) -> list[str]:
    """Return the ffmpeg call that encodes raw RGB frames from standard input to .mp4.

    The codec is MPEG-4 part 2, which every build of ffmpeg can encode. One thread and the flags
    `bitexact` make the bytes the same every time.
    """
    source = ffmpeg.input("pipe:0", format="rawvideo", pix_fmt="rgb24", s=f"{size}x{size}", r=FPS)
    target = source.output(
        f"file:{path}",
        format="mp4",
        vcodec="mpeg4",
        pix_fmt="yuv420p",
        threads=1,
        sws_flags="bilinear+accurate_rnd+bitexact",
        flags="bitexact",
        fflags="+bitexact",
        **{"q:v": 2},
    )
    call: list[str] = ffmpeg.compile(target.global_args("-v", "error"), cmd=ffmpeg_program(), overwrite_output=True)
    return call
