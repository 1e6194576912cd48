"""Set metrics as pure functions of tokens, and the pairs of steps that they matched.

Distances are float32 or wider, also under autocast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from shards_spec.errors import ConfigError

Metric = Literal["hausdorff", "otam"]
Reduction = Literal["sum", "mean"]
LEAST = 0.1  # of a pair's weight beside the largest: less is no line in a picture
MOST = 2  # lines of a step of the query to where it finds its match


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
    return set_cost(1 - token_cosine(query, prototypes), reduction=reduction, single_direction=single_direction)


def set_cost(
    distance: Tensor,
    *,
    metric: Metric = "hausdorff",
    reduction: Reduction = "sum",
    single_direction: bool = False,
    smoothing: float = 0.1,
) -> Tensor:
    """[..., n, m] -> cost [...] of a query's n tokens against m others.

    `reduction` is read by the Hausdorff metric, `smoothing` by the ordered alignment of OTAM.
    """
    if metric == "otam":
        return otam(distance, smoothing) if single_direction else otam_both(distance, smoothing)
    if single_direction:
        return mean_hausdorff(distance, axis=-2, reduction=reduction)
    return bi_mean_hausdorff(distance, reduction=reduction)


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """[V, n, C], [V, m, C] -> 1 - cosine [V, n, m], in float32 (or wider) also under autocast."""
    a, b = full_precision(a), full_precision(b)
    of_a, of_b = (each.norm(dim=-1).clamp(min=1e-12) for each in (a, b))  # the products are divided: they are fewer
    with torch.autocast(a.device.type, enabled=False):
        distance: Tensor = 1 - a @ b.mT / of_a[..., :, None] / of_b[..., None, :]
    return distance


def set_distance(query: Tensor, members: Tensor, *, reduction: Reduction = "sum") -> Tensor:
    """[Q, n, C], [Q, S, m, C] -> [Q, S]: each frame to the nearest of the other set, in both directions."""
    distance = cosine_distance(rearrange(members, "q s m c -> q (s m) c"), query)
    return bi_mean_hausdorff(rearrange(distance, "q (s m) n -> q s m n", s=members.shape[1]), reduction=reduction)


def mean_hausdorff(distance: Tensor, axis: int, *, reduction: Reduction = "sum") -> Tensor:
    """[..., n, m] -> [...]: smallest distance of each token along `axis` to the other set, summed or averaged.

    `axis` is one of the last two: the axis of the tokens that look for their nearest.
    """
    others = -1 if axis % distance.ndim == distance.ndim - 2 else -2
    nearest = full_precision(distance).min(dim=others).values  # [..., n] or [..., m]
    return nearest.sum(dim=-1) if reduction == "sum" else nearest.mean(dim=-1)


def bi_mean_hausdorff(distance: Tensor, *, reduction: Reduction = "sum") -> Tensor:
    """[..., n, m] -> [...]: the Hausdorff distances of both directions added."""
    forward, backward = (mean_hausdorff(distance, axis, reduction=reduction) for axis in (-2, -1))
    return forward + backward


def otam(distance: Tensor, smoothing: float = 0.1) -> Tensor:
    """[..., R, M] -> cost [...] of the ordered alignment that visits every one of the M columns.

    A path enters the first column and leaves the last one at any row; between them it moves right, or right and
    down (Cao et al., CVPR 2020).  The minimum over paths is softened by `smoothing`, the
    paper's lambda, except in row 0, which is a plain sum as in the published code
    (alibaba-mmai-research/MoLo).  That code takes bare exponentials, which underflow where costs pass 10 at
    lambda 0.1; a logsumexp gives the same values where it is finite, and finite ones elsewhere.
    """
    rows, columns = distance.shape[-2:]
    # In units of -smoothing a soft minimum is a logsumexp, and what does not count is -inf.
    steps = anti_diagonals(full_precision(distance) / -smoothing)  # R + M + 1 of [..., R]
    row = torch.arange(rows, device=distance.device)
    outside = distance.new_full((*distance.shape[:-2], 1), -torch.inf, dtype=steps[0].dtype)
    before = last = torch.zeros_like(steps[0])  # costs [..., R] of the two diagonals before this one
    for number, step in enumerate(steps[1:], start=1):
        column = number - row  # [R] of each cell; 0 and M + 1 are the columns added beside the distances
        above = torch.cat([outside, last[..., :-1]], dim=-1)
        above = above.masked_fill((column != 1) & (column != columns + 1), -torch.inf)  # down moves: at the ends only
        diagonal = torch.cat([outside, before[..., :-1]], dim=-1)
        cost = step + torch.logsumexp(torch.stack([diagonal, last, above]), dim=0)
        before, last = last, cost.masked_fill(column <= 0, 0)
    return -smoothing * last[..., -1]


def otam_both(distance: Tensor, smoothing: float = 0.1) -> Tensor:
    """[..., R, M] -> [...]: alignment costs of rows over columns and of columns over rows added."""
    turned = distance.transpose(-2, -1)
    if distance.shape != turned.shape:
        return otam(distance, smoothing) + otam(turned, smoothing)
    return otam(torch.stack([distance, turned]), smoothing).sum(dim=0)  # half the steps


def check_smoothing(smoothing: float) -> None:
    """Raise ConfigError unless it softens a minimum."""
    if smoothing <= 0:
        raise ConfigError(f"smoothing={smoothing} is no softness of a minimum; give a number above 0")


def anti_diagonals(distance: Tensor) -> tuple[Tensor, ...]:
    """[..., R, M] -> R + M + 1 anti-diagonals [..., R], of the distances with a column of zeros on either side.

    Entry l of diagonal k is row l, column k - l; it is 0 where there is no such column.
    """
    rows = distance.shape[-2]
    padded = F.pad(distance, (1, 1 + rows)).flatten(-2)  # [..., R * (M + 2 + R)]
    skewed = rearrange(padded[..., :-rows], "... (row k) -> k ... row", row=rows)  # row l moved l to the right
    return tuple(skewed)


def cosine(query: Tensor, prototypes: Tensor) -> Tensor:
    """[Q, C], [W, C] -> cosine [Q, W]."""
    query, prototypes = F.normalize(full_precision(query), dim=-1), F.normalize(full_precision(prototypes), dim=-1)
    with torch.autocast(query.device.type, enabled=False):
        return query @ prototypes.T


def squared_lengths(maps: Tensor, sums: Tensor) -> Tensor:
    """Maps [..., r, width] and coefficients [..., n, r] -> squared length [..., n] of each sum of maps."""
    return ((sums @ (maps @ maps.mT)) * sums).sum(dim=-1)


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
