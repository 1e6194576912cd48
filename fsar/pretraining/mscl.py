"""MSCL: motion sensitive contrastive learning (Ni et al., ECCV 2022, arXiv 2208.06105).

Written after the published code (megvii-research/MSCL, `MSCLWithAug`, `MSCLWithAugPosHeadV2`) and
the paper's abstract.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from fsar.matching import full_precision
from fsar.methods.base import weighted_sum
from fsar.pretraining.base import Output, PretrainingMethod
from fsar.pretraining.learner import Learner, Pair
from fsar.pretraining.moco import contrast
from fsar.pretraining.tpn import TemporalPyramid
from fsar.trunks import VideoTrunk
from fsar.trunks.tiny import WIDTHS, Tiny3D
from fsar.trunks.video import SlowOnly50, ThinResNet18, ThinResNet50, r3d18
from shards_spec.errors import ConfigError, choice

WIDTH = 128  # channels of the pictures' side


class LocalContrast(nn.Module):
    """Contrast of each time of the pictures with all times of the flow; the same one is positive.

    The negatives are the flow's other times and, after them, all times of the turned flow.  No
    other video takes part.

    Args:
        flow_channels: Channels of the flow's side; unless there are 128 they are projected first.
        steps: Times in a clip after the encoders.
        temperature: Divides the cosines.
    """

    labels: Tensor

    def __init__(self, flow_channels: int, *, steps: int = 4, temperature: float = 0.07) -> None:
        super().__init__()
        self.temperature = temperature
        self.trans_flow = nn.Conv1d(flow_channels, WIDTH, 1) if flow_channels != WIDTH else nn.Identity()
        self.register_buffer("labels", torch.arange(steps)[None])  # [1, steps], named and kept as in the code

    def forward(self, pictures: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
        """Compare pictures [B, 128, t] with flow [B, C, n t], whose turned half comes last.

        Returns logits [(B t), n t] and the right columns [(B t)].
        """
        pictures = F.normalize(full_precision(pictures), dim=1)
        flow = F.normalize(full_precision(self.trans_flow(flow)), dim=1)
        with torch.autocast(pictures.device.type, enabled=False):
            logits = torch.einsum("b c i, b c j -> b i j", pictures, flow) / self.temperature
        return rearrange(logits, "b i j -> (b i) j"), self.labels.expand(len(pictures), -1).flatten()


RUN = 219_136 * 400  # samples of the published run: Kinetics-400's training videos, 400 times


@dataclass
class PairedViews:
    """Two views of each video, and their coloured flow: as it is and then, with FRA, turned."""

    query: Tensor  # [B, 3, T, H, W] normalised frames
    key: Tensor  # [B, 3, T, H, W]
    flow_query: Tensor  # [B, 3, 2T, H, W] in [0, 1]; [B, 3, T, H, W] without FRA
    flow_key: Tensor


class MSCL(PretrainingMethod):
    """Momentum contrast of pictures, of flow, of both with each other, and of single frames.

    The published code has two faults.  The flow's key encoder moves twice a step and its clock runs
    twice as fast, so it stands still for the second half of training.  And negatives of three terms
    are read after the keys of the same step were written, the positive among them.  Both are
    repaired here; "released" brings each back.  `FlowViews` decides about the code's order of flow
    clips.

    Args:
        trunk: "r3d18" or "slowonly50", each with its own flow encoder and neck; or "tiny3d".
        frames: Frames T of a clip.
        dim: Numbers in an embedding.
        queue: Keys that each modality keeps.
        momentum: Of the key encoders at the start; it rises to 1 over `total` samples.
        total: Samples of the whole run, one for each video and epoch.
        temperature: Divides all cosines.
        fra: Flow rotation augmentation; without it five of the eight terms remain.
        weight_aug_flow: Weights of turned flow: of its contrast with itself, and with pictures.
        cross_weight: Of pictures against flow and flow against pictures, turned or not; 0 leaves
            the terms out.
        local_weight: Of single frames against flow.
        flow_momentum: "fixed" or "released", as above.
        flow_negatives: "snapshot" or "released", as above.
        flow_fields: "all" T fields of a clip, or only the "even" ones, T/2, which the flow encoder
            uses.

    Raises:
        ConfigError: an option has an unknown value, or frames are not even.
    """

    def __init__(
        self,
        trunk: str = "r3d18",
        *,
        frames: int = 8,
        dim: int = 128,
        queue: int = 65536,
        momentum: float = 0.994,
        total: int = RUN,
        temperature: float = 0.07,
        fra: bool = True,
        weight_aug_flow: tuple[float, float] = (1.0, 1.0),
        cross_weight: float = 1.0,
        local_weight: float = 1.0,
        flow_momentum: Literal["fixed", "released"] = "fixed",
        flow_negatives: Literal["snapshot", "released"] = "snapshot",
        flow_fields: Literal["all", "even"] = "all",
    ) -> None:
        super().__init__()
        choice("flow_momentum", flow_momentum, ("fixed", "released"))
        choice("flow_negatives", flow_negatives, ("snapshot", "released"))
        choice("flow_fields", flow_fields, ("all", "even"))
        if frames < 2 or frames % 2:
            raise ConfigError(f"frames={frames}: MSCL needs an even number of frames, its encoders halve it")
        if len(weight_aug_flow) != 2:
            raise ConfigError(f"weight_aug_flow={weight_aug_flow}: expected 2 numbers, a weight for each contrast")
        self.temperature, self.halves = temperature, 1 + fra
        self.fields = frames if flow_fields == "all" else frames // 2  # of one half
        own, cross = weight_aug_flow
        self.weights = {"loss_cls_flow_aug": own, "loss_pos": local_weight}
        for name, turned in itertools.product(("loss_cls_mx", "loss_cls_mx_r"), (False, True)):
            self.weights[name + "_aug" * turned] = cross_weight * (cross if turned else 1)
        self.double_flow, self.late_negatives = flow_momentum == "released", flow_negatives == "released"
        encoder, neck, flow_encoder = encoders(trunk, frames=frames, stride=2 if flow_fields == "all" else 1)
        learner = partial(Learner, dim=dim, queue=queue, momentum=momentum, total=total)
        self.recognizer = learner(encoder, neck=neck)
        self.recognizer_flow = learner(flow_encoder)
        self.sup_head = LocalContrast(flow_encoder.channels, steps=frames // 2, temperature=temperature)

    @property
    def encoder(self) -> VideoTrunk:
        """The trunk that reads pictures, on the query side."""
        return self.recognizer.encoder_q

    def forward(self, batch: PairedViews) -> Output:
        """Compute the loss of a batch, its terms by their published names."""
        return self.step(batch, update=self.training)

    def step(self, batch: PairedViews, *, update: bool) -> Output:
        """Compute the loss; with `update` key encoders and queues move, in either mode.

        The clocks move in training mode only.
        Evaluation mode with `update` is the validation of the published code.
        """
        queries, keys = self._halves(batch.flow_query), self._halves(batch.flow_key)
        # Copies from before this step: the keys written below are not among the negatives of their
        # own queries.
        queue, flow_queue = self.recognizer.negatives(), self.recognizer_flow.negatives()
        pictures = self.recognizer(batch.query, batch.key, follow=update)
        flows = [self.recognizer_flow(queries[0], keys[0], follow=update)]
        if update:
            for learner, pair in ((self.recognizer, pictures), (self.recognizer_flow, flows[0])):
                learner.remember(pair.key)
                learner.tick(len(pair.key))
        if self.halves == 2:  # turned flow is another BatchNorm batch, as in the code
            again = update and self.double_flow
            flows.append(self.recognizer_flow(queries[1], keys[1], follow=again))
            if again:
                self.recognizer_flow.tick(len(batch.query))
        late = self.recognizer_flow.negatives() if self.late_negatives else flow_queue
        logits = {"loss_cls": contrast(pictures.query, pictures.key, queue, self.temperature)}
        for flow, own, suffix in zip(flows, (flow_queue, late), ("", "_aug"), strict=False):
            logits[f"loss_cls_flow{suffix}"] = contrast(flow.query, flow.key, own, self.temperature)
            logits[f"loss_cls_mx{suffix}"] = contrast(pictures.query, flow.key, late, self.temperature)
            logits[f"loss_cls_mx_r{suffix}"] = contrast(flow.query, pictures.key, queue, self.temperature)
        return self._output(logits, self._local(pictures, flows))

    def _halves(self, flow: Tensor) -> tuple[Tensor, ...]:
        """Split flow [B, 3, n t, H, W] into n clips [B, 3, t, H, W]."""
        wanted = self.halves * self.fields
        if flow.shape[2] != wanted:
            raise ConfigError(f"flow of {flow.shape[2]} fields was given; with these options MSCL reads {wanted}")
        return flow.chunk(self.halves, dim=2)

    def _local(self, pictures: Pair, flows: list[Pair]) -> tuple[Tensor, Tensor]:
        """Compute logits [(B t), n t] of pictures against flow, and the right columns [(B t)]."""
        assert isinstance(self.recognizer.neck_q, TemporalPyramid)
        frames = self.recognizer.neck_q.finest(pictures.levels).mean(dim=(-2, -1))  # [B, 128, t]
        motion = torch.cat([flow.levels[-1].mean(dim=(-2, -1)) for flow in flows], dim=2)  # [B, C, n t]
        logits, labels = self.sup_head(frames, motion)
        return logits, labels

    def _output(self, clips: dict[str, Tensor], local: tuple[Tensor, Tensor]) -> Output:
        """Compute loss and accuracy of each term; the positive of clips is in column 0."""
        first = local[1].new_zeros(len(clips["loss_cls"]))
        graded = {name: (logits, first) for name, logits in clips.items()} | {"loss_pos": local}
        losses = {name: F.cross_entropy(logits, labels) for name, (logits, labels) in graded.items()}
        accuracy: dict[str, Tensor] = {}
        for name, (logits, labels) in graded.items():
            suffix = name.removeprefix("loss").removeprefix("_cls")
            above = (logits > logits.gather(1, labels[:, None])).sum(dim=1)  # [N] columns above the right one
            accuracy |= {f"top{k}_acc{suffix}": (above < k).float().mean() for k in (1, 5)}
        return Output(weighted_sum(losses, dict.fromkeys(losses, 1.0) | self.weights), losses, accuracy)


def encoders(trunk: str, *, frames: int, stride: int) -> tuple[VideoTrunk, TemporalPyramid, VideoTrunk]:
    """Make a trunk by name, its neck, and its flow encoder, which reads every `stride`-th field."""
    choice("trunk", trunk, ("r3d18", "slowonly50", "tiny3d"))
    if trunk == "slowonly50":
        neck = TemporalPyramid((512, 1024, 2048), convolutions=1, stride=(1, 2, 2))
        return SlowOnly50(clip_frames=frames), neck, ThinResNet50(clip_frames=frames, time_stride=stride)
    if trunk == "tiny3d":
        neck = TemporalPyramid(WIDTHS[1:], convolutions=1, stride=(2, 2, 2))
        return Tiny3D(clip_frames=frames), neck, ThinResNet18(clip_frames=frames, time_stride=stride)
    pictures = r3d18(clip_frames=frames)
    pictures.mean, pictures.std = SlowOnly50.mean, SlowOnly50.std  # ImageNet's, not Kinetics', as in the code
    neck = TemporalPyramid((128, 256, 512), convolutions=2, stride=(2, 2, 2))
    return pictures, neck, ThinResNet18(clip_frames=frames, time_stride=stride)
