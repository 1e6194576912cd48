"""Classes of videos from those of their nearest neighbours."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fsar.matching import full_precision
from shards_spec.errors import ConfigError


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
    """Votes [Q, classes] for queries [Q, C] of their `k` nearest videos of a gallery [N, C] by cosine.

    A neighbour's vote is exp(cosine / temperature), that of the nearest being 1 (Wu et al. 2018, arXiv 1805.01978,
    section 3.4); with temperature 0 each has the same, and of classes with as many the one of the nearest wins.

    Args:
        gallery: [N, C].
        queries: [Q, C].
        labels: [N] class numbers of the gallery.
        classes: How many classes there are.
        k: Neighbours; all videos where the gallery has no more.
        temperature: Of the votes.
        chunk: Queries that are compared at a time.

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
