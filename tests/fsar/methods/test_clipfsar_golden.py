"""CLIP-FSAR against outputs of its published code (alibaba-mmai-research/MoLo), and what holds of it."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache, cached_property

import numpy as np
import pytest
import torch
from golden_case import GOLDEN, HeadCase, fill

from fsar.checkpoints import load_reference_state_dict, reference_names
from fsar.episode import Episode
from fsar.methods import create_method
from fsar.trunks import Features
from shards_spec.errors import ConfigError

CASES = sorted(path.stem for path in (GOLDEN / "clipfsar").glob("clipfsar_*.json"))
WIDTH = 1024
# Options of the published code -> ours: those with a value of their own, and switches.
VALUES = {
    "USE_CLASSIFICATION_VALUE": "classification_weight",
    "TRANSFORMER_DEPTH": "depth",
    "SINGLE_DIRECT": "single_direction",
    "TEXT_COFF": "text_weight",
}
SWITCHES = {
    "USE_CLASSIFICATION": {},
    "MERGE_BEFORE": {"support_merge": "prototype"},
    "EVAL_TEXT": {"inference": "text"},
    "COMBINE": {"inference": "combined"},
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
            options |= {VALUES[key]: value} if key in VALUES else SWITCHES[key]
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


# What holds of the method


def small_episode(*, way=3, shot=2, width=16, **more) -> Episode:
    generator = torch.Generator().manual_seed(0)
    fields = {
        "support": None,
        "query": None,
        "support_features": torch.randn(way, shot, 4, width, generator=generator),
        "query_features": torch.randn(5, 4, width, generator=generator),
        "query_labels": torch.arange(5) % way,
        "class_ids": torch.arange(way),
        "base_ids": torch.arange(way),
        "class_text": torch.randn(way, width, generator=generator),
    }
    return Episode(**(fields | more))


def small_model(**options):
    torch.manual_seed(0)
    return create_method("clip-fsar", trunk=None, channels=16, heads=4, dropout=False, **options)


@pytest.mark.parametrize("support_merge", ["prototype", "video"])
def test_unequal_shots_equal_the_ragged_list(support_merge):
    mask = torch.tensor([[True, False, False], [True, True, True], [True, False, True]])
    episode = small_episode(shot=3, support_mask=mask)
    episode.support_features[~mask] = 1e4
    model = small_model(support_merge=support_merge)
    query = model.embed(Features(None, episode.query_features))
    for text in (episode.class_text, None):
        logits = model(replace(episode, class_text=text)).logits
        for number, videos in enumerate(episode.support_features):
            own = model.embed(Features(None, videos[mask[number]])).map(lambda x: x[None])
            row = None if text is None else text[number : number + 1]
            alone = model.match(own, query, class_text=row)
            torch.testing.assert_close(logits[:, number : number + 1], alone, atol=1e-5, rtol=1e-5)


def test_texts_move_the_support_and_may_be_left_out():
    episode, model = small_episode(), small_model().eval()
    bare = model(replace(episode, class_text=None))
    assert not torch.allclose(model(episode).logits, bare.logits, atol=1e-2)
    swapped = replace(episode, class_text=episode.class_text.flip(0))
    # A class's text touches that class alone: the middle one keeps its own.
    torch.testing.assert_close(model(swapped).logits[:, 1], model(episode).logits[:, 1])


def test_the_class_term_needs_texts_and_training():
    episode, model = small_episode(), small_model(classification_weight=2.0)
    assert list(model(episode).losses) == ["ce"]
    model.set_base_text(torch.randn(6, 16))
    output = model(episode)
    torch.testing.assert_close(output.loss, output.losses["ce"] + 2 * output.losses["class"])
    assert output.aux["class"].shape == (3 * 2 + 5, 6)
    novel = model(replace(episode, base_ids=torch.full((3,), -1)))
    assert novel.losses["class"] == 0
    assert list(model.eval()(episode).losses) == ["ce"]
    assert "base_text" not in model.state_dict()


def test_embeddings_do_not_depend_on_the_episode():
    episode = small_episode()
    model = small_model(inference="combined").eval()
    support = model.embed(Features(None, episode.support_features.flatten(0, 1))).map(episode.group)
    query = model.embed(Features(None, episode.query_features))
    torch.testing.assert_close(model.match(support, query, class_text=episode.class_text), model(episode).logits)
    few = model.match(support, query.map(lambda x: x[:2]), class_text=episode.class_text)
    torch.testing.assert_close(few, model(episode).logits[:2])


def test_matching_stays_in_float32_under_autocast():
    model = small_model()
    model.set_base_text(torch.randn(6, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(small_episode())
    assert output.logits.dtype == output.loss.dtype == torch.float32
    output.loss.backward()


@pytest.mark.parametrize("support_merge", ["prototype", "video"])
def test_a_few_steps_lower_the_loss(support_merge):
    model, episode = small_model(support_merge=support_merge), small_episode()
    model.set_base_text(torch.randn(6, 16))
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=3e-3), []
    for _ in range(20):
        output = model(episode)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.losses["ce"].item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"support_merge": "mean"}, 'choose "prototype" or "video"'),
        ({"inference": "both"}, 'choose "visual" or "text" or "combined"'),
        ({"smoothing": 0.0}, "smoothing=0.0"),
        ({"text_weight": 1.5}, "from 0 to 1"),
        ({"depth": 0}, "at least 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, says):
    with pytest.raises(ConfigError, match=says):
        small_model(**options)


def test_texts_that_do_not_fit_are_refused():
    episode, model = small_episode(), small_model()
    with pytest.raises(ConfigError, match=r"\[3, 8\] but the trunk's frames have 16"):
        model(replace(episode, class_text=torch.zeros(3, 8)))
    with pytest.raises(ConfigError, match="same CLIP model"):
        model.set_base_text(torch.zeros(3, 8))
    for inference in ("text", "combined"):
        with pytest.raises(ConfigError, match="give class_text"):
            small_model(inference=inference).eval()(replace(episode, class_text=None))
    with pytest.raises(ConfigError, match="reads no class texts"):
        create_method("otam", trunk="tiny").set_base_text(torch.zeros(3, 128))
