"""Compute accuracy from scores of videos, with two intervals over the test videos."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fsar.evaluation.intervals import Z95
from shards_spec.errors import choice

AVERAGES = ("logit", "logprob", "prob")


def average_clips(logits: Tensor, how: str) -> Tensor:
    """Average logits [..., clips, K] of a video's clips, or (log-)probabilities, to [..., K].

    "logit" and "logprob" rank the classes alike: a clip's logits and log-probabilities differ by
    one number.
    """
    choice("clip_average", how, AVERAGES)
    if how == "logprob":
        return logits.log_softmax(dim=-1).mean(dim=-2)
    return (logits if how == "logit" else logits.softmax(dim=-1)).mean(dim=-2)


def wilson(share: float, count: int) -> tuple[float, float]:
    """Compute the 95 % interval of a share of `count` independent videos (Wilson 1927)."""
    centre = (share + Z95**2 / (2 * count)) / (1 + Z95**2 / count)
    half = Z95 / (1 + Z95**2 / count) * math.sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def group_interval(values: NDArray[Any], groups: NDArray[Any]) -> float | None:
    """Return half the width of the 95 % interval of the mean of grouped values [V].

    Videos of a group resemble each other.  The interval is that of a bootstrap that draws whole
    groups anew, in closed form, to first order: the variance of the mean is the sum of the groups'
    squared residuals over V^2, times G / (G - 1).  A group of -1 is a video by itself.  None for a
    single group, or where all values are alike: then nothing can be drawn that differs.
    """
    units = np.where(groups < 0, groups.max(initial=0) + 1 + np.arange(len(groups)), groups)
    _, place = np.unique(units, return_inverse=True)
    residuals = np.bincount(place, values - values.mean())
    count = len(residuals)
    if count < 2 or not residuals.any():
        return None
    return Z95 * math.sqrt(float(np.square(residuals).sum()) * count / (count - 1)) / len(values)


@dataclass(frozen=True)
class Asked:
    """The test videos: their truth, and their groups for the intervals.

    Attributes:
        truth: [V] places of their classes in `classes`.
        groups: [V] groups, -1 where none is known.
        short: [V] whether a video is shorter than a clip's window.
        classes: Names of the classes.
    """

    truth: NDArray[np.int64]
    groups: NDArray[np.int64]
    short: NDArray[np.bool_]
    classes: Sequence[str]

    @property
    def grouped(self) -> bool:
        """Tell whether the group of any video is known."""
        return bool((self.groups >= 0).any())

    def share(self, right: NDArray[np.bool_]) -> dict[str, Any]:
        """Return the share of right answers [V], its intervals, and the answers as text."""
        accuracy = float(right.mean())
        return {
            "value": accuracy,
            "interval_wilson": list(wilson(accuracy, len(right))),
            "interval_groups": group_interval(right.astype(np.float64), self.groups) if self.grouped else None,
            "right": "".join("01"[answer] for answer in right.tolist()),
        }

    def difference(self, share: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
        """Subtract a share from another on the same videos, with the interval of the difference."""
        values = np.array([int(a) - int(b) for a, b in zip(share["right"], other["right"], strict=True)], np.float64)
        return {"value": float(values.mean()), "interval_groups": group_interval(values, self.groups)}

    def summarise(self, scores: Tensor) -> dict[str, Any]:
        """Compute all figures of scores [V, K]."""
        truth = torch.from_numpy(self.truth)[:, None]
        best = scores.cpu().topk(min(5, scores.shape[1]), dim=1).indices  # [V, 5]
        right, among = (best[:, 0] == truth[:, 0]).numpy(), (best == truth).any(dim=1).numpy()
        per_class = {self.classes[c]: float(right[self.truth == c].mean()) for c in np.unique(self.truth).tolist()}
        whole = right[~self.short]
        return {
            "accuracy": self.share(right),
            "top5": float(among.mean()),
            "mean_of_classes": float(np.mean(list(per_class.values()))),
            "videos": len(right),
            "without_short": {"accuracy": float(whole.mean()) if len(whole) else None, "videos": len(whole)},
            "chance": 1 / len(self.classes),
            "per_class": per_class,
        }
