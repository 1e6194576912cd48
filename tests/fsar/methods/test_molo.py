"""MoLo: its decoder, sizes, features in place of the trunk; sums over tokens and means over padding."""

from __future__ import annotations

import pytest
import torch
from test_methods import make_episode, make_model

from fsar.matching import class_means, hausdorff, token_cosine
from fsar.methods import create_method
from fsar.methods.molo import up_sizes
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
