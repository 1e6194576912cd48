"""MoLo against outputs of the reference code (alibaba-mmai-research/MoLo)."""

from __future__ import annotations

import gc
from functools import partial

import numpy as np
import pytest
import torch
from einops import rearrange
from golden_case import GoldenCase
from torch.utils.checkpoint import checkpoint

from fsar.checkpoints import load_reference_state_dict, reference_names
from fsar.matching import class_means, hausdorff
from fsar.methods import create_method
from fsar.methods.molo import local
from fsar.trunks.resnet import Bottleneck

CASES = [
    "maps_eval_3w1s_T4",
    "maps_eval_3w_mixed_shots",
    "maps_eval_5w1s_q6",
    "maps_eval_k100_5w1s_q1",
    "maps_train_3w2s_q1",
    "eval_5w1s_q1",
    "eval_3w2s_uneven_queries",
    "eval_5w5s_q1",
    "train_5w1s_q2",
]
CONTRASTIVE = ("s2q", "q2s", "s2q_motion", "q2s_motion")


def close(value, expected, *, absolute=0.0, relative=0.0) -> None:
    value = value.detach().numpy() if isinstance(value, torch.Tensor) else value
    np.testing.assert_allclose(value, expected, atol=absolute, rtol=relative)


class Run:
    """A case put through the public interface once; the tests look at what came out."""

    def __init__(self, name: str) -> None:
        self.case = GoldenCase(name)
        self.model = create_method("molo", **self.case.options)
        load_reference_state_dict(self.model, {f"head.{k}": v for k, v in self.case.state_dict().items()})
        self.model.train(self.case.training)
        self.episode = self.case.episode()
        if self.case.starts_from_maps and self.case.training:
            self.episode.support_features.requires_grad_()
            self.episode.query_features.requires_grad_()
        self.encoded = []
        encode = self.model.encode
        self.model.encode = lambda features: self.encoded.append(encode(features)) or self.encoded[-1]
        if self.model.trunk is not None:
            spare = self.recompute_in_backward if self.case.training else self.read_in_portions
            spare(self.model.trunk)
        self.decoded = []
        self.model.decoder.register_forward_hook(lambda _module, _inputs, output: self.decoded.append(output.detach()))
        with torch.set_grad_enabled(self.case.training):
            self.output = self.model(self.episode)
        self.buffers = {name: value.clone() for name, value in self.model.named_buffers()}

    @staticmethod
    def read_in_portions(trunk) -> None:
        """Evaluation mode sees each frame alone; a few at a time stay in the caches, which halves the time."""
        whole = trunk.frame_maps
        trunk.frame_maps = lambda frames: torch.cat([whole(portion) for portion in frames.split(8)])

    @staticmethod
    def recompute_in_backward(trunk) -> None:
        """Training keeps the inputs of blocks alone, half the memory in all; statistics are read before backward."""
        for block in (module for module in trunk.modules() if isinstance(module, Bottleneck)):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


@pytest.fixture(scope="module", params=CASES)
def run(request) -> Run:
    gc.collect()  # the case before, whose model and hooks hold each other
    return Run(request.param)


def test_logits(run):
    close(run.output.logits, run.case.outputs["logits"], absolute=2e-5)
    for name in CONTRASTIVE:
        close(run.output.aux[name], run.case.outputs[f"logits_{name}"], absolute=2e-5)
    close(run.output.aux["class"], run.case.in_our_order(run.case.outputs["class_logits"]), absolute=5e-4)


def test_match_alone_and_its_parts(run):
    support, query = (local(encoded) for encoded, _ in run.encoded)
    grouped, expected = support.map(run.episode.group), run.case.outputs
    with torch.no_grad():
        close(run.model.match(grouped, query, mask=run.episode.support_mask), expected["logits"], absolute=2e-5)
        prototypes = grouped.map(lambda x: class_means(x, run.episode.support_mask))
        rgb = -hausdorff(query.tokens, prototypes.tokens)
        motion = -hausdorff(query.motion, prototypes.motion)
    close(rgb, expected["logits_rgb_only"], absolute=2e-5)
    close(motion, expected["logits_motion_only"], absolute=2e-5)


@pytest.mark.parametrize("option", ["rgb_only", "single_direction"])
def test_options_of_the_metric(run, option, monkeypatch):
    support, query = (local(encoded) for encoded, _ in run.encoded)
    changed = {"rgb_only": ("motion_weight", 0.0), "single_direction": ("single_direction", True)}[option]
    monkeypatch.setattr(run.model, *changed)
    with torch.no_grad():
        logits = run.model.match(support.map(run.episode.group), query, mask=run.episode.support_mask)
    close(logits, run.case.outputs[f"logits_{option}"], absolute=2e-5)


def test_tokens(run):
    (support, _), (query, _) = run.encoded
    prototypes = support.map(lambda x: class_means(run.episode.group(x), run.episode.support_mask))
    tensors = {
        "support_tokens": prototypes.tokens,
        "target_tokens": query.tokens,
        "support_tokens_motion": prototypes.motion,
        "target_tokens_motion": query.motion,
    }
    for name, tensor in tensors.items():
        close(tensor[..., ::128], run.case.outputs[f"{name}_every128"], absolute=2e-4)
        close(tensor.detach().double().norm(), run.case.outputs[f"{name}_l2"], relative=1e-5)


def test_reconstruction(run):
    first = int(np.argmin(run.case.order))  # where the reference's first support video stands in ours
    if run.case.training:
        (decoded,) = run.decoded
        assert tuple(decoded.shape) == tuple(run.case.outputs["reconstruction_shape"])
        close(decoded.double().norm(), run.case.outputs["reconstruction_l2"], relative=1e-5)
        decoded = rearrange(decoded, "(v t) c h w -> v t c h w", t=run.case.settings["frames"] - 1)[first, :2]
    else:
        assert not run.decoded, "the decoder is not needed in evaluation"
        with torch.no_grad():
            decoded = run.model.decoder(run.encoded[0][1][first, :2], (224, 224))
    close(decoded[:, :, ::56, ::56], run.case.outputs["reconstruction_slice"], absolute=1e-4)


def test_losses(run):
    if not run.case.training:
        assert "recons" not in run.output.losses
        return
    assert list(run.output.losses) == ["ce", "class", *CONTRASTIVE, "recons"]
    for name, value in run.output.losses.items():
        close(value, run.case.outputs[f"loss_{name}"], absolute=1e-6, relative=1e-5)
    close(run.output.loss / 4, run.case.outputs["loss_total"], absolute=1e-6, relative=1e-5)


def test_buffers_after_training_mode(run):
    stored = {key.removeprefix("after:"): value for key, value in run.case.outputs.items() if "after:" in key}
    ours = {official: name for name, official in reference_names(run.model).items()}
    assert bool(stored) == run.case.training
    for name, value in stored.items():
        close(run.buffers[ours[name]].flatten()[:8], value, absolute=1e-5, relative=1e-5)


def test_gradients(run):
    if not run.case.training:
        return
    if run.case.starts_from_maps:
        check_gradients_of_terms(run)
    (run.output.loss / 4).backward()
    relative = 1e-4 if run.case.starts_from_maps else 1e-3
    ours = {official: name for name, official in reference_names(run.model).items()}
    gradients = {name: parameter.grad for name, parameter in run.model.named_parameters()}
    for name in run.case.settings["grad_params"]:
        gradient = gradients[ours[name]]
        absolute = 2e-5 if name in ("scale", "scale_motion") else 1e-9
        close(gradient.double().norm(), run.case.outputs[f"grad_l2:{name}"], relative=relative, absolute=absolute)
        first, biggest = run.case.outputs[f"grad_first8:{name}"], float(gradient.abs().max())
        close(gradient.flatten()[:8], first, relative=relative, absolute=max(absolute, relative * biggest))
    total = sum(gradient.double().square().sum() for gradient in gradients.values()).sqrt()
    close(total, run.case.outputs["grad_l2_all"], relative=relative)
    if run.case.starts_from_maps:
        for name, maps in (("support", run.episode.support_features), ("target", run.episode.query_features)):
            close(maps.grad.double().norm(), run.case.outputs[f"grad_l2:{name}_maps"], relative=relative)


def check_gradients_of_terms(run: Run) -> None:
    """Gradient norms of each loss term alone (unweighted)."""
    of = {
        "support_maps": run.episode.support_features,
        "target_maps": run.episode.query_features,
        "to_qkv": run.model.transformer.qkv.weight,
        "to_qkv_motion": run.model.transformer_motion.qkv.weight,
        "motion_reduce": run.model.motion.reduce.weight,
    }
    for loss, value in run.output.losses.items():
        gradients = torch.autograd.grad(value, list(of.values()), retain_graph=True, allow_unused=True)
        for name, gradient in zip(of, gradients, strict=True):
            norm = 0.0 if gradient is None else gradient.double().norm()
            close(norm, run.case.outputs[f"grad_l2_of_loss_{loss}:{name}"], relative=2e-4, absolute=1e-7)
