"""Local motion contrastive learning: a frame of pictures against the frames of flow of the same video.

Source: Ni et al., ECCV 2022 (arXiv 2208.06105), and its code (megvii-research/MSCL, `MSCLWithAugPosHeadV2`).
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from fsar.matching import full_precision

WIDTH = 128  # channels of the pictures' side


class LocalContrast(nn.Module):
    """Cosines of each time of the pictures with all times of the flow, of which the same time's is the right one.

    Its other times and, behind them, all times of the turned flow are the negatives; no other video takes part.

    Args:
        flow_channels: Of the flow's side; what is not 128 wide is projected first.
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
        """[B, 128, t] and [B, C, n t], the turned flow behind -> logits [(B t), n t] and the right columns [(B t)]."""
        pictures = F.normalize(full_precision(pictures), dim=1)
        flow = F.normalize(full_precision(self.trans_flow(flow)), dim=1)
        with torch.autocast(pictures.device.type, enabled=False):
            logits = torch.einsum("b c i, b c j -> b i j", pictures, flow) / self.temperature
        return rearrange(logits, "b i j -> (b i) j"), self.labels.expand(len(pictures), -1).flatten()
