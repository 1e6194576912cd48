"""Classify and retrieve videos by their nearest neighbours, without any training on labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fsar.matching import full_precision
from shards_spec.errors import ConfigError

AT = (1, 5, 10, 20, 50)


def vote(
    gallery: Tensor,
    queries: Tensor,
    labels: Tensor,
    *,
    classes: int,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 1024,
) -> Tensor:
    """Let the `k` nearest videos of a gallery vote for the class of each query, by cosine.

    A neighbour's vote is exp(cosine / temperature), that of the nearest being 1 (Wu et al. 2018,
    arXiv 1805.01978, section 3.4); with temperature 0 each has the same, and of classes with as
    many the one of the nearest wins.

    Args:
        gallery: [N, C].
        queries: [Q, C].
        labels: [N] class numbers of the gallery.
        classes: How many classes there are.
        k: Neighbours; all videos where the gallery has no more.
        temperature: Of the votes.
        chunk: Queries that are compared at a time.

    Returns:
        [Q, classes] sums of votes.

    Raises:
        ConfigError: a set is empty, k is below 1 or the temperature below 0.
    """
    if k < 1 or temperature < 0 or not len(gallery) or not len(queries):
        raise ConfigError(
            f"k={k} and temperature={temperature:g} do not fit {len(gallery)} videos and {len(queries)} queries: k is "
            "1 or more, the temperature 0 or more, and no set empty"
        )
    k, shelves = min(k, len(gallery)), F.normalize(full_precision(gallery), dim=1)
    parts = []
    for part in torch.split(F.normalize(full_precision(queries), dim=1), chunk):
        near, found = (part @ shelves.T).topk(k, dim=1)  # [q, k], the nearest first
        if temperature:
            weight = ((near - near[:, :1]) / temperature).exp()
        else:
            weight = torch.ones_like(near)
            weight[:, 0] += 0.5  # less than a vote: it decides between classes with as many
        parts.append(near.new_zeros(len(part), classes).scatter_add_(1, labels[found], weight))
    return torch.cat(parts)


@dataclass(frozen=True)
class Retrieval:
    """Videos of a gallery that were found for Q queries."""

    found: Tensor  # [Q, k] numbers of the k nearest videos of the gallery, the nearest first
    recall: dict[int, float]  # k -> share of queries with a video of their class among their k nearest


def centred(features: Tensor) -> Tensor:
    """Subtract the mean of a set from features [N, C], and scale each to length 1."""
    features = full_precision(features)
    return F.normalize(features - features.mean(dim=0), dim=1)


def retrieve(
    gallery: Tensor,
    queries: Tensor,
    *,
    gallery_labels: Tensor,
    query_labels: Tensor,
    at: Sequence[int] = AT,
    chunk: int = 1024,
) -> Retrieval:
    """Find the nearest videos of a gallery [N, C] to each query [Q, C] by cosine; compute recall.

    Each set is centred on its own mean, as in the published code of MSCL (megvii-research/MSCL,
    `tools/test_retrival.py`).  `chunk` queries are compared at a time.

    Raises:
        ConfigError: a set is empty, a k is below 1 or above the size of the gallery.
    """
    if not len(gallery) or not len(queries):
        raise ConfigError(
            f"retrieval needs videos on both sides, not {len(gallery)} in the gallery, {len(queries)} asked"
        )
    if not at or min(at) < 1 or max(at) > len(gallery):
        raise ConfigError(
            f"recall at {list(at)} does not fit a gallery of {len(gallery)} videos; choose k in 1 to that"
        )
    shelves = centred(gallery)
    parts = [(part @ shelves.T).topk(max(at), dim=1).indices for part in torch.split(centred(queries), chunk)]
    found = torch.cat(parts)  # [Q, k]
    right = gallery_labels[found] == query_labels[:, None]
    return Retrieval(found, {k: right[:, :k].any(dim=1).float().mean().item() for k in at})
