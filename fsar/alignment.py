"""What set metrics match with what: the pairs of steps that a distance is made of, and how much each counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fsar.matching import Metric, full_precision, otam

LEAST = 0.1  # of a pair's weight beside the largest: less is no line in a picture
MOST = 2  # lines of a step of the query to where it finds its match


class Pair(NamedTuple):
    """A step of a query and one of the support, matched with a weight in [0, 1] in either direction."""

    query: int
    support: int
    of_query: float
    of_support: float
    similarity: float


@dataclass(frozen=True)
class Alignment:
    """How much each pair of a query's n and a support member's m steps counts in their distance.

    The S members are the classes of an episode (the means of their videos), or all its support videos class by class.
    A step is a frame, a clip, or the motion from one frame to the next.

    Attributes:
        similarity: [Q, S, n, m] cosine of the tokens.
        of_query: [Q, S, n, m] where each step of the query finds its match; None where the metric does not ask.
        of_support: [Q, S, n, m] where each step of the support finds its match; None likewise.
    """

    similarity: Tensor
    of_query: Tensor | None
    of_support: Tensor | None

    @property
    def total(self) -> Tensor:
        """[Q, S] summed similarity of what is matched: the greater, the nearer."""
        weights = [each for each in (self.of_query, self.of_support) if each is not None]
        return torch.stack([(each * self.similarity).sum(dim=(-2, -1)) for each in weights]).sum(dim=0)

    def pairs(self, query: int, member: int, *, least: float = LEAST) -> list[Pair]:
        """The pairs of one query and one member that count at least so much, beside the largest, in one direction.

        Attention that is spread over all videos of a class has small weights only, so that none is too small in itself;
        of a step of the query there are the two that count most.
        """
        similarity = self.similarity[query, member]  # [n, m]
        none = torch.zeros_like(similarity)
        of_query, of_support = (
            none if each is None else each[query, member] for each in (self.of_query, self.of_support)
        )
        enough = least * torch.maximum(of_query, of_support).max()
        best = of_query.topk(min(MOST, of_query.shape[1])).indices  # [n, 2]
        asked = torch.zeros_like(of_query).scatter(1, best, of_query.gather(1, best))  # [n, m]
        counts = torch.maximum(asked, of_support)
        places = (counts.ge(enough) & counts.gt(0)).nonzero().tolist()
        return [Pair(i, j, float(of_query[i, j]), float(of_support[i, j]), float(similarity[i, j])) for i, j in places]


def matched(
    distance: Tensor, *, metric: Metric = "hausdorff", single_direction: bool = False, smoothing: float = 0.1
) -> Alignment:
    """What `set_cost` matches at cosine distances [Q, S, n, m]; arguments as of that.

    The Hausdorff metric takes each step to its nearest.  The soft minimum of OTAM is over all paths: a pair weighs
    what the paths through it weigh, which is the gradient of the cost (Mensch and Blondel, ICML 2018).
    """
    distance = full_precision(distance).detach()
    similarity = 1 - distance
    if metric == "otam":
        of_support = path_weights(distance, smoothing)  # a path visits each step of the support
        of_query = None if single_direction else path_weights(distance.mT, smoothing).mT
        return Alignment(similarity, of_query, of_support)
    of_query = F.one_hot(distance.argmin(dim=-1), distance.shape[-1]).to(distance)
    if single_direction:
        return Alignment(similarity, of_query, None)
    return Alignment(similarity, of_query, F.one_hot(distance.argmin(dim=-2), distance.shape[-2]).to(distance).mT)


def path_weights(distance: Tensor, smoothing: float) -> Tensor:
    """[..., n, m] -> share [..., n, m] of OTAM's paths that go through each pair; a column sums to 1.

    The first sums to more where paths move down in it.
    """
    with torch.enable_grad():
        free = distance.detach().requires_grad_()
        (weights,) = torch.autograd.grad(otam(free, smoothing).sum(), free)
    return weights
