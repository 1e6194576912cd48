"""MoLo: its decoder, sizes, features in place of the trunk; sums over tokens and means over padding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_methods import make_episode, make_model

from fsar.episode import Episode
from fsar.matching import class_means, hausdorff, token_cosine
from fsar.methods import create_method
from fsar.methods.reconstruction import steps_of, up_sizes, video_scale
from shards_spec.errors import ConfigError


def test_decoder_runs_in_training_only_and_not_with_weight_zero():
    for training, weight, runs in ((True, 0.4, True), (True, 0.0, False), (False, 0.4, False)):
        model = make_model(recons_weight=weight).train(training)
        calls = []
        model.decoder.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        output = model(make_episode())
        assert bool(calls) is runs
        assert ("recons" in output.losses) is runs


def test_a_term_of_weight_zero_gives_no_gradient():
    model = make_model(classification_weight=0.0)
    model(make_episode()).loss.backward()
    assert model.classifier.weight.grad is None


@pytest.mark.parametrize(
    ("start", "end", "sizes"), [(7, 224, (14, 56)), (8, 64, (16, 32)), (4, 112, (8, 32)), (8, 8, (8, 8))]
)
def test_sizes_of_the_decoder(start, end, sizes):
    assert up_sizes(start, end) == sizes


@pytest.mark.parametrize(("frames", "size"), [(2, (32, 32)), (8, (40, 56)), (25, (16, 16))])
def test_any_length_and_size(frames, size):
    model = make_model()
    support, query = torch.randn(3, 1, frames, 3, *size), torch.randn(4, frames, 3, *size)
    output = model(make_episode(support=support, query=query))
    assert output.logits.shape == (4, 3)
    assert torch.isfinite(output.loss)


def test_features_replace_the_trunk():
    torch.manual_seed(0)
    model = create_method("molo", trunk=None, channels=64, num_classes=6, heads=4)
    features = {"support_features": torch.rand(3, 2, 4, 64, 5, 5), "query_features": torch.rand(4, 4, 64, 5, 5)}
    output = model(make_episode(**features))  # the images are the target of the reconstruction
    assert "recons" in output.losses
    with pytest.raises(ConfigError, match="needs the images"):
        model(make_episode(support=None, query=None, **features))
    model.eval()
    assert model(make_episode(support=None, query=None, **features)).logits.shape == (4, 3)
    with pytest.raises(ConfigError, match="carry features"):
        model(make_episode())
    pooled = {name: value.mean(dim=(-2, -1)) for name, value in features.items()}
    with pytest.raises(ConfigError, match="pooled features are not enough"):
        model(make_episode(**pooled))
    with pytest.raises(ConfigError, match="maps"):
        model(make_episode(**{name: value[..., :32, :, :] for name, value in features.items()}))


def reconstruction_loss(episode: Episode, **options: object) -> float:
    """The loss of a decoder that reads the same maps, whatever the episode's videos are."""
    torch.manual_seed(0)
    model = create_method("molo", trunk=None, channels=64, frames=4, num_classes=6, heads=4, dropout=False, **options)
    maps = torch.rand(3 * 2 + 4, 4, 64, 5, 5)
    support = maps[:6].unflatten(0, (3, 2))
    return model(replace(episode, support_features=support, query_features=maps[6:])).losses["recons"].item()


def test_a_normalised_target_is_as_large_for_every_video():
    target = torch.randn(3, 7, 2, 8, 8) * torch.tensor([0.1, 1.0, 30.0]).view(3, 1, 1, 1, 1)
    torch.testing.assert_close(
        (target / video_scale(target)).square().mean(dim=(1, 2, 3, 4)), torch.ones(3), atol=0.03, rtol=0
    )
    still = torch.zeros(1, 7, 3, 8, 8)
    assert torch.equal(still / video_scale(still), still)


@pytest.mark.parametrize("kind", ["frames", "difference"])
def test_a_normalised_loss_does_not_know_how_bright_the_videos_are(kind):
    episode = make_episode()
    bright = replace(episode, support=100 * episode.support, query=100 * episode.query)
    for norm, equal in (("video", True), ("none", False)):
        losses = [reconstruction_loss(each, recons_target=kind, recons_norm=norm) for each in (episode, bright)]
        assert (losses[0] == pytest.approx(losses[1], rel=0.01)) is equal


def test_targets_of_the_steps_between_frames_by_hand():
    videos = torch.tensor([1.0, 2.0, 5.0]).view(1, 3, 1, 1, 1).expand(2, 3, 3, 4, 4)
    expected = {"frames": [2.0, 5.0], "difference": [1.0, 3.0], "flow": [1.5, 3.5]}
    for kind, steps in expected.items():
        assert torch.equal(steps_of(kind, videos), torch.tensor(steps).view(1, 2, 1, 1, 1).expand(2, 2, 3, 4, 4))


def test_flow_is_decoded_at_its_own_size_and_without_padding():
    motion = torch.randn(3, 2, 4, 2, 16, 24)
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    motion[~mask] = torch.nan
    episode = make_episode(support_mask=mask, support_motion=motion, query_motion=torch.randn(4, 4, 2, 16, 24))
    model = make_model(recons_target="flow")
    assert model.reads == {"maps", "motion"}
    assert make_model(recons_target="flow", recons_weight=0).reads == {"maps"}
    assert make_model().reads == {"maps", "images"}
    made = []
    model.decoder.register_forward_hook(lambda *call: made.append(call[2].shape))
    model(episode).loss.backward()
    assert made == [((5 + 4) * 3, 2, 16, 24)]
    assert all(p.grad.isfinite().all() for p in model.decoder.parameters())


def test_a_target_that_is_missing_or_of_another_shape_is_refused():
    model = make_model(recons_target="flow")
    with pytest.raises(ConfigError, match='recons_target = "flow" needs the flow of the clips'):
        model(make_episode())
    for channels, steps in ((3, 4), (2, 5)):
        motion = {
            "support_motion": torch.zeros(3, 2, steps, channels, 8, 8),
            "query_motion": torch.zeros(4, steps, channels, 8, 8),
        }
        with pytest.raises(ConfigError, match=r"target of the reconstruction \(flow\) is"):
            model(make_episode(**motion))
    with pytest.raises(ConfigError, match="recons_target"):
        make_model(recons_target="velocity")


def test_temperature_replaces_the_learned_scales():
    model = make_model(temperature=0.5).eval()
    assert not hasattr(model, "scale")
    learned = make_model().eval()
    learned.load_state_dict(model.state_dict(), strict=False)
    episode = make_episode()
    torch.testing.assert_close(model(episode).aux["s2q"], 0.5 * learned(episode).aux["s2q"])


def test_mean_reduction_divides_by_the_tokens():
    query, prototypes = torch.rand(4, 8, 16), torch.rand(3, 8, 16)
    total = hausdorff(query, prototypes, reduction="sum")
    torch.testing.assert_close(hausdorff(query, prototypes, reduction="mean"), total / 8)


def test_tokens_of_zeros_are_finite():
    zeros = torch.zeros(2, 3, 8, requires_grad=True)
    token_cosine(zeros, zeros).sum().backward()
    assert torch.isfinite(zeros.grad).all()


def test_class_means_ignore_padding_that_is_not_a_number():
    support = torch.rand(2, 2, 5)
    support[0, 1] = torch.nan
    means = class_means(support, torch.tensor([[True, False], [True, True]]))
    torch.testing.assert_close(means, torch.stack([support[0, 0], support[1].mean(0)]))
