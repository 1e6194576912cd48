"""The generated data set: same seed, same videos; only motion tells the class."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest

from preprocess.datasets import synthetic
from preprocess.datasets.synthetic import render_video, splits, write_videos
from preprocess.datasets.synthetic_motion import CLASSES
from shards_spec.errors import ConfigError, FsarError

PROGRESS = np.linspace(0, 1, 24)
PAIRS = [(name, motion.reverse) for name, motion in CLASSES.items() if motion.reverse]


@pytest.fixture
def two_classes(monkeypatch):
    names = ("right", "left")
    monkeypatch.setattr(synthetic, "CLASSES", {name: CLASSES[name] for name in names})
    return names


def pose(name):
    poses = CLASSES[name].path(PROGRESS, np.random.default_rng(0))
    return np.stack([poses.x, poses.y, np.cos(poses.angle), np.sin(poses.angle), poses.zoom], axis=1)  # [T, 5]


def test_a_video_is_a_function_of_seed_class_and_number():
    first = render_video("right_then_up", 3, seed=1)
    assert first.shape == (24, 80, 80, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, render_video("right_then_up", 3, seed=1))
    for other in (("right_then_up", 3, 2), ("right_then_up", 4, 1), ("up_then_right", 3, 1)):
        name, number, seed = other
        assert not np.array_equal(first, render_video(name, number, seed=seed))


def test_kinds_do_not_cross_splits():
    names = splits()
    assert list(names) == ["train", "val", "test"]
    assert sorted(sum(names.values(), ())) == sorted(CLASSES)
    kinds = [{CLASSES[name].kind for name in names[split]} for split in names]
    assert all(not a & b for i, a in enumerate(kinds) for b in kinds[:i])
    assert all(len(names[split]) >= 5 for split in names)  # a 5-way episode of each
    assert 24 * len(CLASSES) <= 1000


@pytest.mark.parametrize(("name", "reverse"), PAIRS)
def test_reversed_pairs_are_the_same_path_backwards(name, reverse):
    assert CLASSES[reverse].reverse == name
    assert CLASSES[reverse].kind == CLASSES[name].kind
    assert pose(name) == pytest.approx(pose(reverse)[::-1], abs=1e-9)


def test_circles_differ_in_nothing_but_order():
    """A bag of frames cannot tell them apart: all go once round the anchor at the same distance."""
    for name in (name for name, motion in CLASSES.items() if motion.kind == "circle"):
        places = pose(name)[:-1, :2]  # the last is the first again
        assert places.mean(axis=0) == pytest.approx([0, 0], abs=1e-9)
        assert np.hypot(*places.T) == pytest.approx(np.ones(23))


def test_appearance_does_not_depend_on_the_class():
    """Class means of colours, background and drift differ as means of 12 videos do by chance."""
    rows = []
    for name in CLASSES:
        videos = [render_video(name, number, seed=0)[::6] for number in range(12)]
        rows.append([[v.mean(axis=(0, 1, 2)), v.std(axis=(0, 1, 2)), v.std(axis=0).mean(axis=(0, 1))] for v in videos])
    values = np.asarray(rows).reshape(len(CLASSES), 12, -1)[..., :6]  # [classes, videos, statistics]
    between = values.mean(axis=1).std(axis=0, ddof=1)
    expected = values.std(axis=1, ddof=1).mean(axis=0) / np.sqrt(12)
    assert (between < 1.5 * expected).all(), (between / expected).round(2)


def test_the_sprite_stands_out_and_moves():
    for name in ("right", "circle_cw_from_top", "spin_cw"):
        video = render_video(name, 0, seed=0).astype(np.float32)
        assert np.abs(np.diff(video, axis=0)).max() > 20


def test_written_videos_decode_to_what_was_rendered(tmp_path, two_classes):
    counted = []
    paths = write_videos(tmp_path, seed=0, per_class=2, on_written=counted.append)
    assert [path.relative_to(tmp_path).as_posix() for path in paths[:2]] == [
        "right/right_000.mp4",
        "right/right_001.mp4",
    ]
    assert sum(counted) == len(paths) == 4
    capture = cv2.VideoCapture(str(paths[0]))
    frames = [capture.read()[1] for _ in range(24)]
    assert not capture.read()[0]
    wanted = render_video("right", 0, seed=0)[..., ::-1]
    assert np.abs(np.stack(frames).astype(int) - wanted).mean() < 6


def test_equal_seeds_give_equal_bytes(tmp_path, two_classes):
    first, again, other = (
        [path.read_bytes() for path in write_videos(tmp_path / folder, seed=seed, per_class=1, workers=workers)]
        for folder, seed, workers in (("a", 0, 1), ("b", 0, 2), ("c", 1, 2))
    )
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_resume_keeps_whole_files_and_makes_the_missing(tmp_path, two_classes):
    paths = write_videos(tmp_path, seed=0, per_class=2)
    before = [path.read_bytes() for path in paths]
    paths[1].unlink()
    kept = paths[0].stat().st_mtime_ns
    (tmp_path / "right" / "right_001.mp4.tmp").write_bytes(b"a part")
    write_videos(tmp_path, seed=0, per_class=2)
    assert [path.read_bytes() for path in paths] == before
    assert paths[0].stat().st_mtime_ns == kept
    assert not list(tmp_path.rglob("*.tmp"))


def test_another_seed_or_number_in_the_same_folder_is_refused(tmp_path, two_classes):
    write_videos(tmp_path, seed=0, per_class=1)
    assert json.loads((tmp_path / "synthetic.json").read_text())["seed"] == 0
    for seed, number in ((1, 1), (0, 2)):
        with pytest.raises(ConfigError, match="holds other synthetic videos"):
            write_videos(tmp_path, seed=seed, per_class=number)


def test_a_failing_ffmpeg_is_reported_and_leaves_no_video(tmp_path, two_classes, monkeypatch):
    monkeypatch.setattr(synthetic, "ffmpeg_program", lambda: "false")
    with pytest.raises(FsarError, match="ffmpeg cannot write"):
        write_videos(tmp_path, per_class=1)
    assert not list(tmp_path.rglob("*.mp4"))
