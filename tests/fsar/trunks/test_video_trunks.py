"""Video trunks against outputs of published code (ZMHH-H/FIMA, megvii-research/MSCL), and what holds of them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from golden_case import fill
from pretraining_case import normal, outputs_of, settings_of, structured_clip
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fsar.checkpoints import load_reference_state_dict
from fsar.pretraining.tpn import TemporalPyramid
from fsar.run.weights import load_trunk_weights
from fsar.trunks import ALL_PARTS, TRUNKS, create_trunk
from fsar.trunks.base import volume_mean
from fsar.trunks.i3d import Mixed, Unit
from fsar.trunks.video import ThinResNet18
from shards_spec.errors import ConfigError

FIMA = {"i3d": ("i3d", 80), "r2plus1d": ("r2plus1d18", 32), "r3d": ("r3d18", 32)}
MSCL = {"r3d_18": ("r3d18", 56), "r2d_18": ("r2d18", 56), "r2d_50": ("r2d50", 64)}
PARAMETERS = {
    "i3d": 12_287_264,
    "r2plus1d18": 31_300_125,
    "r3d18": 33_166_272,
    "slowonly50": 31_672_128,
    "r2d18": 702_096,
    "r2d50": 374_152,
}
NECKS = {
    "r3d18": {"channels": (128, 256, 512)},
    "slowonly50": {"channels": (512, 1024, 2048), "convolutions": 1, "stride": (1, 2, 2)},
}


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def near_peak(value: torch.Tensor, expected: np.ndarray) -> None:
    """The tolerance of MSCL's golden files."""
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", PARAMETERS)
def test_sizes(name) -> None:
    trunk = create_trunk(name)
    assert parameters(trunk) == PARAMETERS[name]
    assert trunk.clip_frames == (16 if name in ("i3d", "r2plus1d18", "r3d18") else 8)
    assert TRUNKS[name](clip_frames=4).clip_frames == 4


@pytest.mark.parametrize(
    ("name", "size", "operations", "sides"),
    [("i3d", 224, 27.8, (2, 7, 7)), ("r2plus1d18", 112, 40.5, (2, 7, 7)), ("r3d18", 112, 40.7, (2, 7, 7))],
)
def test_work_at_the_published_sizes(name, size, operations, sides) -> None:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        maps = create_trunk(name).eval().clip_maps(torch.empty(1, 3, 16, size, size))
    assert tuple(maps.shape[2:]) == sides
    assert round(counter.get_total_flops() / 2e9, 1) == operations  # thousand millions of products


@pytest.mark.parametrize("case", FIMA)
def test_fima(case) -> None:
    name, size = FIMA[case]
    settings, expected = settings_of(f"fima/backbone_{case}"), outputs_of(f"fima/backbone_{case}")
    trunk, clip = create_trunk(name), structured_clip("clip", (2, 16, size), settings["seed"], normalised=True)
    shapes = {key: list(value.shape) for key, value in trunk.state_dict().items()}
    published = settings_of(f"fima/backbone_{case}_state_dict")
    classifier = {key: published.pop(key) for key in ("fc.weight", "fc.bias")}
    assert shapes == published

    fill.load_into(trunk, settings["seed"])
    with torch.no_grad():
        maps = trunk.eval().clip_maps(clip)
        found = {"map_eval": maps, "pooled_eval": volume_mean(maps)}
        weight, bias = (
            torch.from_numpy(fill.parameter(key, tuple(classifier[key]), settings["seed"])) for key in classifier
        )
        scores = F.linear(found["pooled_eval"], weight, bias)
        found["classifier_eval"] = scores.log_softmax(dim=1) if name == "i3d" else scores
        maps = trunk.train().clip_maps(clip)
        found |= {"map_train": maps, "pooled_train": volume_mean(maps)}
    assert found.keys() == expected.keys()
    for key, value in found.items():
        np.testing.assert_allclose(value.numpy(), expected[key], rtol=0, atol=settings["outputs"][key]["atol"])


@pytest.mark.parametrize("case", MSCL)
def test_mscl(case) -> None:
    name, size = MSCL[case]
    trunk, expected = create_trunk(name).eval(), outputs_of(f"mscl/backbone_{case}")
    fill.load_into(trunk, 0)
    with torch.no_grad():
        levels = trunk.levels(normal(f"{case}.input", (1, 3, 8, size, size)))
    near_peak(levels[3], expected["layer4"])
    near_peak(volume_mean(levels[3]), expected["pooled"])
    for number, level in enumerate(levels[:3], start=1):
        near_peak(level.mean((0, 2, 3, 4)), expected[f"layer{number}_channel_mean"])
        near_peak(level.mean((0, 1, 3, 4)), expected[f"layer{number}_frame_mean"])


@pytest.mark.parametrize(
    ("case", "name", "given", "size"),
    [("encoder_r3d18_tpn", "r3d18", "r18", 56), ("encoder_slowonly_r50", "slowonly50", "r50", 64)],
)
def test_encoders_with_their_necks(case, name, given, size) -> None:
    expected, trunk = outputs_of(f"mscl/{case}"), create_trunk(name)
    neck, width = TemporalPyramid(**NECKS[name]), trunk.channels
    assert parameters(neck) == {"r3d18": 3_212_800, "slowonly50": 2_229_376}[name]
    mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 128))
    fill.load_into(nn.ModuleDict({"encoder_q": trunk, "neck_q": neck, "mlp_q": mlp}).eval(), 0)
    with torch.no_grad():
        levels = trunk.levels(normal(f"{given}.input", (1, 3, 8, size, size)))
        pyramid, pooled = neck(levels), volume_mean(levels[-1])
        near_peak(pooled, expected["pooled"])
        near_peak(F.normalize(mlp(pooled), dim=1), expected["q"])
        near_peak(pyramid[0].mean((-2, -1)), expected["tpn_level0_frame_feature"])
        assert torch.equal(neck.finest(levels), pyramid[0])
    for number in (1, 2):
        if f"tpn_level{number}_channel_mean" in expected:
            near_peak(pyramid[number].mean((0, 2, 3, 4)), expected[f"tpn_level{number}_channel_mean"])
    shapes = settings_of("mscl/cases")[case]["level_shapes_then_tpn"]
    assert [list(each.shape) for each in (*levels, *pyramid)] == shapes


def test_the_odd_zero_of_i3d_stands_behind_and_its_pools_round_up() -> None:
    unit = Unit(1, 1, size=7, stride=2).eval()
    unit.conv3d.weight.data.zero_()[0, 0, 2, 2, 2] = 1.0  # what lies two after the kernel's first
    clip = torch.rand(1, 1, 4, 6, 8)
    with torch.no_grad():
        assert torch.allclose(unit(clip), clip[:, :, ::2, ::2, ::2], atol=1e-4)
    pool = create_trunk("i3d").get_submodule("maxPool3d_4a_3x3")
    assert pool(torch.zeros(1, 1, 8, 5, 7)).shape == (1, 1, 4, 3, 4)
    assert Mixed(4, (1, 2, 3, 4, 5, 6))(torch.rand(1, 4, 2, 3, 3)).shape == (1, 15, 2, 3, 3)


def test_levels_of_i3d_end_at_the_last_maps() -> None:
    trunk = create_trunk("i3d").eval()
    with torch.no_grad():
        levels = trunk.levels(torch.rand(1, 3, 16, 64, 64))
    shapes = [(1, 192, 8, 16, 16), (1, 480, 8, 8, 8), (1, 832, 4, 4, 4), (1, 1024, 2, 2, 2)]
    assert [tuple(level.shape) for level in levels] == shapes


def test_flow_that_is_never_looked_at_may_stay_away() -> None:
    trunk, clip = ThinResNet18().eval(), torch.rand(1, 3, 8, 32, 32)
    half = ThinResNet18(time_stride=1).eval()
    half.load_state_dict(trunk.state_dict())
    with torch.no_grad():
        assert torch.equal(trunk.clip_maps(clip), half.clip_maps(clip[:, :, ::2]))


def test_a_clip_a_segment() -> None:
    trunk, clips = create_trunk("r2d18").eval(), torch.rand(2, 3, 8, 3, 32, 32)  # [V, S, clip, 3, H, W]
    with torch.no_grad():
        features = trunk(clips)
        alone = volume_mean(trunk.clip_maps(clips[1, 2].movedim(1, 0)[None]))
    assert features.maps is None
    assert features.pooled.shape == (2, 3, 128)
    assert torch.allclose(features.pooled[1, 2], alone[0], atol=1e-5)
    with pytest.raises(ConfigError, match=r"ThinResNet18 reads clips .* segment_clips"):
        trunk(clips[:, 0])
    with pytest.raises(ConfigError, match="one frame at least"):
        ThinResNet18(clip_frames=0)


def test_recomputed_values_give_the_same_gradient() -> None:
    trunk = create_trunk("r2d50").train()
    again, clips = copy.deepcopy(trunk), torch.rand(2, 3, 8, 32, 32)
    again.recomputes = ALL_PARTS
    for each in (trunk, again):
        each.clip_maps(clips).square().mean().backward()
    assert trunk.stem[0].weight.grad.abs().max() > 0
    for ours, theirs in zip(trunk.parameters(), again.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)
    for ours, theirs in zip(trunk.buffers(), again.buffers(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("prefix", ["", "module.encoder_q.", "recognizer.encoder_q.", "encoder_q."])
def test_weights_of_a_pretraining_checkpoint(tmp_path, prefix) -> None:
    source, trunk, other = (create_trunk("r2d18") for _ in range(3))
    state = {f"{prefix}{name}": value for name, value in source.state_dict().items()}
    state |= {f"{prefix}fc.weight": torch.zeros(5, 128)}
    if prefix:
        state |= {"module.queue": torch.zeros(4, 8), "module.encoder_k.stem.0.weight": torch.zeros(1)}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "checkpoint.pth")
    load_trunk_weights(trunk, "r2d18", str(tmp_path / "checkpoint.pth"))
    load_reference_state_dict(other, state)
    for name, value in source.state_dict().items():
        assert torch.equal(value, trunk.state_dict()[name]), name
        assert torch.equal(value, other.state_dict()[name]), name
