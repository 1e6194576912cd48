"""Stored frames, differences and flow, decoded again, are within the documented errors."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import simplejpeg
from folders import decode
from hypothesis import given
from hypothesis import strategies as st
from videos import moving_frames

from preprocess.decode import Geometry, Planes, VideoReader, shrink
from preprocess.encode.series import FRAMES_BEHIND, ThreadedEncoder, create_encoder, difference, mean_length, quantise


def planes(rgb: np.ndarray) -> Planes:
    """Full-range BT.601 planes of [h, w, 3] uint8, chroma averaged over 2x2."""
    ycc = cv2.cvtColor(rgb, cv2.COLOR_RGB2YCrCb)
    half = cv2.resize(ycc, (rgb.shape[1] // 2, rgb.shape[0] // 2), interpolation=cv2.INTER_AREA)
    return Planes(*(np.ascontiguousarray(plane) for plane in (ycc[..., 0], half[..., 2], half[..., 1])))


def luma(payload: bytes) -> np.ndarray:
    """The first plane of a JPEG as it is stored."""
    return simplejpeg.decode_jpeg(payload, colorspace="GRAY", fastdct=False)[..., 0].astype(int)


FRAMES = moving_frames(3, 4, size=(128, 160), step=3)


def encode(series: str) -> tuple[list[bytes], dict]:
    encoder = create_encoder(series)
    for frame in FRAMES:
        encoder.add(planes(frame))
    members = encoder.members()
    assert list(members) == [f"{n:05d}.jpg" for n in range(len(members))]
    return list(members.values()), encoder.info()


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def test_frames_are_the_planes() -> None:
    stored, info = encode("rgb")
    assert info == {"size": [128, 160], "kept": [0, 1, 2, 3]}
    for payload, frame in zip(stored, FRAMES, strict=True):
        assert rms(luma(payload) - planes(frame).y) < 1.5
        assert rms(decode(payload).astype(int) - frame) < 3


def test_differences_are_numpys_own() -> None:
    stored, info = encode("diff1")
    assert len(stored) == 3
    for n, payload in enumerate(stored):
        this, following = planes(FRAMES[n]), planes(FRAMES[n + 1])
        assert rms(2 * (luma(payload) - 128) - (following.y.astype(int) - this.y)) < 2.5
        assert info["magnitude"][n] == round(float(np.abs(following.y.astype(int) - this.y).mean()), 3)
        rgb = FRAMES[n + 1].astype(int) - FRAMES[n]
        assert rms(2 * (decode(payload).astype(int) - 128) - rgb) < 4


def test_difference_is_exact_before_coding() -> None:
    before, after = (grid.astype(np.uint8) for grid in np.mgrid[:256, :256])
    exact = 128 + (after.astype(float) - before) / 2
    assert np.abs(difference(before, after) - np.clip(exact, 0, 255)).max() <= 0.5
    assert difference(before, after)[0, 255] == 255
    assert difference(before, after)[255, 0] == 0
    assert (difference(before, before) == 128).all()


def test_flow_is_that_of_dis() -> None:
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    stored, info = encode("flow1")
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    grey = [planes(frame).y for frame in FRAMES]
    assert info["size"] == [256, 160]
    for n, payload in enumerate(stored):
        picture = decode(payload)
        assert picture.shape == (256, 160)
        field = (picture.astype(np.float32) - 128) * info["scale"][n] / 127
        expected = dis.calc(grey[n], grey[n + 1], None)
        assert rms(field[:128] - expected[..., 0]) < 0.02 * info["scale"][n]
        assert rms(field[128:] - expected[..., 1]) < 0.02 * info["scale"][n]
        assert np.median(field[:128]) == pytest.approx(-3, abs=0.3)  # the picture slides to the left
        assert info["magnitude"][n] == pytest.approx(np.hypot(*expected.transpose(2, 0, 1)).mean(), abs=1e-3)
    cv2.setNumThreads(threads)


@given(top=st.floats(0, 500, width=32), seed=st.integers(0, 99))
def test_quantised_flow_is_within_half_a_step(top: float, seed: int) -> None:
    field = np.random.default_rng(seed).uniform(-top, top, (4, 5, 2)).astype(np.float32)
    code, scale = quantise(field)
    step = scale / 127
    assert np.abs((code.astype(np.float64) - 128) * step - field).max() <= step / 2 + 1e-4


def test_lengths_are_numpys_own() -> None:
    field = np.random.default_rng(5).normal(size=(6, 7, 2)).astype(np.float32)
    stacked = np.concatenate([field[..., 0], field[..., 1]])
    assert mean_length(stacked) == np.sqrt(np.square(field, dtype=np.float64).sum(-1)).mean()


def test_alongside_changes_nothing() -> None:
    plain = create_encoder("flow1")
    many = [planes(frame) for frame in FRAMES * FRAMES_BEHIND]
    with ThreadPoolExecutor(1) as pool:
        alongside = ThreadedEncoder(create_encoder("flow1"), pool)
        for frame in many:
            plain.add(frame)
            alongside.add(frame)
        assert alongside.members() == plain.members()
        assert alongside.info() == plain.info()


def test_alongside_raises_what_its_encoder_raises() -> None:
    with ThreadPoolExecutor(1) as pool:
        alongside = ThreadedEncoder(create_encoder("diff1"), pool)
        for side in (32, 64):  # no difference of pictures of two sizes
            alongside.add(Planes(*(np.zeros((side, side), np.uint8) for _ in range(3))))
        with pytest.raises(cv2.error):
            alongside.members()


def test_still_pictures_have_no_flow() -> None:
    encoder = create_encoder("flow1")
    grey = Planes(np.full((64, 64), 90, np.uint8), *(np.full((32, 32), 128, np.uint8) for _ in range(2)))
    encoder.add(grey)
    encoder.add(grey)
    assert encoder.info()["scale"] == [0.0]
    assert (decode(encoder.members()["00000.jpg"]) == 128).all()


def test_shrink() -> None:
    assert shrink(np.zeros((256, 341), np.uint8), 128).shape == (128, 170)
    assert shrink(np.zeros((341, 256), np.uint8), 128).shape == (170, 128)
    assert shrink(np.zeros((64, 90), np.uint8), 128).shape == (64, 90)


@pytest.mark.parametrize(
    ("geometry", "size"), [(Geometry(64, 96), (64, 96)), (Geometry(short=36), (36, 48)), (Geometry(32, 32), (32, 32))]
)
def test_geometry(tiny_videos, geometry: Geometry, size: tuple[int, int]) -> None:
    path = min(tiny_videos.rglob("*.mp4"))
    with VideoReader(path, geometry, time_limit=60) as reader:
        frames = list(reader)
    assert len(frames) == 12
    assert reader.size == frames[0].y.shape == size
    assert frames[0].u.shape == (size[0] // 2, size[1] // 2)
    assert reader.source_size == (72, 96)
    flow = create_encoder("flow1")
    for frame in frames[:3]:
        flow.add(frame)
    assert len(flow.members()) == 2
