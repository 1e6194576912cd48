"""Motion as an input of methods: the shift metric, trunks of motion, two streams."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fsar.episode import Episode
from fsar.matching import SHIFT_PRICE, shift_cosine
from fsar.methods import METHODS, Fusion, TwoStreams, create_method, method_options
from fsar.run.build import build_model
from fsar.run.config import build_config
from fsar.run.recipes import read_recipe
from fsar.trunks import create_motion_trunk
from shards_spec.errors import ConfigError


def make_episode(*, frames: bool = True, steps: int = 8) -> Episode:
    generator = torch.Generator().manual_seed(0)
    pictures = {
        "support": torch.randn(3, 1, steps, 3, 32, 32, generator=generator),
        "query": torch.randn(6, steps, 3, 32, 32, generator=generator),
    }
    motion = {
        "support_motion": torch.randn(3, 1, steps, 2, 32, 32, generator=generator),
        "query_motion": torch.randn(6, steps, 2, 32, 32, generator=generator),
    }
    labels, ids = torch.arange(6) % 3, torch.arange(3)
    given = pictures if frames else {"support": None, "query": None}
    return Episode(query_labels=labels, class_ids=ids, base_ids=ids, **given, **motion)


# The metric


@given(st.integers(0, 99), st.integers(2, 10))
def test_a_sequence_is_nearest_to_itself(seed: int, steps: int) -> None:
    x = torch.randn(4, steps, 5, generator=torch.Generator().manual_seed(seed))
    similarity = shift_cosine(x, x)
    assert torch.allclose(similarity.diagonal(), torch.ones(4), atol=1e-5)
    assert torch.allclose(similarity, similarity.T, atol=1e-5)
    plain = torch.nn.functional.cosine_similarity(x.flatten(1)[:, None], x.flatten(1)[None], dim=2)
    assert torch.allclose(shift_cosine(x, x, most=0), plain, atol=1e-5)


def test_a_moved_sequence_costs_the_price_and_what_left_its_ends() -> None:
    x = torch.randn(1, 8, 5, generator=torch.Generator().manual_seed(1))
    moved = torch.cat([x[:, 1:], torch.zeros(1, 1, 5)], dim=1)
    left = 1 - float(moved.norm() / x.norm())
    assert float(1 - shift_cosine(x, moved)) == pytest.approx(left + SHIFT_PRICE, abs=1e-5)
    assert float(shift_cosine(x, moved, most=0)) < 0.9


def test_no_motion_is_like_nothing() -> None:
    x = torch.randn(2, 8, 5)
    assert torch.equal(shift_cosine(torch.zeros(1, 8, 5), x), torch.zeros(1, 2))
    tokens = torch.zeros(1, 8, 5, requires_grad=True)
    shift_cosine(tokens + x[:1], x).sum().backward()
    assert tokens.grad is not None
    assert tokens.grad.isfinite().all()


# Trunks and methods


def test_the_method_motion_compares_means_of_the_displacement() -> None:
    episode = make_episode(frames=False)
    model = create_method("motion").eval()
    logits = model(episode).logits
    cells = [
        torch.nn.functional.adaptive_avg_pool2d(motion.flatten(0, -4), 4).reshape(-1, 8, 32)
        for motion in (episode.query_motion, episode.support_motion)
    ]
    assert torch.allclose(logits, 10 * shift_cosine(*cells), atol=1e-5)


def test_the_method_motion_refuses_frames() -> None:
    with pytest.raises(ConfigError, match="TinyTrunk reads frames: set streams = motion"):
        create_method("motion", trunk="tiny")
    with pytest.raises(ConfigError, match='method motion reads motion alone, not streams = "both"'):
        build_config({"method": "motion", "trunk": "tiny", "streams": "both"})


def test_a_trunk_of_motion_that_is_given_replaces_the_recipes() -> None:
    recipe = read_recipe("motion-lite0")
    assert build_config(recipe).trunk == "flow-grid"
    assert build_config(recipe | {"motion_trunk": "tiny-flow"}).trunk == "tiny-flow"


@pytest.mark.parametrize("method", [name for name, each in METHODS.items() if each.only_stream is None])
def test_every_method_learns_from_motion_alone(method: str) -> None:
    values = {"method": method, "trunk": "resnet50", "streams": "motion", "num_classes": 3}
    config = build_config(values | ({"width": 32} if "width" in method_options(method) else {}))
    model = build_model(config).train()
    output = model(make_episode(frames=False))
    output.loss.backward()
    assert output.logits.shape == (6, 3)
    learned = [value.grad for name, value in model.named_parameters() if name.startswith("trunk.stages")]
    assert all(gradient is not None and gradient.isfinite().all() and gradient.any() for gradient in learned)


@pytest.mark.parametrize("name", ["resnet18", "tiny"])
def test_trunks_of_pictures_read_motion_and_those_of_a_fixed_size_refuse(name: str) -> None:
    trunk = create_motion_trunk(name).eval()
    clips = torch.randn(2, 4, 2, 32, 32)
    pooled = trunk(clips).pooled
    assert pooled.shape == (2, 4, trunk.channels)
    with pytest.raises(ConfigError, match="clip-vit-b16 cannot read motion"):
        create_motion_trunk("clip-vit-b16")


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_tiny_flow_looks_at_direction_and_not_at_size(factor: float) -> None:
    trunk = create_motion_trunk("tiny-flow").eval()
    clips = 5 * torch.randn(2, 8, 2, 32, 32)
    one, other = trunk(clips).pooled, trunk(factor * clips).pooled
    assert torch.allclose(one, other, atol=0.05)
    assert not torch.allclose(one, trunk(-clips).pooled, atol=0.5)
    halves = one.split([64, 32], dim=2)
    assert all(torch.allclose(half.square().sum(dim=(1, 2)), torch.tensor(8 * 48.0), rtol=1e-3) for half in halves)


# Two streams


def both(method: str = "otam") -> TwoStreams:
    model = build_model(build_config({"method": method, "trunk": "tiny", "trunk_weights": "random", "streams": "both"}))
    assert isinstance(model, TwoStreams)
    return model.eval()


def test_the_loss_of_two_streams_is_the_sum_and_the_weight_acts_on_logits_alone() -> None:
    model, episode = both(), make_episode()
    frames, motion, one = model.frames(episode), model.motion(episode), model(episode)
    assert torch.equal(one.loss, frames.loss + motion.loss)
    assert set(one.losses) == {"frames_ce", "motion_ce"}
    model.fusion = Fusion(1.0, 2.0, 2.0)
    other = model(episode)
    assert torch.equal(other.loss, one.loss)
    assert torch.allclose(other.logits, motion.logits / 2)
    model.fusion = Fusion(0.0, 2.0, 2.0)
    assert torch.allclose(model(episode).logits, frames.logits / 2)


def test_a_stream_that_the_episode_has_not_is_named() -> None:
    with pytest.raises(ConfigError, match="TinyFlow reads motion, which the episode has not"):
        both()(replace(make_episode(), support_motion=None, query_motion=None))
