"""Cluster videos by k-means on a vector for each; labels are never read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from shards_spec.errors import ConfigError

Ints = NDArray[np.int64]

ITERATIONS = 100
RESTARTS = 3  # the tightest clustering is kept


@dataclass(frozen=True)
class Agreement:
    """Agreement of clusters with known classes.

    Attributes:
        purity: Share of videos whose class is the most frequent one of their cluster.
        nmi: Mutual information of cluster and class over the mean of their entropies; 0 at
            independence.
    """

    purity: float
    nmi: float


def k_means(vectors: Tensor, clusters: int, *, seed: int = 0) -> Ints:
    """Cluster vectors [n, C] by Lloyd's algorithm from k-means++ seeds; keep the best of some runs.

    Returns the cluster [n] of each vector, in [0, clusters); deterministic for a seed on one
    device.
    Source: Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", SODA 2007.

    Raises:
        ConfigError: there are fewer vectors than clusters, or a vector is not finite.
    """
    if not 1 <= clusters <= len(vectors):
        raise ConfigError(f"{clusters} clusters of {len(vectors)} videos: give at least 1 and at most one a video")
    if not bool(vectors.isfinite().all()):
        raise ConfigError("a video's features are not finite: choose other weights")
    generator = torch.Generator().manual_seed(seed)
    runs = [_lloyd(vectors, _seeds(vectors, clusters, generator)) for _ in range(RESTARTS)]
    best, _ = min(runs, key=lambda run: run[1])
    return best.cpu().numpy()


def _seeds(vectors: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Choose [clusters, C] of the vectors.

    Each is drawn in proportion to its squared distance to those before.
    """
    first = int(torch.randint(len(vectors), (1,), generator=generator))
    centres = vectors[first : first + 1]
    nearest = _squared(vectors, centres).squeeze(1)  # [n]
    for _ in range(clusters - 1):
        weights = nearest.double().cpu()
        weights = weights if float(weights.sum()) > 0 else torch.ones_like(weights)  # all vectors are equal
        edge = torch.rand(1, generator=generator, dtype=torch.float64) * weights.sum()
        place = int(torch.searchsorted(weights.cumsum(0), edge).clamp(max=len(vectors) - 1))
        centres = torch.cat([centres, vectors[place : place + 1]])
        nearest = torch.minimum(nearest, _squared(vectors, centres[-1:]).squeeze(1))
    return centres


def _lloyd(vectors: Tensor, centres: Tensor) -> tuple[Tensor, float]:
    """Return the cluster [n] of each vector, and the sum of squared distances to the centres."""
    place = torch.full((len(vectors),), -1, device=vectors.device)
    for _ in range(ITERATIONS):
        distance, nearest = _squared(vectors, centres).min(dim=1)  # [n]
        if torch.equal(nearest, place):
            break
        place = nearest
        member = F.one_hot(place, len(centres)).to(vectors.dtype)  # [n, clusters]
        count = member.sum(dim=0)[:, None]
        # An empty cluster keeps its centre: it is dropped with the small ones.
        centres = torch.where(count > 0, member.T @ vectors / count.clamp(min=1), centres)
    return place, float(distance.double().sum())


def _squared(vectors: Tensor, centres: Tensor) -> Tensor:
    """Compute squared distances [n, k] of vectors [n, C] and centres [k, C]."""
    products = vectors @ centres.T  # |v - c|^2 = |v|^2 - 2 v c + |c|^2 needs no differences [n, k, C]
    squares = vectors.square().sum(dim=1, keepdim=True) + centres.square().sum(dim=1)
    return (squares - 2 * products).clamp(min=0)


def keep_large(place: Ints, least: int) -> Ints:
    """Number clusters [n] anew from the largest on; -1 for those of fewer than `least` members.

    Raises:
        ConfigError: fewer than two clusters are left.
    """
    numbers, counts = np.unique(place, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    kept = [int(numbers[i]) for i in order if counts[i] >= least]
    if len(kept) < 2:
        raise ConfigError(
            f"of {len(numbers)} clusters {len(kept)} have {least} videos or more: give fewer --clusters, or a lower "
            "--least"
        )
    renumbered = np.full(int(numbers.max()) + 1, -1, dtype=np.int64)
    renumbered[kept] = np.arange(len(kept))
    return renumbered[place]


def agreement(place: Ints, labels: Ints) -> Agreement:
    """Measure how clusters [n] agree with classes [n]."""
    counts = np.zeros((int(place.max()) + 1, int(labels.max()) + 1))
    np.add.at(counts, (place, labels), 1)
    joint = counts / counts.sum()
    rows, columns = joint.sum(axis=1), joint.sum(axis=0)
    of_both = _entropy(rows) + _entropy(columns)
    shared = of_both - _entropy(joint.ravel())
    return Agreement(float(counts.max(axis=1).sum() / counts.sum()), 2 * shared / of_both if of_both else 1.0)


def _entropy(shares: NDArray[np.float64]) -> float:
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())
