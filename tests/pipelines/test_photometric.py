"""Photometric augmentation of a batch: what is drawn, and what is done with it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pipelines.augment import clips as augment
from pipelines.augment.photometric import Photometric, gaussian_blur
from pipelines.draw import Jitter
from shards_spec.errors import ConfigError

MEAN, STD = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)
RULES = Photometric(MEAN, STD)
NOTHING = replace(RULES, grey=0, jitter=0, blur=0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_clips(count: int = 4, size: int = 24) -> torch.Tensor:
    return torch.rand(count, 3, 3, size, size, generator=seeded(99))


def test_without_any_draw_it_only_normalises():
    clips = some_clips()
    torch.testing.assert_close(NOTHING(clips, seeded()), augment.normalise(clips, MEAN, STD), atol=1e-5, rtol=0)


@pytest.mark.parametrize("grey", [0, 1])
def test_jitter_is_that_of_single_clips(grey):
    clips, rules = some_clips(), replace(NOTHING, grey=grey, jitter=1)
    draws = rules.draw(4, seeded())
    single = [Jitter(*factors, draws.order, bool(grey)) for factors in draws.factors.T.tolist()]
    expected = augment.normalise(augment.colour_jitter(clips, single), MEAN, STD)
    torch.testing.assert_close(rules.apply(clips, draws), expected, atol=1e-5, rtol=0)


def test_a_clip_does_not_depend_on_the_others():
    clips, rules = some_clips(), replace(RULES, blur_sigma="per_sample", blur=1)
    draws = rules.draw(4, seeded())
    alone = replace(
        draws, grey=draws.grey[2:3], factors=draws.factors[:, 2:3], blur=draws.blur[2:3], sigma=draws.sigma[2:3]
    )
    torch.testing.assert_close(rules.apply(clips[2:3], alone)[0], rules.apply(clips, draws)[2], atol=1e-5, rtol=0)


def test_frames_of_a_clip_are_treated_alike():
    frame = some_clips()[:, :1]
    augmented = RULES(frame.expand(-1, 5, -1, -1, -1), seeded(3))
    torch.testing.assert_close(augmented, augmented[:, :1].expand_as(augmented), atol=1e-5, rtol=0)


def test_draws_have_the_stated_shares_and_ranges():
    draws = RULES.draw(20_000, seeded())
    assert draws.grey.float().mean().item() == pytest.approx(0.2, abs=0.01)
    assert draws.blur.float().mean().item() == pytest.approx(0.5, abs=0.01)
    plain = (draws.factors == torch.tensor([1.0, 1.0, 1.0, 0.0])[:, None]).all(dim=0)
    assert plain.float().mean().item() == pytest.approx(0.2, abs=0.01)
    low, high = draws.factors.aminmax(dim=1)
    torch.testing.assert_close(low, torch.tensor([0.6, 0.6, 0.6, -0.1]), atol=0.001, rtol=0)
    torch.testing.assert_close(high, torch.tensor([1.4, 1.4, 1.4, 0.1]), atol=0.001, rtol=0)
    orders = {RULES.draw(1, seeded(seed)).order for seed in range(300)}
    assert len(orders) == 24
    assert torch.equal(RULES.draw(5, seeded(7)).factors, RULES.draw(5, seeded(7)).factors)


def test_sigma_is_one_for_the_run_or_one_a_clip():
    fixed = torch.cat([RULES.draw(3, seeded(seed)).sigma for seed in (1, 2)])
    assert len(fixed.unique()) == 1
    assert fixed[0] != replace(RULES, seed=1).draw(1, seeded()).sigma[0]
    drawn = replace(RULES, blur_sigma="per_sample").draw(1000, seeded()).sigma
    assert drawn.min() < 0.11 < 1.99 < drawn.max() <= 2


def test_blur():
    clips, sigma = some_clips(2, 40), torch.tensor([0.8, 1.7])
    blurred = gaussian_blur(clips, sigma)
    frame, s, reach = clips[1, 0, 0].double(), 1.7, 2  # 40 pixels: 5 taps
    weights = torch.exp(-(torch.arange(-reach, reach + 1).double() ** 2) / (2 * s**2))
    weights = weights.outer(weights) / weights.sum() ** 2
    padded = torch.nn.functional.pad(frame[None, None], [reach] * 4, mode="reflect")[0, 0]
    for row, column in ((0, 0), (17, 39), (20, 20)):
        expected = (padded[row : row + 5, column : column + 5] * weights).sum().item()
        assert blurred[1, 0, 0, row, column].item() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(gaussian_blur(clips[..., :19, :19], sigma), clips[..., :19, :19])


@pytest.mark.parametrize("options", [{"blur_sigma": "none"}, {"sigma": (0, 1)}, {"grey": 1.5}])
def test_rules_that_mean_nothing(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        replace(RULES, **options)


@pytest.mark.parametrize("threads", [1, 3])
def test_frames_on_a_cpu_are_made_as_whole_clips_are_elsewhere(threads, monkeypatch):
    """Double precision takes torch's operations, as a GPU does; whichever thread makes a frame."""
    monkeypatch.setattr("pipelines.augment.on_cpu.LEAST_COLOURS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    clips, rules = some_clips(6, 60), replace(RULES, blur_sigma="per_sample", grey=0.4, jitter=0.5)
    draws = rules.draw(6, seeded(2))
    draws.sigma[:2] = torch.tensor([0.1, 2.0])  # most taps of the first are nothing
    assert {None} < set(draws.jitters())  # some clips keep their colours
    assert 0 < draws.blur.sum() < 6
    torch.testing.assert_close(rules.apply(clips, draws), rules.apply(clips.double(), draws).float(), atol=2e-5, rtol=0)
    few = gaussian_blur(clips, draws.sigma, where=draws.blur)
    whole = gaussian_blur(clips.double(), draws.sigma, where=draws.blur).float()
    torch.testing.assert_close(few, whole, atol=1e-6, rtol=0)
    assert torch.equal(few[~draws.blur], clips[~draws.blur])
