"""CLIP's text tower (Radford et al. 2021): token numbers -> a vector in the space of its visual tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn

from fsar.trunks.clip import Transformer
from shards_spec.errors import ConfigError

HEAD_WIDTH = 64  # of every published CLIP
NAMES = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")


class ClipText(nn.Module):
    """A causal transformer; the state at the end-of-text token, which has the largest number, is projected."""

    def __init__(self, *, tokens: int, length: int, width: int, depth: int, channels: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(tokens, width)
        self.positional_embedding = nn.Parameter(torch.zeros(length, width))
        self.transformer = Transformer(width, depth=depth, heads=width // HEAD_WIDTH, causal=True)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, channels))

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor]) -> Self:
        """The tower of a CLIP model's whole state dict, from which its sizes are read.

        ConfigError when that holds no text tower.
        """
        own = {name: value.float() for name, value in state.items() if name.startswith(NAMES)}
        if not {"token_embedding.weight", "positional_embedding", "text_projection"} <= own.keys():
            raise ConfigError("the weights hold no CLIP text tower; give the whole published file, such as ViT-B-16.pt")
        (tokens, width), (length, _) = own["token_embedding.weight"].shape, own["positional_embedding"].shape
        depth = len({name.split(".")[2] for name in own if name.startswith("transformer.resblocks.")})
        channels = own["text_projection"].shape[1]
        tower = cls(tokens=tokens, length=length, width=width, depth=depth, channels=channels)
        try:
            tower.load_state_dict(own)
        except RuntimeError as error:
            last = str(error).splitlines()[-1].strip()
            raise ConfigError(f"the weights are of no CLIP text tower: {last}") from error
        return tower.eval()

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, length] int64 -> [n, C], not normalised."""
        x = self.token_embedding(tokens) + self.positional_embedding
        x = self.ln_final(self.transformer(x))
        ends = tokens.argmax(dim=1)  # [n]
        out: Tensor = x[torch.arange(len(tokens), device=tokens.device), ends] @ self.text_projection
        return out
