"""FIMA beyond the golden cases: evaluation, options, other numbers of parts, weights, learning."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fsar.checkpoints import load_reference_state_dict
from fsar.pretraining import FIMA
from fsar.pretraining.motion_views import motion_views
from fsar.trunks.base import VideoTrunk
from fsar.trunks.tiny import TinyTrunk
from shards_spec.errors import ConfigError


class SmallTrunk(VideoTrunk):
    """Clips of 8 t frames give t feature frames of 4 x 4 places."""

    channels = 8

    def __init__(self) -> None:
        super().__init__(clip_frames=16)
        self.convolution = nn.Conv3d(3, self.channels, (8, 4, 4), stride=(8, 4, 4))
        self.norm = nn.BatchNorm3d(self.channels)

    def levels(self, clips):
        return [self.norm(self.convolution(clips)).relu()]


def batch(model: FIMA, *, parts: int = 2, frames: int = 16, videos: int = 3):
    generator = torch.Generator().manual_seed(0)
    clips = torch.rand(videos, 2 * (1 + parts), frames, 3, 16, 16, generator=generator)
    coordinates = torch.tensor([[0.0, 0.0, 0.9, 0.8], [0.2, 0.1, 1.0, 1.0]]).expand(videos, 2, 4)
    return model.views(clips, coordinates, augment=lambda clip: 2 * clip - 1)


def small_model(**options) -> FIMA:
    torch.manual_seed(0)
    return FIMA(SmallTrunk(), queue=10, **options)


def test_evaluation_changes_nothing():
    model = small_model(dense_queue=30).eval()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        outputs = [model(batch(model)) for _ in range(2)]
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("parts", [1, 3])
def test_other_numbers_of_parts(parts):
    model = small_model(dense_queue=30)
    output = model(batch(model, parts=parts, frames=8 * parts))
    assert output.loss.isfinite()
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    assert model.queue_ptr.item() == 6
    assert model.motion_queue_ptr.item() == 3 * 2 * parts % 10  # written round its end
    assert model.queue_dense_ptr.item() == 3 * 2 * parts * 16 % 30


def test_parts_that_do_not_fit_the_trunk():
    model = small_model()
    with pytest.raises(ConfigError, match="1 of clips of 8 frames and there are 2 parts"):
        model(batch(model, frames=8))
    with pytest.raises(ConfigError, match="5 views are not two windows"):
        motion_views(torch.rand(1, 5, 16, 3, 16, 16), torch.rand(1, 2, 4), augment=lambda clip: clip)


@pytest.mark.parametrize("options", [{"enqueue": "never"}, {"diff_wrap": "none"}])
def test_options_that_are_none(options):
    (name,) = options
    with pytest.raises(ConfigError, match=f"{name}=.* is not known"):
        small_model(**options)


def test_a_trunk_of_frames_is_refused():
    with pytest.raises(ConfigError, match="FIMA reads clips"):
        FIMA(TinyTrunk())


def test_views_in_their_places():
    clips = torch.arange(6.0)[None, :, None, None, None, None] / 10 + torch.zeros(2, 6, 3, 3, 4, 4)
    clips[:, :, 1:] += 0.05  # one difference a clip, of frame 1
    coordinates = torch.rand(2, 2, 4)
    calls = []
    views = motion_views(clips, coordinates, augment=lambda clip: calls.append(clip.shape) or clip, wrap="repeat")
    assert [rgb[0, 0, 0, 0, 0].item() for rgb in views.rgb] == pytest.approx([0, 0.3])
    assert [len(each) for each in views.differences] == [3, 3]
    for difference in (*views.differences[0], *views.differences[1]):
        torch.testing.assert_close(difference[0, 0, :, 0, 0], torch.tensor([0.5, 0.525, 0.5]))
    assert torch.equal(views.coordinates[1], coordinates[:, 1])
    assert calls == [(2, 3, 3, 4, 4)] * 8


def test_the_frame_before_is_for_differences_alone():
    clips = torch.rand(2, 6, 17, 3, 4, 4)
    views = motion_views(clips, torch.rand(2, 2, 4), augment=lambda clip: clip, wrap="extra_frame")
    assert torch.equal(views.rgb[1], clips[:, 3, 1:].transpose(1, 2))
    expected = (clips[:, 4, 1] - clips[:, 4, 0] + 1) / 2
    torch.testing.assert_close(views.differences[1][1][:, :, 0], expected)


def test_published_names_load():
    model, other = small_model(), small_model()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(1)
    given = {f"module.{name}": value for name, value in model.state_dict().items()}
    load_reference_state_dict(other, given)
    assert torch.equal(other.cls_token, model.cls_token)
    trunk = SmallTrunk()
    load_reference_state_dict(trunk, given)
    assert torch.equal(trunk.convolution.weight, model.encoder.convolution.weight)


def test_names_and_sizes_are_the_published_ones():
    with torch.device("meta"):
        model = FIMA("i3d", queue=65536, dense_queue=31360)
    own = {name.split(".")[0] for name in model.state_dict()}
    assert own == {
        *("encoder_q", "encoder_k", "projector_dense", "projector_dense_k", "embedding1", "embedding2"),
        *("cls_token", "transformer_decoder", "queue", "queue_ptr", "motion_queue", "motion_queue_ptr"),
        *("queue_dense", "queue_dense_ptr"),
    }
    assert sum(each.numel() for each in model.parameters() if each.requires_grad) == 17_674_656


def test_the_dense_loss_of_a_batch_falls():
    model = small_model(dropout=0.0)
    views = batch(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(20):
        loss = model(views).losses["dense"]  # the queues of the others fill with the keys of this very batch
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
