"""CLIP-FSAR against outputs of its published code (alibaba-mmai-research/MoLo), and what holds of it."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache, cached_property

import numpy as np
import pytest
import torch

from fsar.checkpoints import load_reference_state_dict, reference_names
from fsar.methods import create_method
from shards_spec.errors import ConfigError
from tests.golden_case import GOLDEN, HeadCase, fill

CASES = sorted(path.stem for path in (GOLDEN / "clipfsar").glob("clipfsar_*.json"))
WIDTH = 1024
# Options of the published code -> ours.
OPTIONS = {
    "USE_CLASSIFICATION_VALUE": lambda value: {"classification_weight": value},
    "USE_CLASSIFICATION": lambda value: {},
    "TRANSFORMER_DEPTH": lambda value: {"depth": value},
    "SINGLE_DIRECT": lambda value: {"single_direction": value},
    "MERGE_BEFORE": lambda value: {"support_merge": "prototype" if value else "video"},
    "EVAL_TEXT": lambda value: {"inference": "text"},
    "COMBINE": lambda value: {"inference": "combined"},
    "TEXT_COFF": lambda value: {"text_weight": value},
}


def close(value, expected, *, absolute=0.0, relative=0.0) -> None:
    value = value.detach().numpy() if isinstance(value, torch.Tensor) else value
    np.testing.assert_allclose(value, expected, atol=absolute, rtol=relative)


@cache
def weights(seed: int, depth: int) -> dict[str, torch.Tensor]:
    """The reference's state dict."""
    shapes = json.loads((GOLDEN / "state_dicts" / "clipfsar.json").read_text())
    for layer in range(1, depth):
        first = {name: shape for name, shape in shapes.items() if ".layers.0." in name}
        shapes |= {name.replace(".layers.0.", f".layers.{layer}."): shape for name, shape in first.items()}
    return {name: torch.from_numpy(fill.parameter(name, tuple(shape), seed)) for name, shape in shapes.items()}


class Case(HeadCase):
    starts_from_images = False
    width = WIDTH
    num_classes = 64

    @cached_property
    def options(self):
        options = {"trunk": None, "channels": WIDTH, "frames": self.settings["frames"], "dropout": False}
        for key, value in self.train_options.items():
            options |= OPTIONS[key](value)
        return options

    def features(self, name: str) -> torch.Tensor:
        """[V, T, C] in the reference's order."""
        labels, seed = self.labels(name), self.settings["seed"]
        centres = fill.normal("centre", (self.settings["way"], self.settings["frames"], WIDTH), seed)
        noise = fill.normal(name, (len(labels), self.settings["frames"], WIDTH), seed)
        return torch.from_numpy((0.3 * centres[labels] + noise).astype(np.float32))

    def text(self, split: str) -> torch.Tensor:
        """[classes, C]."""
        count = self.settings[f"{split}_classes"]
        return torch.from_numpy(fill.normal(f"text_{split}", (count, WIDTH), self.settings["seed"]))

    def with_text(self, split: str):
        """The episode with the texts of its classes of a split."""
        ranks = fill.uniform("classes_test", (24,), self.settings["seed"])
        classes = np.argsort(ranks, kind="stable")[: self.settings["way"]] if split == "test" else self.base_ids
        return replace(self.episode(), class_text=self.text(split)[torch.from_numpy(classes)])


class Run:
    """A case put through the public interface in both modes; the tests look at what came out."""

    def __init__(self, name: str) -> None:
        self.case = Case("clipfsar", name)
        self.model = create_method("clip-fsar", **self.case.options)
        state = weights(self.case.settings["seed"], self.case.options.get("depth", 1))
        load_reference_state_dict(self.model, {f"head.{key}": value for key, value in state.items()})
        with torch.no_grad():
            self.eval = self.model.eval()(self.case.with_text("test"))
        self.episode = self.case.with_text("train")
        self.episode.support_features.requires_grad_()
        self.episode.query_features.requires_grad_()
        self.model.set_base_text(self.case.text("train"))
        self.train = self.model.train()(self.episode)
        self.train.loss.backward()

    def gradient(self, name: str) -> torch.Tensor:
        """Gradient by the reference's name; that of features is [videos * T, D]."""
        if name == "input.support":
            return self.case.in_reference_order(self.episode.support_features.grad).flatten(0, 1)
        if name == "input.query":
            return self.episode.query_features.grad.flatten(0, 1)
        ours = {official: own for own, official in reference_names(self.model).items()}
        return self.model.get_parameter(ours[name]).grad


@pytest.fixture(scope="module", params=CASES)
def run(request) -> Run:
    return Run(request.param)


def test_all_cases_are_here():
    assert len(CASES) == 8


def test_logits(run):
    case, tolerances = run.case, {"absolute": 2e-5, "relative": 1e-5}
    close(case.labels("support"), case.outputs["support_labels"])
    close(run.eval.logits, case.outputs["eval_logits"], **tolerances)
    assert list(run.eval.losses) == ["ce"]
    if "train_logits" not in case.outputs:  # published in evaluation only
        return
    close(run.train.logits, case.outputs["train_logits"], **tolerances)
    expected = case.in_our_order(case.outputs["train_class_logits_first4"])
    close(run.train.aux["class"][:, :4], expected, **tolerances)
    for ours, theirs in (("ce", "match"), ("class", "class")):
        close(run.train.losses[ours], case.outputs[f"train_loss_{theirs}"], **tolerances)
    close(run.train.loss, case.outputs["train_loss_total"], **tolerances)


def test_gradients(run):
    names = run.case.settings["gradient_names"]
    if not names:
        assert "grad_norm" not in run.case.outputs
        return
    gradients = [run.gradient(name) for name in names]
    norms = [gradient.double().norm() for gradient in gradients]
    close(np.array(norms), run.case.outputs["grad_norm"], relative=1e-4, absolute=1e-6)
    expected = run.case.outputs["grad_probe"]
    for name, gradient, value in zip(names, gradients, expected, strict=True):
        probe = torch.from_numpy(fill.normal(f"probe:{name}", tuple(gradient.shape), run.case.settings["seed"]))
        close((gradient.double() * probe).sum(), value, absolute=1e-4 * np.abs(expected).max())
