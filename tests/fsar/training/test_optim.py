"""Parameter groups and the learning-rate clock against those of the reference code."""

from __future__ import annotations

import json

import pytest
import torch
from golden_case import GOLDEN

from fsar.checkpoints import reference_names
from fsar.methods import create_method
from fsar.run.recipes import read_recipe
from fsar.training.optim import create_optimizer, learning_rate, parameter_groups
from shards_spec.errors import ConfigError

# Golden table -> the recipe that follows it
RECIPES = {
    "ssv2_full": "molo-ssv2-full-1shot",
    "ssv2_small": "molo-ssv2-small-5shot",
    "kinetics100": "molo-kinetics100-1shot",
    "ucf101": "molo-ucf101-5shot",
    "hmdb51": "molo-hmdb51-1shot",
}
KEYS = {
    "base_lr": "lr",
    "warmup_lr": "warmup_lr",
    "steps_iter": "lr_epoch",
    "steps": "lr_steps",
    "factors": "lr_factors",
}


def clock(config: str) -> dict:
    recipe = read_recipe(RECIPES[config])
    return {ours: recipe[key] for ours, key in KEYS.items()}


@pytest.mark.parametrize("config", RECIPES)
def test_learning_rates_of_the_recipes_are_those_of_the_reference(config):
    golden = json.loads((GOLDEN / "molo" / "lr_schedule.json").read_text())[config]
    options = clock(config)
    for n, rate in golden["lr"].items():
        assert learning_rate(int(n), **options) == pytest.approx(rate, rel=1e-12), n


def test_single_clock_reaches_its_steps_later():
    options = clock("hmdb51") | {"clock": "single"}
    rates = [learning_rate(n, **options) for n in (0, 250, 500, 1499, 1500, 2499, 2500, 3500, 10**6)]
    assert rates == pytest.approx([1e-5, 3e-5, 5e-5, 5e-5, 2.5e-5, 2.5e-5, 5e-6, 5e-7, 5e-7])


@pytest.mark.parametrize(("steps", "factors"), [([0, 3], [1]), ([3, 6], [1, 0.1]), ([0, 6, 3], [1, 0.1, 0.01])])
def test_steps_that_do_not_fit(steps, factors):
    with pytest.raises(ConfigError, match="rising from 0"):
        learning_rate(0, base_lr=1, warmup_lr=0, steps_iter=10, steps=steps, factors=factors)


def test_groups_of_the_reference():
    golden = json.loads((GOLDEN / "molo" / "optimizer_groups.json").read_text())["groups"]
    with torch.device("meta"):
        model = create_method("molo", trunk="resnet50")
    official = reference_names(model)
    names = {id(parameter): "head." + official[name] for name, parameter in model.named_parameters()}
    for group in parameter_groups(model, weight_decay=1e-3):
        wanted = [name for g in golden if g["weight_decay"] == group["weight_decay"] for name in g["names"]]
        assert sorted(names[id(parameter)] for parameter in group["params"]) == sorted(wanted)


def test_only_weights_are_decayed_with_none():
    model = create_method("molo", trunk="tiny")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    spared, decayed = parameter_groups(model, weight_decay=0.1, decay_norms="none")
    assert (spared["weight_decay"], decayed["weight_decay"]) == (0.0, 0.1)
    assert {"class_token", "scale", "trunk.stages.0.1.weight"} < {names[id(p)] for p in spared["params"]}
    assert all(names[id(p)].endswith("weight") and p.ndim >= 2 for p in decayed["params"])
    assert len(spared["params"]) + len(decayed["params"]) == len(names)


def test_frozen_parameters_are_left_out():
    model = create_method("prototype", trunk="tiny", temperature=None).requires_grad_(requires_grad=False)
    model.scale.requires_grad_()
    groups = parameter_groups(model, weight_decay=0.1)
    assert [len(group["params"]) for group in groups] == [0, 1]


def test_weight_decay_is_a_term_of_the_gradient():
    torch.manual_seed(0)
    model = create_method("prototype", trunk="tiny", temperature=None)
    optimizer = create_optimizer(model, lr=0.1, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = model.scale.item()
    optimizer.step()
    # Adam divides the term by its own size, so the first step is the whole rate (decoupled: lr *
    # 0.5 * w)
    assert model.scale.item() == pytest.approx(before - 0.1, abs=1e-5)


def test_unknown_words():
    model = create_method("prototype", trunk="tiny")
    with pytest.raises(ConfigError, match="decay_norms"):
        parameter_groups(model, weight_decay=0.1, decay_norms="some")
    with pytest.raises(ConfigError, match="lr_clock"):
        learning_rate(0, base_lr=1, warmup_lr=0, steps_iter=10, steps=[0], factors=[1], clock="double")
