from __future__ import annotations

import colorsys

import pytest
import torch

from pipelines.augment.photometric import ClipJitter, JitterDraws, add_brightness, hsv_saturation
from shards_spec.errors import ConfigError

CLIPS = torch.rand(3, 4, 3, 5, 6, generator=torch.Generator().manual_seed(0))
NEUTRAL = torch.tensor([1.0, 1.0, 1.0, 0.0])[:, None, None].expand(4, 3, 4)


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.4])
def test_saturation_is_that_of_hsv(factor):
    found = hsv_saturation(CLIPS, torch.tensor(factor))
    for pixel, wanted in zip(found.movedim(2, -1).reshape(-1, 3), CLIPS.movedim(2, -1).reshape(-1, 3), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*wanted.tolist())
        expected = colorsys.hsv_to_rgb(hue, min(saturation * factor, 1.0), value)
        assert pixel.tolist() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(hsv_saturation(torch.zeros(3, 1, 1), torch.tensor(2.0)), torch.zeros(3, 1, 1))


def test_brightness_is_added():
    assert add_brightness(torch.tensor([[[0.2, 0.9]]]), torch.tensor(1.3)).flatten().tolist() == pytest.approx([0.5, 1])


def test_each_clip_or_frame_has_its_own_factors():
    generator = torch.Generator().manual_seed(1)
    for sync, per_clip in (("clip", 1), ("frame", 4)):
        draws = ClipJitter(sync=sync, jitter=0.5).draw(64, 4, generator=generator)
        for row in draws.factors.flatten(0, 1):
            assert len(row.unique()) in (1, per_clip)
        jittered = (draws.factors[0] != 1).any(dim=1)
        assert 16 < jittered.sum() < 48
        neutral = draws.factors[:, ~jittered]
        assert torch.equal(neutral, torch.tensor([1.0, 1.0, 1.0, 0.0])[:, None, None].expand_as(neutral))
        assert sorted(draws.order) == [0, 1, 2, 3]
        assert (draws.factors[:3] - 1).abs().max() <= 0.4
        assert draws.factors[3].abs().max() <= 0.1


def test_clips_are_changed_as_drawn():
    factors = NEUTRAL.clone()
    factors[1, 1, 2] = 0.5  # contrast of one frame
    found = ClipJitter().apply(CLIPS, JitterDraws(factors, (3, 1, 0, 2), torch.tensor([False, False, True])))
    expected = CLIPS.clone()
    expected[1, 2] *= 0.5
    torch.testing.assert_close(found[:2], expected[:2], atol=1e-6, rtol=0)
    weights = torch.tensor([0.299, 0.587, 0.114])
    grey = torch.einsum("t c h w, c -> t h w", CLIPS[2], weights)
    torch.testing.assert_close(found[2], grey[:, None].expand(-1, 3, -1, -1), atol=1e-6, rtol=0)


def test_wrong_rules_are_refused():
    with pytest.raises(ConfigError, match='choose "clip" or "frame"'):
        ClipJitter(sync="batch")
    with pytest.raises(ConfigError, match="grey=2 of the jitter"):
        ClipJitter(grey=2)
