"""Set metrics as pure functions of tokens, and the pairs of steps that they match.

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
SHIFT_PRICE = 0.02  # of a step of time, in cosine
LEAST = 0.1  # share of the largest weight of a pair: below it a picture has no line
MOST = 2  # lines of a step of the query to its matches


def full_precision(x: Tensor) -> Tensor:
    """Convert to float32; float64 stays as it is."""
    return x if x.dtype == torch.float64 else x.float()


def class_means(support: Tensor, mask: Tensor | None = None) -> Tensor:
    """Average the shots of each class: [way, shot, ...] -> [way, ...].

    `mask` [way, shot] is False at padding.
    """
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

    The constant is that of the reference code (alibaba-mmai-research/MoLo). It keeps tokens of
    zeros finite.
    """
    query, prototypes = full_precision(query), full_precision(prototypes)
    with torch.autocast(query.device.type, enabled=False):
        products = torch.einsum("q n c, w m c -> q w n m", query, prototypes)
    lengths = rearrange(query.norm(dim=-1), "q n -> q 1 n 1") * rearrange(prototypes.norm(dim=-1), "w m -> 1 w 1 m")
    similarity: Tensor = products / (lengths + 0.01)
    return similarity


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """[V, n, C], [V, m, C] -> 1 - cosine [V, n, m]."""
    a, b = full_precision(a), full_precision(b)
    of_a, of_b = (each.norm(dim=-1).clamp(min=1e-12) for each in (a, b))  # divides the products: fewer numbers
    with torch.autocast(a.device.type, enabled=False):
        distance: Tensor = 1 - a @ b.mT / of_a[..., :, None] / of_b[..., None, :]
    return distance


def cosine(query: Tensor, prototypes: Tensor) -> Tensor:
    """[Q, C], [W, C] -> cosine [Q, W]."""
    query, prototypes = F.normalize(full_precision(query), dim=-1), F.normalize(full_precision(prototypes), dim=-1)
    with torch.autocast(query.device.type, enabled=False):
        return query @ prototypes.T


def shift_cosine(query: Tensor, others: Tensor, *, most: int | None = None, price: float = SHIFT_PRICE) -> Tensor:
    """Compare whole sequences [Q, T, C] and [S, T, C] at their best shift in time: [Q, S].

    The similarity is the maximum over shifts k of the cosine of the sequences, one of them moved by
    k steps, less `price` times |k|.  Steps that are moved out of the other sequence are left out;
    the lengths are those of the whole sequences.  At no shift it is the cosine of the sequences.  A
    sequence of zeros has similarity 0.

    Args:
        query: [Q, T, C].
        others: [S, T, C].
        most: Steps that a sequence may be moved by, either way; None: a quarter of T, rounded.
        price: What each step costs.
    """
    query, others = full_precision(query), full_precision(others)
    with torch.autocast(query.device.type, enabled=False):
        products = torch.einsum("q t c, s u c -> q s t u", query, others)
    lengths = query.flatten(1).norm(dim=1)[:, None] * others.flatten(1).norm(dim=1)  # [Q, S]
    steps = range(-shifts(query.shape[1], most), shifts(query.shape[1], most) + 1)
    sums = [products.diagonal(k, dim1=2, dim2=3).sum(dim=-1) / (lengths + 1e-6) - price * abs(k) for k in steps]
    return torch.stack(sums).amax(dim=0)


def shifts(steps: int, most: int | None) -> int:
    """Return the steps that a sequence of T steps may be moved by: `most`, or a quarter of T."""
    return min(round(steps / 4) if most is None else most, steps - 1)


def squared_lengths(maps: Tensor, coefficients: Tensor) -> Tensor:
    """Compute the squared length of each of n weighted combinations of maps, without forming one.

    Args:
        maps: [..., r, width].
        coefficients: [..., n, r].

    Returns:
        [..., n].
    """
    return ((coefficients @ (maps @ maps.mT)) * coefficients).sum(dim=-1)


def set_cost(
    distance: Tensor,
    *,
    metric: Metric = "hausdorff",
    reduction: Reduction = "sum",
    single_direction: bool = False,
    smoothing: float = 0.1,
) -> Tensor:
    """Compare a query's n tokens with m others, as sets or in order.

    Args:
        distance: [..., n, m] of tokens.
        metric: "hausdorff" takes each token to its nearest, "otam" aligns the tokens in time.
        reduction: Of "hausdorff": see `mean_hausdorff`.
        single_direction: Take only the query's tokens to the others, not the others to the query's.
        smoothing: Of "otam": its lambda.

    Returns:
        Costs [...].
    """
    if metric == "otam":
        return otam(distance, smoothing) if single_direction else otam_both(distance, smoothing)
    if single_direction:
        return mean_hausdorff(distance, axis=-2, reduction=reduction)
    return bi_mean_hausdorff(distance, reduction=reduction)


def hausdorff(
    query: Tensor, prototypes: Tensor, *, reduction: Reduction = "sum", single_direction: bool = False
) -> Tensor:
    """[Q, n, C], [W, m, C] -> distance [Q, W]: each token to the nearest of the other set.

    Both directions are added. "mean" is the bidirectional mean Hausdorff metric of the MoLo and
    HyRSM papers, "sum" that of their code. `single_direction` takes only the query's tokens to the
    nearest of the class.
    """
    return set_cost(1 - token_cosine(query, prototypes), reduction=reduction, single_direction=single_direction)


def set_distance(query: Tensor, members: Tensor, *, reduction: Reduction = "sum") -> Tensor:
    """[Q, n, C], [Q, S, m, C] -> [Q, S]: each token to the nearest of the other set, both ways."""
    distance = cosine_distance(rearrange(members, "q s m c -> q (s m) c"), query)
    return bi_mean_hausdorff(rearrange(distance, "q (s m) n -> q s m n", s=members.shape[1]), reduction=reduction)


def mean_hausdorff(distance: Tensor, axis: int, *, reduction: Reduction = "sum") -> Tensor:
    """[..., n, m] -> [...]: smallest distance of each token to the other set, summed or averaged.

    `axis`, one of the last two, is that of the tokens that look for their nearest.
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

    A path enters the first column at any row and leaves the last one at any row. Between them it
    moves right, or right and down (Cao et al., CVPR 2020). `smoothing`, the paper's lambda, softens
    the minimum over paths. In row 0 it is a plain sum, as in the published code
    (alibaba-mmai-research/MoLo). That code takes bare exponentials, which underflow where costs
    pass 10 at lambda 0.1. A logsumexp gives the same values where those are finite, and finite ones
    elsewhere.
    """
    rows, columns = distance.shape[-2:]
    # In units of -smoothing a soft minimum is a logsumexp, and a forbidden move is -inf.
    steps = anti_diagonals(full_precision(distance) / -smoothing)  # R + M + 1 of [..., R]
    row = torch.arange(rows, device=distance.device)
    outside = distance.new_full((*distance.shape[:-2], 1), -torch.inf, dtype=steps[0].dtype)
    before = last = torch.zeros_like(steps[0])  # costs [..., R] of the two diagonals before this one
    for number, step in enumerate(steps[1:], start=1):
        column = number - row  # [R] of each cell; 0 and M + 1 are the two columns of zeros
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
    return otam(torch.stack([distance, turned]), smoothing).sum(dim=0)  # one pass over diagonals, not two


def anti_diagonals(distance: Tensor) -> tuple[Tensor, ...]:
    """Cut distances [..., R, M] into R + M + 1 anti-diagonals [..., R].

    A column of zeros is added on either side. Entry l of diagonal k is row l, column k - l; it is 0
    where there is no such column. All cells of a diagonal depend only on the two diagonals before
    it, so `otam` computes them at once.
    """
    rows = distance.shape[-2]
    padded = F.pad(distance, (1, 1 + rows)).flatten(-2)  # [..., R * (M + 2 + R)]
    # Read again in rows of one number less, row l lies l places further right: columns are
    # diagonals.
    skewed = rearrange(padded[..., :-rows], "... (row k) -> k ... row", row=rows)
    return tuple(skewed)


def check_smoothing(smoothing: float) -> None:
    """Refuse a smoothing that softens no minimum: ConfigError."""
    if smoothing <= 0:
        raise ConfigError(f"smoothing={smoothing} is no softness of a minimum; give a number above 0")


class Pair(NamedTuple):
    """A step of a query and one of the support, with their match's weight in either direction."""

    query: int
    support: int
    of_query: float
    of_support: float
    similarity: float


@dataclass(frozen=True)
class Alignment:
    """The weight of each pair of a query's n and a support member's m steps in their distance.

    The S members are the classes of an episode (the means of their videos), or all its support
    videos, class by class. A step is a frame, a clip, or the motion from one frame to the next.

    Attributes:
        similarity: [Q, S, n, m] cosine of the tokens.
        of_query: [Q, S, n, m] weights of the matches of each step of the query; None where the
            metric does not look for them.
        of_support: [Q, S, n, m] weights of the matches of each step of the support; None likewise.
    """

    similarity: Tensor
    of_query: Tensor | None
    of_support: Tensor | None

    @property
    def total(self) -> Tensor:
        """[Q, S] summed similarity of the matches: the greater, the nearer."""
        weights = [each for each in (self.of_query, self.of_support) if each is not None]
        return torch.stack([(each * self.similarity).sum(dim=(-2, -1)) for each in weights]).sum(dim=0)

    def pairs(self, query: int, member: int, *, least: float = LEAST) -> list[Pair]:
        """List the pairs of one query and one member with at least a share of the largest weight.

        The threshold is relative, since attention that is spread over all videos of a class has
        only small weights. A step of the query keeps its two largest matches.
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
    """Find the matches of `set_cost` at cosine distances [Q, S, n, m], with the same arguments.

    The Hausdorff metric takes each step to its nearest. The soft minimum of OTAM is over all paths:
    the weight of a pair is that of the paths through it, which is the gradient of the cost (Mensch
    and Blondel, ICML 2018).
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
    """[..., n, m] -> share [..., n, m] of OTAM's paths that go through each pair.

    A column sums to 1; the first one sums to more where paths move down in it.
    """
    with torch.enable_grad():
        free = distance.detach().requires_grad_()
        (weights,) = torch.autograd.grad(otam(free, smoothing).sum(), free)
    return weights
