"""MSCL beyond the published numbers: what is repaired, what each option does, what state moves."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from mscl_case import CASES, golden_model, golden_views, outputs

from fsar.checkpoints import load_reference_state_dict
from fsar.pretraining import MSCL, PairedViews
from fsar.pretraining.flow_rotation import FlowColours, FlowViews, draw_angles, rotate_flow, rotation_angles, unit_flow
from fsar.pretraining.learner import Learner
from fsar.probing.neighbours import retrieve
from fsar.trunks import VideoTrunk
from fsar.trunks.video import ThinResNet18
from preprocess.encode.motion_scores import colour_code
from shards_spec.errors import ConfigError

SIDE, BATCH = 32, 2
TERMS = CASES["mscl_train"]["loss_terms"]


def views(fields: int = 16) -> PairedViews:
    torch.manual_seed(3)
    pictures = (torch.randn(BATCH, 3, 8, SIDE, SIDE) for _ in range(2))
    return PairedViews(*pictures, *(torch.rand(BATCH, 3, fields, SIDE, SIDE) for _ in range(2)))


def same_state(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def small() -> MSCL:
    torch.manual_seed(0)
    return MSCL(queue=6, total=40)


@pytest.fixture(scope="module")
def trained(small) -> MSCL:
    """The same after two steps; the queue of 6 is filled and its pointer round its end."""
    model = copy.deepcopy(small).train()
    for _ in range(2):
        model(views()).loss.backward()
    return model


def test_repairs_leave_five_terms_of_the_first_step_as_they_were():
    released = dict(zip(TERMS, outputs("mscl_train")["s0_losses"].tolist(), strict=True))
    found = {}
    for momentum in ("released", "fixed"):
        model = golden_model(flow_momentum=momentum).train()
        with torch.no_grad():
            found[momentum] = {name: loss.item() for name, loss in model(golden_views(0)).losses.items()}
    changed = {"loss_cls_flow_aug": 4.6594, "loss_cls_mx": 2.4292, "loss_cls_mx_aug": 2.4023}  # the golden README's
    assert found["released"] == pytest.approx(released | changed, abs=1e-4)
    moved = {name for name in TERMS if abs(found["fixed"][name] - found["released"][name]) > 1e-6}
    assert moved == {"loss_cls_flow_aug", "loss_cls_mx_aug"}  # those with the turned flow's key
    assert model.recognizer.iters == model.recognizer_flow.iters == 4


def test_evaluation_changes_no_state(trained):
    for options in ({}, {"double_flow": True, "late_negatives": True}):
        model = copy.deepcopy(trained).eval()
        vars(model).update(options)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with torch.no_grad():
            first, second = model(views()), model(views())
        assert same_state(before, model.state_dict())
        assert first.loss == second.loss


def test_training_moves_both_sides_and_a_resumed_run_goes_on_alike(small, trained):
    moved, before = trained.state_dict(), small.state_dict()
    for name in ("recognizer", "recognizer_flow"):
        assert moved[f"{name}.iters"] == 2 * BATCH
        assert moved[f"{name}.queue_ptr"].tolist() == [2 * BATCH]
        assert moved[f"{name}.count"].tolist() == [2, 2, 1, 1, 2, 2]
        assert torch.equal(moved[f"{name}.queue"][:, 4:], before[f"{name}.queue"][:, 4:])
        keys = moved[f"{name}.queue"][:, :4]
        assert torch.allclose(keys.norm(dim=0), torch.ones(4))
    resumed = copy.deepcopy(small).train()
    resumed.load_state_dict(moved)
    goes_on = copy.deepcopy(trained)
    with torch.no_grad():
        assert resumed(views()).loss == goes_on(views()).loss
    assert same_state(resumed.state_dict(), goes_on.state_dict())


def test_gradients_reach_the_query_side_alone(trained):
    with_gradient = {name.split(".")[1] for name, p in trained.named_parameters() if p.grad is not None}
    assert with_gradient == {"encoder_q", "neck_q", "mlp_q"}
    assert isinstance(trained.encoder, VideoTrunk)
    assert trained.encoder.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(("trunk", "batch", "side"), [("r3d18", 32, 112), ("slowonly50", 8, 224)])
def test_a_step_of_the_published_size_asks_for_no_value(monkeypatch, trunk, batch, side):
    """Tensors without values: waiting for the device fails, and shapes that values decide."""
    monkeypatch.setattr(torch, "autocast", lambda *_args, **_options: nullcontext())  # it does not know this device
    with torch.device("meta"):
        model = MSCL(trunk).train()
        pictures, flow = torch.empty(batch, 3, 8, side, side), torch.empty(batch, 3, 16, side, side)
        output = model(PairedViews(pictures, pictures, flow, flow))
        output.loss.backward()
    assert set(output.losses) == set(TERMS)


def test_the_larger_trunk_projects_its_flow():
    model = MSCL("slowonly50", queue=6).train()
    large = [part.repeat(1, 1, 1, 2, 2) for part in vars(views()).values()]  # 64 x 64
    output = model(PairedViews(*large))
    output.loss.backward()
    assert set(output.losses) == set(TERMS)
    assert model.sup_head.trans_flow.weight.grad.abs().sum() > 0
    assert model.sup_head.trans_flow.weight.shape == (128, 256, 1)
    assert sum(p.numel() for p in model.recognizer.neck_q.parameters()) == 2_229_376
    assert output.losses["loss_pos"].item() == pytest.approx(np.log(8), abs=1)


def test_without_rotation_five_terms_remain():
    torch.manual_seed(0)
    output = MSCL(queue=6, fra=False)(views(fields=8))
    assert set(output.losses) == {"loss_cls", "loss_cls_flow", "loss_cls_mx", "loss_cls_mx_r", "loss_pos"}
    assert output.loss.item() == pytest.approx(sum(loss.item() for loss in output.losses.values()))
    assert output.accuracy["top5_acc_pos"] == 1  # among four times


def test_even_fields_are_all_that_is_looked_at(small):
    everything = views()
    even = MSCL(queue=6, flow_fields="even")
    even.load_state_dict(small.state_dict())
    half = PairedViews(
        everything.query, everything.key, everything.flow_query[:, :, ::2], everything.flow_key[:, :, ::2]
    )
    with torch.no_grad():
        whole_losses, half_losses = copy.deepcopy(small)(everything).losses, even(half).losses
    for name, loss in whole_losses.items():
        assert torch.allclose(loss, half_losses[name], rtol=1e-5), name


def test_weights_of_turned_flow(trained):
    model = copy.deepcopy(trained).eval()
    with torch.no_grad():
        losses = model(views()).losses
        model.weights |= {"loss_cls_flow_aug": 0.5, "loss_cls_mx_aug": 0.0, "loss_cls_mx_r_aug": 0.0}
        loss = model(views()).loss
    left_out = losses["loss_cls_mx_aug"] + losses["loss_cls_mx_r_aug"] + losses["loss_cls_flow_aug"] / 2
    assert torch.allclose(loss, sum(losses.values()) - left_out)
    assert MSCL(queue=6, weight_aug_flow=(0.5, 0.0)).weights == model.weights


def test_published_state_dicts_load(small, trained):
    """They hold a second neck and the prefix of a parallel wrapper, and lack the clock."""
    published = {f"module.{name}": value for name, value in trained.state_dict().items() if not name.endswith(".iters")}
    neck = {name: value for name, value in published.items() if ".neck_q." in name}
    published |= {name.replace("neck_q", "neck_k"): value for name, value in neck.items()}
    model = copy.deepcopy(small)
    load_reference_state_dict(model, published)
    expected = trained.state_dict() | {f"{name}.iters": torch.tensor(0) for name in ("recognizer", "recognizer_flow")}
    assert same_state(model.state_dict(), expected)
    trunk = copy.deepcopy(small.encoder)
    load_reference_state_dict(trunk, published)
    assert same_state(trunk.state_dict(), trained.encoder.state_dict())


def test_a_key_encoder_stands_still_at_the_end_of_the_clock():
    torch.manual_seed(0)
    learner = Learner(ThinResNet18(), dim=8, queue=4, momentum=0.5, total=4)
    key, query = learner.mlp_k[2].bias, learner.mlp_q[2].bias
    with torch.no_grad():
        query.add_(1)
    before = key.clone()
    for seen, share in ((0, 0.5), (2, 0.25), (4, 0.0), (9, 0.0)):
        learner.iters.fill_(seen)
        with torch.no_grad():
            key.copy_(before)
        learner.follow()
        torch.testing.assert_close(key - before, torch.full_like(key, share))


def test_layouts_of_flow():
    torch.manual_seed(1)
    crops = {clip: unit_flow(torch.randn(2, 4, 2, 6, 6)).transpose(1, 2) for clip in ("q", "k")}
    angles = rotation_angles(torch.tensor([0, 4]))
    colours = FlowColours()
    turned = {clip: rotate_flow(flow, angles) for clip, flow in crops.items()}

    def halves(layout: str, view: str) -> tuple[torch.Tensor, ...]:
        return FlowViews(layout=layout)(view, crops, angles).chunk(2, dim=2)

    for layout, view, parts in (
        ("intended", "q", (crops["q"], turned["q"])),
        ("intended", "k", (crops["k"], turned["k"])),
        ("released", "q", (crops["q"], crops["k"])),
        ("released", "k", (turned["q"], turned["k"])),
    ):
        for found, wanted in zip(halves(layout, view), parts, strict=True):
            assert torch.equal(found, colours(wanted))
    assert (FlowViews().clips("k"), FlowViews(layout="released").clips("k")) == (["k"], ["k", "q"])
    plain = FlowViews(fra=False)("q", crops, angles)
    assert torch.equal(plain, colours(crops["q"]))


def test_mirrored_flow_points_the_other_way():
    flow = {"q": torch.full((2, 2, 1, 3, 3), 0.5)}
    found = FlowViews(fra=False)("q", flow, torch.zeros(2), mirrored=torch.tensor([False, True]))
    other = flow["q"] * torch.tensor([-1.0, 1.0])[:, None, None, None]
    assert torch.equal(found[0], FlowColours()(flow["q"])[0])
    assert torch.equal(found[1], FlowColours()(other)[1])


def test_colours_on_the_device_are_those_of_the_motion_scores():
    torch.manual_seed(2)
    flow = torch.randn(1, 2, 3, 20, 20)
    coded = colour_code(flow[0].permute(1, 2, 3, 0).numpy())
    levels = (255 * FlowColours()(flow))[0].permute(1, 2, 3, 0).round().numpy()
    assert np.abs(levels - coded).max() <= 1
    assert (levels == coded).mean() > 0.999


def test_angles():
    angles = draw_angles(4000, generator=torch.Generator().manual_seed(0)).rad2deg().round()
    values, counts = angles.unique(return_counts=True)
    assert values.tolist() == [36 * n for n in range(1, 9)]
    assert counts.min() > 400


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MSCL("resnet50"), 'choose "r3d18" or "slowonly50"'),
        (lambda: MSCL(frames=7), "an even number of frames"),
        (lambda: MSCL(flow_momentum="double"), 'choose "fixed" or "released"'),
        (lambda: FlowViews(layout="released", fra=False), 'choose "intended"'),
    ],
)
def test_wrong_options_are_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_wrong_shapes_are_refused(small):
    with pytest.raises(ConfigError, match="flow of 8 fields was given; with these options MSCL reads 16"):
        small(views(fields=8))
    numbers = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ConfigError, match="gallery of 3 videos"):
        retrieve(torch.rand(3, 4), torch.rand(3, 4), gallery_labels=numbers, query_labels=numbers)
