"""How near query videos are to classes: pure functions of tokens, in float32 (or wider) also under autocast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from einops import rearrange
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch import Tensor

Reduction = Literal["sum", "mean"]


def full_precision(x: Tensor) -> Tensor:
    """The same values in float32, or in float64 where they are."""
    return x if x.dtype == torch.float64 else x.float()


def class_means(support: Tensor, mask: Tensor | None = None) -> Tensor:
    """[way, shot, ...] -> [way, ...]: mean over the shots of a class; `mask` [way, shot] is False at padding."""
    support = full_precision(support)
    if mask is None:
        return support.mean(dim=1)
    mask = mask.to(support.device)
    padding = mask.logical_not().reshape(*mask.shape, *(1,) * (support.ndim - 2))
    count = mask.sum(dim=1).reshape(-1, *(1,) * (support.ndim - 2))
    total: Tensor = support.masked_fill(padding, 0).sum(dim=1)
    return total / count


def token_cosine(query: Tensor, prototypes: Tensor) -> Tensor:
    """[Q, n, C], [W, m, C] -> cosine [Q, W, n, m], with 0.01 added to the product of the norms.

    The constant is that of the reference code (alibaba-mmai-research/MoLo): it keeps tokens of zeros finite.
    """
    query, prototypes = full_precision(query), full_precision(prototypes)
    with torch.autocast(query.device.type, enabled=False):
        products = torch.einsum("q n c, w m c -> q w n m", query, prototypes)
    lengths = rearrange(query.norm(dim=-1), "q n -> q 1 n 1") * rearrange(prototypes.norm(dim=-1), "w m -> 1 w 1 m")
    similarity: Tensor = products / (lengths + 0.01)
    return similarity


def hausdorff(
    query: Tensor, prototypes: Tensor, *, reduction: Reduction = "sum", single_direction: bool = False
) -> Tensor:
    """[Q, n, C], [W, m, C] -> distance [Q, W]: each token to the nearest of the other set, in both directions.

    "mean" is the bidirectional mean Hausdorff metric of the MoLo and HyRSM papers, "sum" what their code
    computes.  `single_direction` keeps the query's tokens to the nearest of the class only.
    """
    distance = 1 - token_cosine(query, prototypes)  # [Q, W, n, m]
    forward = distance.min(dim=3).values  # [Q, W, n]
    backward = distance.min(dim=2).values  # [Q, W, m]
    reduce = torch.sum if reduction == "sum" else torch.mean
    total = reduce(forward, dim=-1)
    return total if single_direction else total + reduce(backward, dim=-1)


def summed_cosine_distance(query: Tensor, prototypes: Tensor) -> Tensor:
    """[Q, n, C], [W, m, C] -> [Q, W]: sum of 1 - cosine over all pairs of tokens (n or m is usually 1)."""
    return (1 - token_cosine(query, prototypes)).sum(dim=(2, 3))


def cosine(query: Tensor, prototypes: Tensor) -> Tensor:
    """[Q, C], [W, C] -> cosine [Q, W]."""
    query, prototypes = F.normalize(full_precision(query), dim=-1), F.normalize(full_precision(prototypes), dim=-1)
    with torch.autocast(query.device.type, enabled=False):
        return query @ prototypes.T


def squared_distance(query: Tensor, prototypes: Tensor) -> Tensor:
    """[Q, C], [W, C] -> squared Euclidean distance [Q, W]."""
    difference = full_precision(query)[:, None] - full_precision(prototypes)[None]  # [Q, W, C]
    return difference.square().sum(dim=-1)
