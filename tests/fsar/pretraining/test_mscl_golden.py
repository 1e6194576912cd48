"""MSCL against outputs of the reference code (megvii-research/MSCL).

Tolerances are those of the golden README.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_case import fill
from mscl_case import CASES, golden_model, golden_views, normal, outputs, tensor, unit
from torch import nn
from torch.nn import functional as F

from fsar.pretraining.flow_rotation import FlowColours, rotate_flow, rotation_angles, unit_flow
from fsar.pretraining.learner import rising_momentum
from fsar.pretraining.moco import contrast
from fsar.pretraining.mscl import LocalContrast
from fsar.probing.neighbours import centred, retrieve

TERMS = CASES["mscl_train"]["loss_terms"]
RELEASED = {"flow_momentum": "released", "flow_negatives": "released"}


def close(value, expected, *, absolute=0.0, relative=0.0, peak=0.0) -> None:
    value = value.detach().numpy() if isinstance(value, torch.Tensor) else value
    np.testing.assert_allclose(value, expected, atol=absolute + peak * np.abs(expected).max(), rtol=relative)


def test_flow_rotation():
    flow = tensor(np.stack([4 * normal(f"fra.flow.{i}", 12, 16, 2) for i in range(3)])).permute(3, 0, 1, 2)
    expected = outputs("fra")
    normalised = unit_flow(flow.transpose(0, 1)).transpose(0, 1)  # [2, t, h, w]
    close(normalised.permute(1, 2, 3, 0), expected["normalised"], absolute=1e-6)
    turned = rotate_flow(normalised.expand(8, -1, -1, -1, -1), rotation_angles(torch.arange(8)))
    for n in range(8):
        close(turned[n].permute(1, 2, 3, 0), expected[f"rotated_{n}"], absolute=1e-6)


def test_flow_colours():
    flow = tensor(outputs("fra")["normalised"]).permute(3, 0, 1, 2)[None]
    difference = np.abs(255 * FlowColours()(flow).numpy() - outputs("flow_colour")["image_u8"])
    assert difference.max() < 1.001
    assert (difference > 0.5).mean() <= 1e-3


def test_heads():
    expected = outputs("heads")
    q, k, q_flow, k_flow = (tensor(unit(f"head.{name}", 3, 128, axis=1)) for name in ("q", "k", "q_flow", "k_flow"))
    queue, queue_flow = (tensor(unit(f"head.{name}", 128, 32, axis=0)) for name in ("queue", "queue_flow"))
    right = torch.zeros(3, dtype=torch.int64)
    for name, loss, logits in (
        ("mx_rgb_to_flow_logits", "loss_mx", contrast(q, k_flow, queue_flow, 0.07)),
        ("mx_flow_to_rgb_logits", "loss_mx_r", contrast(q_flow, k, queue, 0.07)),
        ("mx_rgb_to_flow_logits_other_queue", None, contrast(q, k_flow, queue, 0.07)),
    ):
        close(logits, expected[name], absolute=1e-4)
        if loss:
            close(F.cross_entropy(logits, right), expected[loss], absolute=1e-4)


@pytest.mark.parametrize("projected", [False, True])
def test_local_contrast(projected):
    def times(name: str, side: int) -> torch.Tensor:
        return tensor(np.maximum(normal(f"head.{name}", 3, 128, 4, side, side), 0)).mean(dim=(-2, -1))

    expected, head = outputs("heads"), LocalContrast(128)
    if projected:
        head.trans_flow = nn.Conv1d(128, 128, 1)
        fill.load_into(head, CASES["seed"])
    scores, labels = head(times("rgb_map", 5), torch.cat([times("flow_map", 3), times("rot_map", 3)], dim=2))
    suffix = "_with_flow_projection" if projected else ""
    close(scores, expected[f"lmcl_scores{suffix}"], absolute=1e-4)
    close(labels, expected["lmcl_labels"])
    close(F.cross_entropy(scores, labels), expected[f"loss_pos{suffix}"], absolute=1e-4)


def test_momentum_schedule():
    case = CASES["momentum_schedule"]
    for seen, momentum in case["m_at_samples_seen"].items():
        found = rising_momentum(torch.tensor(int(seen)), total=case["max_iters"], start=case["m_base"])
        assert found.item() == pytest.approx(momentum, abs=1e-12)


def test_retrieval():
    centres = 0.55 * normal("retrieval.centres", 6, 24)
    labels, asked = np.arange(60) % 6, (5 * np.arange(30) + 1) % 6
    gallery = tensor(centres[labels] + normal("retrieval.train", 60, 24) + 1.5)
    queries = tensor(centres[asked] + normal("retrieval.test", 30, 24) + 1.5)
    expected = outputs("retrieval")
    result = retrieve(gallery, queries, gallery_labels=tensor(labels), query_labels=tensor(asked), chunk=7)
    close(centred(queries) @ centred(gallery).T, expected["sim"], absolute=1e-6)
    close(result.found[:, :1], expected["top1"])
    assert list(result.recall) == CASES["retrieval"]["k"]
    close(np.array(list(result.recall.values()), np.float32), expected["recall"])


class Recorded:
    """Two steps of a case, with what they computed on the way."""

    def __init__(self, case: str) -> None:
        self.model, self.expected, self.steps = golden_model(**RELEASED), outputs(case), []
        self.model.train(case == "mscl_train")
        for name, learner in self.learners().items():
            learner.register_forward_hook(lambda _m, _i, pair, name=name: self.pairs.setdefault(name, []).append(pair))
        for step in range(2):
            self.steps.append(self.step(step))

    def learners(self):
        return {"": self.model.recognizer, "_flow": self.model.recognizer_flow}

    def step(self, number: int) -> dict[str, np.ndarray]:
        self.pairs = {}
        self.model.zero_grad()
        training = self.model.training
        with torch.set_grad_enabled(training):
            output = self.model.step(golden_views(number), update=True)
        found = {"losses": torch.stack([output.losses[name] for name in TERMS]), "total": output.loss}
        if training:
            output.loss.backward()
            found |= self.gradients()
        (pictures,), (base, aug) = self.pairs[""], self.pairs["_flow"]
        for name, pair in (("", pictures), ("_flow_base", base), ("_flow_aug", aug)):
            found |= {f"q{name}": pair.query, f"k{name}": pair.key}
        for name, learner in self.learners().items():
            found |= {f"queue{name}": learner.queue, f"count{name}": learner.count}
            found[f"key_mlp_bias{name}"] = learner.mlp_k[2].bias
        both = self.learners().values()
        found |= {
            "ptr": torch.cat([each.queue_ptr for each in both]),
            "iters": torch.stack([each.iters for each in both]),
        }
        return {name: value.detach().numpy().copy() for name, value in found.items()}

    def gradients(self) -> dict[str, torch.Tensor]:
        norms = []
        for group in CASES["mscl_train"]["grad_groups"]:
            gradients = [p.grad for p in self.model.get_submodule(group).parameters() if p.grad is not None]
            norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm())
        biases = {f"grad_mlp_bias{name}": each.mlp_q[2].bias.grad for name, each in self.learners().items()}
        return {"grad_norms": torch.stack(norms), **biases}


@pytest.fixture(scope="module", params=["mscl_train", "mscl_eval"])
def run(request) -> Recorded:
    return Recorded(request.param)


@pytest.mark.parametrize("step", [0, 1])
def test_two_steps(run, step):
    found, checked = run.steps[step], set()
    for name, value in found.items():
        expected = run.expected[f"s{step}_{name}"]
        if name in {"ptr", "iters", "count", "count_flow"}:
            np.testing.assert_array_equal(value, expected)
        elif name.startswith("grad"):
            close(value, expected, relative=1e-3, peak=1e-5)
        elif name.startswith(("queue", "key")):
            close(value, expected, absolute=1e-5)
        else:
            close(value, expected, relative=1e-4, absolute=1e-5)
        checked.add(f"s{step}_{name}")
    assert {name for name in run.expected if name.startswith(f"s{step}")} - checked == {f"s{step}_momentum"}


def test_momentum_of_two_steps(run):
    """Pictures move once a step, flow twice; the clock counts samples in training only."""
    clocks = [[0, 4], [4, 12]] if run.model.training else [[0, 0], [0, 0]]
    for step, seen in enumerate(clocks):
        found = rising_momentum(torch.tensor(seen), total=100, start=0.994)
        close(found, run.expected[f"s{step}_momentum"], absolute=1e-7)


@pytest.mark.parametrize("run", ["mscl_train"], indirect=True)
def test_statistics_of_key_encoders_and_parameters_without_gradient(run):
    close(run.model.recognizer.encoder_k.stem[1].running_mean, run.expected["bn_running_mean_key_stem"], absolute=1e-5)
    flow = run.model.recognizer_flow.encoder_k.stem[1].running_mean
    close(flow, run.expected["bn_running_mean_flow_key_stem"], absolute=1e-5)
    without = [name for name, p in run.model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == CASES["mscl_train"]["trainable_parameters_without_gradient"]
