"""Weights under the names of the published code: into which a model's own are translated, and what is refused."""

from __future__ import annotations

import pytest
import torch
from golden_case import official_shapes

from fsar.checkpoints import load_reference_state_dict, reference_names
from fsar.methods import FewShotMethod, create_method
from shards_spec.errors import ConfigError


def official(num_classes=6, channels=512) -> dict[str, torch.Tensor]:
    """A state dict of the reference at the width of ResNet-18."""
    widths = {2048: channels, 6144: 3 * channels, 256: channels // 8}
    shapes = official_shapes(num_classes=num_classes)
    return {name: torch.rand([widths.get(n, n) for n in shape]) for name, shape in shapes.items()}


def headless(num_classes=6) -> FewShotMethod:
    return create_method("molo", trunk=None, channels=512, num_classes=num_classes)


def test_official_names_cover_the_model():
    with torch.device("meta"):
        model = create_method("molo", trunk="resnet50")
    names = reference_names(model)
    shapes = {names[key]: tuple(value.shape) for key, value in model.state_dict().items()}
    assert shapes == official_shapes(trunk="resnet50")
    assert sum(parameter.numel() for parameter in model.parameters()) == 89_604_629


@pytest.mark.parametrize("prefix", ["", "head.", "module.head."])
def test_loading_with_prefixes_tables_and_without_counters(prefix):
    state = {name: value for name, value in official().items() if not name.endswith("num_batches_tracked")}
    state["pe.pe"] = torch.zeros(1, 20, 512)
    model = headless()
    load_reference_state_dict(model, {prefix + name: value for name, value in state.items()})
    names = reference_names(model)
    for name, value in model.state_dict().items():
        if names[name] in state:
            assert torch.equal(value, state[names[name]]), name


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"scale": None}, "missing: scale"),
        ({"motion_conv.bias": torch.zeros(3)}, r"motion_conv.bias \(\[3\], not \[64\]\)"),
        ({"surprise": torch.zeros(1)}, "unexpected: surprise"),
        ({"backbone.0.weight": torch.zeros(64, 3, 7, 7)}, "unexpected: backbone.0.weight"),
        ({"scale": "one"}, r"scale \(str, not \[1\]\)"),
    ],
)
def test_loading_refuses_by_name_and_loads_nothing(change, says):
    state = {name: value for name, value in (official() | change).items() if value is not None}
    model = headless()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match=says):
        load_reference_state_dict(model, state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_another_number_of_classes():
    model = headless(num_classes=9)
    with pytest.raises(ConfigError, match="drop_classifier"):
        load_reference_state_dict(model, official())
    load_reference_state_dict(model, official(), drop_classifier=True)
    without = {name: value for name, value in official().items() if "classification" not in name}
    load_reference_state_dict(model, without, drop_classifier=True)
