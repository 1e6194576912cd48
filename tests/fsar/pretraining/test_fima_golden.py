"""The whole training step of FIMA against outputs of the reference code (ZMHH-H/FIMA)."""

from __future__ import annotations

import gc

import pytest
import torch
from einops import rearrange
from fima_case import FimaCase
from golden_case import fill
from torch import nn
from torch.nn import functional as F

from fsar.pretraining.fima import FIMA
from fsar.pretraining.moco import first_is_right
from fsar.trunks import create_trunk
from pipelines.augment.clips import normalise

VIEWS = ("vi_m", "vi_m_l1", "vi_m_l2", "vi_n", "vi_n_l1", "vi_n_l2")
# R(2+1)D in float64, as the reference was run: in float32 a ReLU whose input is rounding away from
# 0 may close, which moves the norm of the trunk's gradient by half a percent from one machine, or
# one run, to the next.
TRUNKS = {"full_i3d": ("i3d", torch.float32), "full_r2plus1d": ("r2plus1d18", torch.float64)}


class Step:
    """The case put through the public interface once, with what its parts returned."""

    def __init__(self, name: str) -> None:
        self.case = FimaCase(name)
        settings = self.case.settings
        dense = settings.get("dense_K", 0)
        trunk, self.dtype = TRUNKS[name]
        self.trunk = create_trunk(trunk)
        self.model = FIMA(self.trunk, queue=settings["K"], dense_queue=dense, dropout=0.0).to(self.dtype)
        fill.load_into(self.model, self.case.seed)
        for key, value in self.model.named_buffers(recurse=False):
            value.copy_(torch.zeros(1) if key.endswith("_ptr") else F.normalize(value, dim=0))
        self.model.train()
        self.returned: dict[str, list] = {}
        for part in ("keys", "query", "_key_map", "predictions", "instance_logits", "dense_losses", "part_logits"):
            self._record(part)
        self.output = self.model(self._views())

    def _record(self, part: str) -> None:
        function = getattr(self.model, part)
        calls = self.returned[part] = []

        def recorded(*args, **kwargs):
            calls.append(function(*args, **kwargs))
            return calls[-1]

        setattr(self.model, part, recorded)

    def _views(self):
        settings, size = self.case.settings, self.case.settings["crop_size"]
        clips = torch.stack([self.case.clip(view, settings["B"], 16, size) for view in VIEWS], dim=1).to(self.dtype)
        coordinates = torch.stack([torch.tensor(settings[f"coord_{side}"]) for side in "mn"], dim=1).to(self.dtype)
        return self.model.views(
            rearrange(clips, "b v c t h w -> b v t c h w"),
            coordinates,
            augment=lambda clip: normalise(clip, self.trunk.mean, self.trunk.std),
        )


@pytest.fixture(scope="module", params=TRUNKS)
def step(request):
    gc.collect()
    return Step(request.param)


def test_losses_and_logits(step):
    case, parts = step.case, step.returned
    ((first, second),) = parts["instance_logits"]
    case.check("logits_1", first)
    case.check("logits_2", second)
    case.check("loss_instance", torch.stack([first_is_right(first)[0], first_is_right(second)[0]]))
    of_m, of_n = (torch.stack(losses) for losses in parts["dense_losses"])
    case.check("loss_dense_parts", torch.cat([of_n, of_m]))
    case.check("loss_dense", torch.stack([of_n.mean(), of_m.mean()]))
    of_m, of_n = parts["part_logits"]
    for name, logits in zip(("n1", "n2", "m1", "m2"), of_n + of_m, strict=True):
        case.check(f"logits_local_{name}", logits)
    case.check("loss_local", torch.stack([first_is_right(logits)[0] for logits in of_n + of_m]))
    case.check("loss_total", step.output.loss)
    assert step.output.loss.item() == pytest.approx(sum(term.item() for term in step.output.losses.values()))


def test_keys_and_masks(step):
    case, maps = step.case, step.returned["_key_map"]
    margins = []
    for name, keys, rgb, difference in zip("mn", step.returned["keys"], maps[::4], maps[1::4], strict=True):
        case.check(f"{name}_k", keys.whole)
        case.check(f"mask_{name}", keys.mask)
        for place, part in enumerate(keys.parts, 1):
            case.check(f"{name}_k_l{place}", part)
        dense = keys.dense.unflatten(2, keys.mask.shape[1:])
        for frame in (0, 1):
            case.check(f"diff_{name}_key_dense_t{frame}", rearrange(dense[:, frame], "b h w d -> b d h w"))
        strength = (rgb.mean(dim=(1, 2)) + difference.mean(dim=(1, 2))).flatten(1)
        apart = (strength - strength.median(dim=1, keepdim=True).values).abs()
        margins.append(apart.sort(dim=1).values[:, 1])
    case.check("mask_margin", torch.stack(margins))
    case.check("rgb_m_key_map_mean", maps[0].mean(dim=(1, 2)))
    case.check("diff_m_key_map_mean", maps[1].mean(dim=(1, 2)))


def test_queries_and_predictions(step):
    case = step.case
    (m_query, m_tokens), (n_query, _) = step.returned["query"]
    case.check("m_q", m_query)
    case.check("n_q", n_query)
    case.check("m_tokens_q_mean", rearrange(m_tokens.mean(dim=-1), "b t p -> (t p) b"))
    (predicted,) = step.returned["predictions"]
    for name, vectors in zip("mn", predicted, strict=True):
        for frame in (0, 1):
            case.check(f"pred_{name}_l{frame + 1}", vectors[:, frame, 0])
            places = vectors[:, frame, 1:].unflatten(1, step.returned["keys"][0].mask.shape[1:])
            case.check(f"pred_{name}_dense_t{frame}", rearrange(places, "b h w d -> b d h w"))


def test_keys_that_enter_the_queue_after_the_step(step):
    (m_query, _), (n_query, _) = step.returned["query"]
    model, written = step.model, step.model.queue.clone()
    model.queue.copy_(F.normalize(step.case.normal("queue", *written.shape), dim=0))
    model.enqueue = "after_step"
    first, second = model.instance_logits(m_query, n_query, *step.returned["keys"])
    model.enqueue = "interleaved"
    model.queue.copy_(written)
    step.case.check("logits_1", first)
    step.case.check("logits_2_if_enqueued_after", second)


def test_state_after_the_step(step):
    case, model = step.case, step.model
    case.check("queue_after", model.queue)
    case.check("motion_queue_after", model.motion_queue)
    case.check("queue_ptr", model.queue_ptr)
    case.check("motion_queue_ptr", model.motion_queue_ptr)
    for side in ("encoder_q", "encoder_k"):
        norms = [part for part in getattr(model, side).modules() if isinstance(part, nn.BatchNorm3d)]
        case.check(f"{side}_first_bn_mean", norms[0].running_mean)
        case.check(f"{side}_first_bn_var", norms[0].running_var)
        case.check(f"{side}_last_bn_mean", norms[-1].running_mean)
        case.check(f"{side}_bn_updates", norms[0].num_batches_tracked[None])
    convolution = next(part for part in model.encoder_k.modules() if isinstance(part, nn.Conv3d))
    case.check("encoder_k_first_weight_after", convolution.weight.flatten()[:64])
    case.check("projector_dense_k_weight_after", model.projector_dense_k.net[0].weight.flatten()[:64])
    if "dense_K" in case.settings:
        case.check("queue_dense_ptr", model.queue_dense_ptr)
        case.check("queue_dense_written", model.queue_dense[:16, :72])


def test_gradients(step):
    case, model = step.case, step.model
    step.output.loss.backward()
    norms = []
    for name in case.settings["grad_norm_order"]:
        part = getattr(model, name)
        gradients = [each.grad.flatten() for each in (part.parameters() if isinstance(part, nn.Module) else [part])]
        norms.append(torch.cat(gradients).norm())
    case.check("grad_norm", torch.stack(norms))
    case.check("grad_cls_token", model.cls_token.grad.flatten())
    case.check("grad_embedding1_bias", model.embedding1.bias.grad)
    assert all(each.grad is None for each in [*model.encoder_k.parameters(), *model.projector_dense_k.parameters()])
