"""FIMA's pairs of places, its foreground and its dense loss, without a shape that depends on values.

Source: Zhu et al., "Fine-Grained Spatiotemporal Motion Alignment for Contrastive Video Representation Learning",
ACM Multimedia 2023, as its code has it (ZMHH-H/FIMA).
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd import Function

from fsar.matching import full_precision

ENTRIES = 2**24  # similarities that are held at a time: 64 MB


def _centres(coordinates: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Corners [B, 4] of crops -> centres [B, P, 2] of the cells of a grid (rows, columns), and their diagonals [B]."""
    rows, columns = grid
    x1, y1, x2, y2 = full_precision(coordinates).unbind(1)
    width, height = (x2 - x1) / columns, (y2 - y1) / rows  # a flipped crop has a negative width
    along = torch.arange(columns, device=x1.device) + 0.5
    down = torch.arange(rows, device=x1.device) + 0.5
    x = (x1[:, None] + along * width[:, None])[:, None, :].expand(-1, rows, -1)
    y = (y1[:, None] + down * height[:, None])[:, :, None].expand(-1, -1, columns)
    return rearrange([x, y], "xy b r c -> b (r c) xy"), torch.hypot(width, height)


def cell_distances(query: Tensor, key: Tensor, grid: tuple[int, int]) -> Tensor:
    """Corners [B, 4], [B, 4] of crops -> [B, P, P]: distance of each query cell's centre to each key cell's.

    It is measured in the longer of the two cells' diagonals.
    """
    (query_centres, query_diagonal), (key_centres, key_diagonal) = _centres(query, grid), _centres(key, grid)
    apart = query_centres[:, :, None] - key_centres[:, None]  # [B, P, P, 2]
    distances: Tensor = apart.norm(dim=-1) / torch.maximum(query_diagonal, key_diagonal)[:, None, None]
    return distances


def correspondence(query: Tensor, key: Tensor, grid: tuple[int, int], *, ratio: float = 0.7) -> Tensor:
    """Corners [B, 4], [B, 4] of crops -> bool [B, P, P]: which cells of a grid show the same place."""
    return cell_distances(query, key, grid) < ratio


def foreground_mask(rgb: Tensor, difference: Tensor) -> Tensor:
    """Maps [B, C, t, h, w] of a clip and of its frame difference -> bool [B, h, w]: where they are strong.

    That is above the median over places of their means summed, the lower median of an even number.
    """
    strength = full_precision(rgb).mean(dim=(1, 2)) + full_precision(difference).mean(dim=(1, 2))  # [B, h, w]
    return strength > strength.flatten(1).median(dim=1).values[:, None, None]


class _LogSumExp(Function):
    """log sum_j exp(q_i k_j / T) some rows at a time; what backward needs, the mean key, is as small as the queries."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, temperature: float, rows: int) -> Tensor:  # noqa: ANN401
        sums = queries.new_empty(len(queries))
        means = torch.empty_like(queries) if ctx.needs_input_grad[0] else None
        for start in range(0, len(queries), rows):
            some = slice(start, start + rows)
            scores = (queries[some] / temperature) @ keys.T  # [rows, M]
            torch.logsumexp(scores, dim=1, out=sums[some])
            if means is not None:
                torch.mm(scores.sub_(sums[some, None]).exp_(), keys, out=means[some])
        if means is not None:
            ctx.save_for_backward(means.div_(temperature))
        return sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        (means,) = ctx.saved_tensors
        return grads[0][:, None] * means, None, None, None


def log_sum_exp(queries: Tensor, keys: Tensor, *, temperature: float, entries: int = ENTRIES) -> Tensor:
    """[N, D], [M, D] -> [N]: log sum_j exp(q_i . k_j / temperature), in float32 or wider.

    At most `entries` of the N x M similarities are held at a time, forward or backward; keys get no gradient.
    """
    queries, keys = full_precision(queries), full_precision(keys.detach())
    rows = max(1, entries // len(keys))
    with torch.autocast(queries.device.type, enabled=False):
        sums: Tensor = _LogSumExp.apply(queries, keys, temperature, rows)  # type: ignore[no-untyped-call]
    return sums


def dense_loss(
    queries: Tensor, keys: Tensor, positive: Tensor, *, all_keys: Tensor, temperature: float = 0.1
) -> Tensor:
    """-log(sum over positive keys / sum over all keys) of exp(q . k / temperature), a scalar.

    queries, keys: [B, P, D], unit vectors of the same feature frame; positive: bool [B, P, P], which keys of its own
    video show a query's place; all_keys: [M, D] what the query is told apart from, the positive ones among them.
    The mean is over the places of a video that have a positive key, then over the videos that have such a place;
    with none at all the loss is 0.
    """
    queries, keys = full_precision(queries), full_precision(keys.detach())
    below = log_sum_exp(queries.flatten(0, 1), all_keys, temperature=temperature).view(queries.shape[:2])  # [B, P]
    counts = positive.any(dim=2)  # [B, P]
    with torch.autocast(queries.device.type, enabled=False):
        similar = torch.einsum("b i d, b j d -> b i j", queries / temperature, keys)
    # a row without positive keys takes all, which keeps it finite; it weighs nothing
    above = similar.masked_fill((positive | ~counts[:, :, None]).logical_not(), -torch.inf).logsumexp(dim=2)
    losses = torch.where(counts, below - above, 0).sum(dim=1) / counts.sum(dim=1).clamp(min=1)  # [B]
    return losses.sum() / counts.any(dim=1).sum().clamp(min=1)
