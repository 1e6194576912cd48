from __future__ import annotations

import colorsys
import importlib.util
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines.augment import clips as augment
from pipelines.augment.on_cpu import ClipBuffers, Target, jitter_frame
from pipelines.draw import Jitter, draw_jitter
from pipelines.episodes.clip_views import View

FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN = np.load(FOLDER / "molo" / "transforms.npz")
MEAN, STD = (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)


def golden_clip() -> torch.Tensor:
    spec = importlib.util.spec_from_file_location("fill", FOLDER / "fill.py")
    fill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fill)
    return torch.from_numpy(np.floor(256 * fill.uniform("clip", (3, 60, 80, 3), 11)).astype(np.uint8))


CLIP = golden_clip()  # [T, H, W, 3]
CORNER = CLIP[:, :16, :16].permute(0, 3, 1, 2) / 255  # [T, 3, 16, 16]


def assert_golden(colours: torch.Tensor, name: str) -> None:
    torch.testing.assert_close(
        colours.transpose(0, 1), torch.from_numpy(GOLDEN[name]), atol=1e-5, rtol=0, check_dtype=False
    )


@pytest.mark.parametrize(
    ("name", "value"), [("brightness", 1.3), ("contrast", 0.7), ("saturation", 1.4), ("hue", 0.12)]
)
def test_colour_operations_are_those_of_the_reference(name, value):
    assert_golden(getattr(augment, name)(CORNER, value), name)


def test_greyscale_is_that_of_the_reference():
    assert_golden(augment.greyscale(CORNER).expand_as(CORNER), "grayscale")


@pytest.mark.parametrize("seed", [21, 22, 23, 24])
def test_whole_jitters_are_those_of_the_reference(seed):
    jitter = draw_jitter(random.Random(seed))
    assert_golden(augment.colour_jitter(CORNER[None], [jitter])[0], f"colour_jitter_seed{seed}")


def view(box: tuple[int, int] | None = None, **options) -> View:
    given = {"reads": 0, "indices": (0, 1, 2), "flip": False, "box": box, "jitter": None}
    return View(**{**given, **options})


def render(frames: list[torch.Tensor], views: list[View], crop: int = 224, resize: int = 256) -> torch.Tensor:
    return augment.render(frames, views, mean=MEAN, std=STD, crop=crop, resize=resize)


def test_the_test_pipeline_is_that_of_the_reference():
    (clip,) = render([CLIP], [view((16, 16))])
    assert_golden(clip[..., ::16, ::16], "test_pipeline_every16")
    assert clip.mean().item() == pytest.approx(GOLDEN["test_pipeline_mean"].item(), abs=1e-5)
    assert clip.double().norm().item() == pytest.approx(GOLDEN["test_pipeline_l2"].item(), rel=1e-5)


def test_the_random_crop_is_that_of_the_reference():
    left, top = GOLDEN["train_crop_xy"].tolist()
    (clip,) = render([CLIP], [view((top, left))])
    assert_golden(clip[..., ::16, ::16] * 0.225 + 0.45, "train_crop_every16")  # stored before normalisation


@given(seed=st.integers(0, 2**32 - 1))
def test_jitter_on_a_cpu_is_that_of_the_formulas(seed):
    jitter = draw_jitter(random.Random(seed))
    pixels = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (1, 3, 9, 11)).astype(np.uint8))
    pixels[..., 0], pixels[..., 1, :] = pixels[:, :1, :, 0], 255  # greys and white too
    expected = augment.colour_jitter(pixels[None] / 255, [jitter])[0, 0]
    frame = (pixels[0].permute(1, 2, 0) / 255).contiguous().numpy()
    jitter_frame(frame, np.empty_like(frame), jitter)
    torch.testing.assert_close(torch.from_numpy(frame).permute(2, 0, 1), expected, atol=1e-5, rtol=0)


def test_hue_agrees_with_colorsys():
    colours = torch.rand(1, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    colours[..., :3, :] = colours[:, :1, :3]  # greys, black and white among them
    colours[..., 0, :2] = torch.tensor([0.0, 1.0])
    for shift in (-0.25, 0.0, 0.1, 0.5):
        turned = augment.hue(colours, shift)
        for y, x in np.ndindex(10, 10):
            h, s, v = colorsys.rgb_to_hsv(*colours[0, :, y, x].tolist())
            expected = torch.tensor(colorsys.hsv_to_rgb((h + shift) % 1, s, v))
            torch.testing.assert_close(turned[0, :, y, x], expected, atol=2e-6, rtol=0)


def test_grey_comes_first():
    jitter = Jitter(1.2, 0.8, 1.3, 0.2, (3, 0, 2, 1), True)
    jittered = augment.colour_jitter(CORNER[None], [jitter])[0]
    expected = augment.contrast(augment.brightness(augment.greyscale(CORNER).expand_as(CORNER), 1.2), 0.8)
    torch.testing.assert_close(jittered, expected, atol=1e-5, rtol=0)


def test_clips_jittered_together_equal_clips_jittered_alone():
    clips = torch.rand(6, 2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    before = clips.clone()
    jitters = [draw_jitter(random.Random(seed)) for seed in range(6)]
    together = augment.colour_jitter(clips, jitters)
    for clip, jitter, jittered in zip(clips, jitters, together, strict=True):
        torch.testing.assert_close(jittered, augment.colour_jitter(clip[None], [jitter])[0])
    assert torch.equal(clips, before)


def test_flip_then_crop_equals_the_mirrored_window_then_flip():
    size, crop, top, left = 40, 32, 3, 5
    frames = CLIP[:, :size, :size].contiguous()
    whole = render([frames], [view((top, left), flip=True)], crop=crop, resize=size)
    start = size - crop - left
    window = frames[:, top : top + crop, start : start + crop].contiguous()
    torch.testing.assert_close(whole, render([window], [view(flip=True)], crop=crop, resize=size))


def test_views_of_several_kinds_land_in_their_places(monkeypatch):
    window, whole = CLIP[:, :32, :32].contiguous(), CLIP
    jitter = draw_jitter(random.Random(3))
    views = [
        view(),
        view((4, 2), reads=1),
        view(flip=True, jitter=jitter),
        view((0, 8), reads=1, flip=True),
        view(indices=(2, 2, 0)),
        view((8, 1), reads=1, jitter=jitter),
    ]
    alone = torch.cat([render([window, whole], [one], crop=32, resize=40) for one in views])
    torch.testing.assert_close(render([window, whole], views, crop=32, resize=40), alone)
    one_by_one = augment._batches  # batches as a GPU gets them
    monkeypatch.setattr(augment, "_batches", lambda views, _: one_by_one(views, torch.device("meta")))
    torch.testing.assert_close(render([window, whole], views, crop=32, resize=40), alone)


def test_a_window_without_changes_is_only_normalised():
    clip = render([CLIP[:, :32, :32]], [view()], crop=32, resize=40)[0]
    expected = (CLIP[:, :32, :32].permute(0, 3, 1, 2) / 255 - 0.45) / 0.225
    torch.testing.assert_close(clip, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("std", [(0.225, 0.225, 0.225), (0.2, 0.25, 0.3)])
def test_both_orders_in_memory_hold_the_same_values(std):
    jitter = draw_jitter(random.Random(5))
    views = [view(), view(flip=True), view(jitter=jitter), view(flip=True, jitter=jitter), view((4, 2))]
    made = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        target = Target(ClipBuffers(), memory_format, threads=1)
        look = {"mean": MEAN, "std": std, "crop": 32, "resize": 40, "target": target}
        made.append(augment.render([CLIP[:, :32, :32]], views, **look))
    assert torch.equal(*made)
    for clips, memory_format in zip(made, (torch.contiguous_format, torch.channels_last), strict=True):
        assert clips.flatten(0, 1).is_contiguous(memory_format=memory_format)


def test_normalise_takes_a_constant_a_channel():
    images = torch.rand(2, 3, 4, 4)
    normalised = augment.normalise(images, (0.1, 0.2, 0.3), (1.0, 2.0, 4.0))
    torch.testing.assert_close(normalised[:, 2], (images[:, 2] - 0.3) / 4)
