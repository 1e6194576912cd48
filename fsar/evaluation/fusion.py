"""Choose the share of motion in the answers of two streams, never on the videos that are tested.

"train" takes the share with which most queries of training or validation classes are right.
"support" takes the one with which most support videos of an episode are told from the others.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fsar.evaluation.logits import by_pairs, decide
from fsar.methods import Embedding, FewShotMethod, Fusion
from fsar.trunks import Stream

SHARES = tuple(step / 10 for step in range(11))
SUPPORT = "support"
Ints = NDArray[np.int64]


def spread(logits: Tensor) -> float:
    """Return the mean over queries [..., way] of the standard deviation over the classes."""
    return float(logits.double().std(dim=-1, correction=0).mean())


def accuracies(spreads: tuple[float, float], frames: Tensor, motion: Tensor, labels: Tensor) -> list[float]:
    """Return the accuracy with each share of motion, from logits [..., way] of these spreads."""
    answers = (decide(Fusion(share, *spreads).logits(frames, motion), labels) for share in SHARES)
    return [float((said == labels).double().mean()) for said in answers]


def calibrated(rule: float | str, frames: Tensor, motion: Tensor, labels: Tensor) -> tuple[Fusion, list[float]]:
    """Measure the spreads of both streams and choose the share of motion.

    Args:
        rule: The share itself, or "train": the most accurate one, on a tie the middle of the longest
            tied run.
        frames: [N, Q, way] logits on episodes of training or validation classes.
        motion: The same.
        labels: [N, Q].

    Returns:
        The fusion, and the accuracy with each share of SHARES.
    """
    spreads = spread(frames), spread(motion)
    found = accuracies(spreads, frames, motion, labels)
    share = middle_of_best(found) if isinstance(rule, str) else rule
    return Fusion(share, *spreads), found


def middle_of_best(found: list[float]) -> float:
    """Choose among SHARES the middle of the longest run of the highest accuracy."""
    best = max(found)
    runs: list[list[float]] = [[]]
    for share, value in zip(SHARES, found, strict=True):
        if value == best:
            runs[-1].append(share)
        elif runs[-1]:
            runs.append([])
    longest = max(runs, key=len)
    return round((longest[0] + longest[-1]) / 2, 2)


def of_support(
    methods: Mapping[Stream, FewShotMethod],
    support: Mapping[Stream, Embedding],
    groups: Ints,
    mask: Tensor | None = None,
) -> Fusion:
    """Choose the share of motion for one episode, by leaving out each support video in turn.

    A video is compared with the support as a query is: of its own class with videos of other groups
    only, of other classes with all. On a tie the share is the mean of the best ones; without any
    comparison it is a half.

    Args:
        methods: The method of each stream.
        support: Embeddings [way, shot, ...] of the support by each.
        groups: [way, shot] numbers of the videos' groups.
        mask: [way, shot], False at the padding of unequal shots.
    """
    way, shot = groups.shape
    labels, flat = np.repeat(np.arange(way), shot), groups.ravel()
    real = torch.ones(way, shot, dtype=torch.bool) if mask is None else mask.cpu()
    of_others = (flat[:, None] != flat) | (labels[:, None] != labels)
    for apart in (of_others, ~np.eye(way * shot, dtype=bool)):
        allowed = torch.from_numpy(apart.reshape(-1, way, shot)) & real  # [S, way, shot]
        usable = real.flatten() & allowed.any(dim=2).all(dim=1)
        if bool(usable.any()):
            break
    else:
        return Fusion()
    logits = {name: left_out(method, support[name], allowed)[usable].cpu().float() for name, method in methods.items()}
    frames, motion = logits["frames"], logits["motion"]
    spreads = spread(frames), spread(motion)
    if apart is not of_others:  # videos of one group tell the spreads, and nothing else
        return Fusion(0.5, *spreads)
    found = accuracies(spreads, frames, motion, torch.from_numpy(labels)[usable])
    best = [share for share, value in zip(SHARES, found, strict=True) if value == max(found)]
    return Fusion(sum(best) / len(best), *spreads)


@torch.no_grad()
def left_out(method: FewShotMethod, support: Embedding, allowed: Tensor) -> Tensor:
    """Compare each support video with those that it may be compared with: logits [S, way].

    Args:
        method: In eval mode.
        support: [way, shot, ...].
        allowed: [S, way, shot]; of a class without any the logit means nothing.
    """
    way, shot = allowed.shape[1:]
    each = support.map(lambda x: x.flatten(0, 1))  # [S, ...]
    if by_pairs(method, shot):
        pairs = method.match(each.map(lambda x: x[:, None]), each)  # [S, S]: every video a class of its own
        open_pairs = allowed.flatten(1).to(pairs.device)
        means = pairs.masked_fill(~open_pairs, 0).view(-1, way, shot).sum(dim=2)
        return means / open_pairs.view(-1, way, shot).sum(dim=2).clamp(min=1)
    return torch.cat([_of_one(method, support, each, i, mask) for i, mask in enumerate(allowed)])


def _of_one(method: FewShotMethod, support: Embedding, each: Embedding, number: int, mask: Tensor) -> Tensor:
    """Compare support video `number` with the open places [way, shot] of the support: [1, way]."""
    return method.match(support, each.map(lambda x: x[number : number + 1]), mask=_with_one(mask))


def _with_one(mask: Tensor) -> Tensor:
    """Open a place of each class [way, shot] that has none: a mean needs one video."""
    mask = mask.clone()
    mask[~mask.any(dim=1), 0] = True
    return mask
