"""The matching of each method in the order in which published code does it, with the weights of our models.

Written anew from descriptions of alibaba-mmai-research/MoLo and HyRSMPlusPlus and tobyperrett/trx: the same
mathematics as `fsar.methods`, the same parameters, hence the same logits and gradients up to rounding.  All take
support [way, shot, T, C] and query [Q, T, C].  They return logits [Q, way] and a loss of the method's own (or 0).
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from fsar.methods.ctx import CTX
from fsar.methods.hyrsm import HyRSM
from fsar.methods.molo import MoLo
from fsar.methods.otam import OTAM
from fsar.methods.prototype import Prototype
from fsar.methods.trx import TRX, TupleAttention

LENGTH_GUARD = 0.01  # added to the product of the lengths of two vectors


def all_cosines(a: Tensor, b: Tensor) -> Tensor:
    """[n, C], [m, C] -> [n, m]."""
    lengths = a.norm(dim=-1)[:, None] * b.norm(dim=-1)[None]
    return (a @ b.T) / (lengths + LENGTH_GUARD)


def pairwise(query: Tensor, support: Tensor) -> Tensor:
    """[Q, n, C], [S, m, C] -> 1 - cosine [Q, S, n, m], from one table of all tokens with all."""
    table = 1 - all_cosines(query.flatten(0, 1), support.flatten(0, 1))  # [Q n, S m]
    return table.unflatten(0, query.shape[:2]).unflatten(2, support.shape[:2]).transpose(1, 2)


def both_nearest(distance: Tensor) -> Tensor:
    """[Q, S, n, m] -> [Q, S]: smallest distances of the tokens of either side, summed."""
    return distance.min(dim=3).values.sum(dim=2) + distance.min(dim=2).values.sum(dim=2)


def by_class(support: Tensor) -> Tensor:
    """[way, shot, ...] -> [way, ...]: means, one class after another."""
    return torch.stack([videos.mean(dim=0) for videos in support])


def molo(model: MoLo, support: tuple[Tensor, Tensor], query: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens and motion tokens: cosine tables, minima in both directions."""
    near = [both_nearest(pairwise(theirs, by_class(ours))) for ours, theirs in zip(support, query, strict=True)]
    logits = -(near[0] + model.motion_weight * near[1])
    return logits, logits.new_zeros(())


def hyrsm(model: HyRSM, support: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """A sequence of support and query for each query, fused frame by frame of each pair of query and class."""
    classes = by_class(support)  # [S, T, C]
    count, steps = len(classes), classes.shape[1]
    repeated = classes[None].repeat(len(query), 1, 1, 1)  # [Q, S, T, C]
    tokens = torch.cat([repeated.mean(dim=2), query.mean(dim=1)[:, None]], dim=1)  # [Q, S+1, C]
    relations = relate(model, tokens)[:, :, None].repeat(1, 1, steps, 1)  # [Q, S+1, T, C]
    members = fuse(model, torch.cat([repeated, relations[:, :count]], dim=-1))
    queries = fuse(model, torch.cat([query[:, None], relations[:, count:]], dim=-1))[:, 0]
    a, b = F.normalize(members, dim=-1), F.normalize(queries, dim=-1)
    distance = 1 - a @ b[:, None].mT  # [Q, S, T, T]
    extra = model.fused_losses(members, queries).values()
    return -both_nearest(distance), sum(extra, start=distance.new_zeros(()))


def relate(model: HyRSM, tokens: Tensor) -> Tensor:
    """[Q, S+1, C] -> [Q, S+1, C]: attention among the tokens of each query's own sequence."""
    layer = model.relation
    q, k, v = (
        project(tokens).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        for project in (layer.query, layer.key, layer.value)
    )  # [Q, head, S+1, c]
    weights = torch.matmul(q / math.sqrt(q.shape[-1]), k.mT).softmax(dim=-1)
    attended = torch.matmul(weights, v).transpose(1, 2).flatten(2)  # [Q, S+1, C]
    return F.relu(layer.norm(layer.output(attended) + tokens))


def fuse(model: HyRSM, pairs: Tensor) -> Tensor:
    """Frame and relation side by side [Q, S, T, 2C] -> [Q, S, T, C]."""
    fused: Tensor = model.fusion(pairs.flatten(0, 1).mT)  # [Q S, C, T]
    return fused.mT.unflatten(0, pairs.shape[:2])


def otam(model: OTAM, support: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """Both alignments of each pair of videos, one cell of the table after another."""
    distance = pairwise(query, support.flatten(0, 1))  # [Q, S, T, T]
    costs = align(distance, model.smoothing) + align(distance.mT, model.smoothing)  # [Q, S]
    logits = -costs.unflatten(1, support.shape[:2]).mean(dim=2)
    return logits, logits.new_zeros(())


def align(distance: Tensor, smoothing: float) -> Tensor:
    """[Q, S, R, M] -> [Q, S]: the recursion written out over rows and columns, with bare exponentials."""
    distance = F.pad(distance, (1, 1))
    rows, columns = distance.shape[-2:]
    costs = torch.zeros_like(distance)
    for column in range(1, columns):
        costs[:, :, 0, column] = costs[:, :, 0, column - 1] + distance[:, :, 0, column]
    for row in range(1, rows):
        for column in range(1, columns):
            before = [(row - 1, column - 1), (row, column - 1)]
            if column in (1, columns - 1):
                before.append((row - 1, column))
            total = sum(torch.exp(-costs[:, :, r, c] / smoothing) for r, c in before)
            costs[:, :, row, column] = distance[:, :, row, column] - smoothing * torch.log(cast("Tensor", total))
    return costs[:, :, -1, -1]


def trx(model: TRX, support: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """Every tuple of frames concatenated and projected, class after class, a softmax for each query."""
    logits = torch.stack([attend_tuples(part, support, query) for part in model.parts]).mean(dim=0)
    return logits, logits.new_zeros(())


def attend_tuples(part: TupleAttention, support: Tensor, query: Tensor) -> Tensor:
    """Logits [Q, way] of one tuple size."""
    way, shot = support.shape[:2]
    own, theirs = (tuples(part, videos) for videos in (support.flatten(0, 1), query))  # [V, n, size * C]
    keys, values = part.norm_k(part.k_linear(own)), part.v_linear(own)
    query_keys, query_values = part.norm_k(part.k_linear(theirs)), part.v_linear(theirs)
    columns = []
    for number in range(way):
        videos = slice(number * shot, (number + 1) * shot)
        scores = torch.matmul(query_keys[:, None], keys[videos].mT) / math.sqrt(part.width)  # [Q, shot, n, n]
        scores = scores.transpose(1, 2).flatten(2)  # [Q, n, shot * n]
        weights = torch.cat([each.softmax(dim=-1)[None] for each in scores])
        weights = weights.unflatten(2, (shot, -1)).transpose(1, 2)  # [Q, shot, n, n]
        prototype = torch.matmul(weights, values[videos]).sum(dim=1)  # [Q, n, width]
        length = torch.linalg.vector_norm(query_values - prototype, dim=(-2, -1))
        columns.append(-(length**2) / own.shape[1])
    return torch.stack(columns, dim=1)


def tuples(part: TupleAttention, videos: Tensor) -> Tensor:
    """[V, T, C] -> [V, n, size * C]."""
    coded = videos + part.positions[: videos.shape[1]]
    every = combinations(range(videos.shape[1]), part.size)
    return torch.stack([coded[:, list(places)].flatten(1) for places in every], dim=1)


def ctx(model: CTX, support: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of the support regrouped by class, one attention over all frames of a class."""
    flat = support.flatten(0, 1).mT  # [S, C, T]
    frames = [
        head(flat).unflatten(0, support.shape[:2]).transpose(1, 2).flatten(2)
        for head in (model.query_head, model.value_head)
    ]  # [way, width, shot * T] each
    queries, targets = model.query_head(query.mT), model.value_head(query.mT)  # [Q, width, T]
    scores = torch.einsum("q c t, w c x -> q w t x", queries, frames[0]) / math.sqrt(queries.shape[1])
    aligned = torch.einsum("q w t x, w c x -> q w t c", scores.softmax(dim=-1), frames[1])
    near = (F.normalize(aligned, dim=-1) * F.normalize(targets.mT, dim=-1)[:, None]).sum(dim=-1)  # [Q, way, T]
    logits = near.sum(dim=-1) / query.shape[1]
    return logits, logits.new_zeros(())


def prototype(model: Prototype, support: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine of time-averaged features with every support video, mean over those of a class."""
    assert model.temperature == 1
    table = all_cosines(query.mean(dim=1), support.mean(dim=2).flatten(0, 1))  # [Q, S]
    logits = torch.stack([columns.mean(dim=1) for columns in table.split(support.shape[1], dim=1)], dim=1)
    return logits, logits.new_zeros(())
