"""CLIP's visual towers RN50 and ViT-B/16, with OpenAI's parameter names.

Source: Radford et al. 2021, arXiv 2103.00020.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from fsar.trunks.base import Features, Trunk
from shards_spec.errors import ConfigError


class ClipTower(Trunk):
    """A tower from frames of a fixed size to one vector each.

    It offers no maps. Its vectors live in the space shared with texts, whose width differs from
    that of the maps below. So a method that pools maps of its own could not use the tower's
    pooling.
    """

    has_maps = False
    any_size = False
    mean = (0.48145466, 0.4578275, 0.40821073)
    std = (0.26862954, 0.26130258, 0.27577711)
    size: int  # side of a frame

    def encode(self, frames: Tensor) -> Tensor:
        """[N, 3, size, size] -> [N, C]."""
        raise NotImplementedError

    def frame_maps(self, frames: Tensor) -> Tensor:
        """Refuse, since the tower has no maps to share: ConfigError."""
        raise ConfigError(f"{type(self).__name__} has no maps for {list(frames.shape)}; choose a ResNet as the trunk")

    def forward(self, clips: Tensor) -> Features:
        """[V, T, 3, size, size] -> pooled [V, T, C].

        Raises:
            ConfigError: the frames are of another size.
        """
        if clips.shape[-2:] != (self.size, self.size):
            height, width = clips.shape[-2:]
            raise ConfigError(
                f"CLIP's trunk reads frames of {self.size}x{self.size}, not {height}x{width}; set crop = {self.size}"
            )
        pooled = self.encode(rearrange(clips, "v t c h w -> (v t) c h w"))
        return Features(None, rearrange(pooled, "(v t) c -> v t c", t=clips.shape[1]))


class Bottleneck(nn.Module):
    """Residual block whose strides are means over places, also in the shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.stride = stride
        self.downsample = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.downsample.add_module("0", nn.Conv2d(inputs, outputs, 1, bias=False))
            self.downsample.add_module("1", nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, h, w] -> [N, 4 width, h/stride, w/stride]."""
        identity = self.downsample(F.avg_pool2d(x, self.stride) if self.stride > 1 else x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.avg_pool2d(x, self.stride) if self.stride > 1 else x
        return F.relu(self.bn3(self.conv3(x)) + identity)


class AttentionPool(nn.Module):
    """Attention with a single query: the mean over places attends to itself and all places."""

    def __init__(self, places: int, width: int, *, heads: int, outputs: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(places + 1, width) / width**0.5)
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, outputs)

    def forward(self, maps: Tensor) -> Tensor:
        """[N, C, h, w] -> [N, outputs]."""
        places = rearrange(maps, "n c h w -> n (h w) c")
        tokens = torch.cat([places.mean(dim=1, keepdim=True), places], dim=1) + self.positional_embedding
        q, k, v = (
            rearrange(project(part), "n t (head c) -> n head t c", head=self.heads)
            for project, part in ((self.q_proj, tokens[:, :1]), (self.k_proj, tokens), (self.v_proj, tokens))
        )
        attended = F.scaled_dot_product_attention(q, k, v)  # [N, head, 1, c]
        out: Tensor = self.c_proj(rearrange(attended, "n head 1 c -> n (head c)"))
        return out


class ClipResNet(ClipTower):
    """CLIP's residual network: a stem of three convolutions, mean strides, attention pooling."""

    REFERENCE_NAMES: ClassVar[Mapping[str, str]] = {
        name: name
        for name in (
            *(f"{kind}{number}" for kind in ("conv", "bn") for number in (1, 2, 3)),
            *(f"layer{stage}" for stage in (1, 2, 3, 4)),
            "attnpool",
        )
    }

    def __init__(
        self,
        *,
        depths: tuple[int, int, int, int] = (3, 4, 6, 3),
        width: int = 64,
        heads: int = 32,
        channels: int = 1024,
        size: int = 224,
    ) -> None:
        super().__init__()
        self.channels, self.size = channels, size
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        widths = [width, *(4 * width * 2**stage for stage in range(4))]  # channels into and out of the stages
        for stage, depth in enumerate(depths):
            first = Bottleneck(widths[stage], width * 2**stage, 1 if stage == 0 else 2)
            rest = [Bottleneck(widths[stage + 1], width * 2**stage, 1) for _ in range(depth - 1)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(first, *rest))
        self.attnpool = AttentionPool((size // 32) ** 2, widths[-1], heads=heads, outputs=channels)

    def encode(self, frames: Tensor) -> Tensor:
        """[N, 3, size, size] -> [N, C]."""
        x = self.part(0, self.stem, frames.contiguous(memory_format=self.memory_format))
        for stage in (1, 2, 3, 4):
            x = self.part(stage, self.get_submodule(f"layer{stage}"), x)
        pooled: Tensor = self.attnpool(x)
        return pooled

    def stem(self, x: Tensor) -> Tensor:
        """[N, 3, size, size] -> [N, width, size/4, size/4]."""
        for convolution, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(norm(convolution(x)))
        return F.avg_pool2d(x, 2)


class QuickGELU(nn.Module):
    """The sigmoid approximation of GELU that CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        """[...] -> [...]."""
        return x * torch.sigmoid(1.702 * x)


class TransformerBlock(nn.Module):
    """Attention and a feed-forward part, each after a LayerNorm.

    `causal` tokens attend only to earlier ones.
    """

    def __init__(self, width: int, heads: int, *, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)  # holds the weights under their names
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", QuickGELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, n, C] -> [N, n, C]."""
        projected = F.linear(self.ln_1(x), self.attn.in_proj_weight, self.attn.in_proj_bias)
        q, k, v = rearrange(projected, "b n (qkv head c) -> qkv b head n c", qkv=3, head=self.heads)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.attn.out_proj(rearrange(attended, "b head n c -> b n (head c)"))
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class Transformer(nn.Module):
    """A stack of blocks."""

    def __init__(self, width: int, *, depth: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*(TransformerBlock(width, heads, causal=causal) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        """[N, n, C] -> [N, n, C]."""
        out: Tensor = self.resblocks(x)
        return out


class ClipViT(ClipTower):
    """CLIP's vision transformer: patches and a class token, whose last state is projected."""

    REFERENCE_NAMES: ClassVar[Mapping[str, str]] = {
        name: name
        for name in ("class_embedding", "positional_embedding", "proj", "conv1", "ln_pre", "transformer", "ln_post")
    }

    def __init__(
        self,
        *,
        patch: int = 16,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        channels: int = 512,
        size: int = 224,
    ) -> None:
        super().__init__()
        self.channels, self.size = channels, size
        spread = width**-0.5
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(spread * torch.randn(width))
        self.positional_embedding = nn.Parameter(spread * torch.randn((size // patch) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, depth=depth, heads=heads)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(spread * torch.randn(width, channels))

    def encode(self, frames: Tensor) -> Tensor:
        """[N, 3, size, size] -> [N, C]."""
        patches = rearrange(self.conv1(frames), "n c h w -> n (h w) c")
        first = repeat(self.class_embedding, "c -> n 1 c", n=len(frames))
        tokens = torch.cat([first.to(patches), patches], dim=1) + self.positional_embedding
        tokens = self.ln_pre(tokens)
        for number, block in enumerate(self.transformer.resblocks):
            tokens = self.part(number, block, tokens)
        pooled: Tensor = self.ln_post(tokens[:, 0]) @ self.proj
        return pooled
