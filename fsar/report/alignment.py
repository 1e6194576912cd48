"""The pairs of steps that a method matches, and the motion that it reconstructs, for a report.

A method of one's own joins by `@align.register(ItsClass)`.
"""

from __future__ import annotations

from functools import singledispatch

from einops import rearrange
from torch import Tensor

from fsar.episode import Episode
from fsar.matching import Alignment, class_means, cosine_distance, matched, token_cosine
from fsar.methods import Embedding, FewShotMethod
from fsar.methods.clip_fsar import CLIPFSAR
from fsar.methods.ctx import CTX, attention
from fsar.methods.hyrsm import HyRSM
from fsar.methods.molo import MoLo, both
from fsar.methods.otam import OTAM
from fsar.methods.reconstruction import Reconstruction
from fsar.trunks import Features


@singledispatch
def align(
    model: FewShotMethod,  # noqa: ARG001  # of methods that align anything
    query: Embedding,  # noqa: ARG001
    support: Embedding,  # noqa: ARG001
    *,
    class_text: Tensor | None = None,  # noqa: ARG001
) -> dict[str, Alignment]:
    """Find the steps of queries and support that a method matches, by name ("frames", "motion").

    Args:
        model: A method in eval mode.
        query: [Q, ...].
        support: [way, shot, ...].
        class_text: [way, w], for a method that reads class texts.

    Returns:
        Empty for a method that does not match steps of videos.
    """
    return {}


@align.register(MoLo)
def _of_molo(model: MoLo, query: Embedding, support: Embedding, **_: Tensor | None) -> dict[str, Alignment]:
    """Align queries with class means, in both branches."""
    pairs = zip(both(query), both(support.map(class_means)), strict=True)
    found = (
        matched(
            1 - token_cosine(*tokens),
            metric=model.metric,
            single_direction=model.single_direction,
            smoothing=model.smoothing,
        )
        for tokens in pairs
    )
    return dict(zip(("frames", "motion"), found, strict=True))


@align.register(HyRSM)
def _of_hyrsm(model: HyRSM, query: Embedding, support: Embedding, **_: Tensor | None) -> dict[str, Alignment]:
    """Align queries with members, each pair related within the whole episode."""
    members, queries = model.fuse(model.members(support.tokens, None), query.tokens)
    return {"frames": matched(cosine_distance(queries[:, None], members))}


@align.register(OTAM)
def _of_otam(model: OTAM, query: Embedding, support: Embedding, **_: Tensor | None) -> dict[str, Alignment]:
    """Weigh the paths through frames of queries and of support videos, or of class means."""
    videos = support.tokens if model.support_merge == "video" else class_means(support.tokens)[:, None]
    distances = model.distances(query, videos)
    return {"frames": _paths(distances, model)}


@align.register(CTX)
def _of_ctx(_model: CTX, query: Embedding, support: Embedding, **_: Tensor | None) -> dict[str, Alignment]:
    """Take the shares of attention that a query's frames give to the frames of a class."""
    keys, asked = (each.tokens.chunk(2, dim=-1)[0] for each in (support, query))
    shares = rearrange(attention(asked, keys), "q w n (s m) -> q (w s) n m", s=keys.shape[1])
    return {"frames": Alignment(token_cosine(asked, keys.flatten(0, 1)), shares, None)}


@align.register(CLIPFSAR)
def _of_clip_fsar(
    model: CLIPFSAR, query: Embedding, support: Embedding, *, class_text: Tensor | None = None
) -> dict[str, Alignment]:
    """Weigh the paths through frames of queries and prototypes; empty where only texts decide."""
    if model.inference == "text":
        return {}
    (frames, _), (_, in_context) = (each.tokens.chunk(2, dim=-2) for each in (support, query))
    text = None if class_text is None else model.checked_text(class_text)
    prototypes = model.modulate(frames, None, text)
    return {"frames": _paths(1 - token_cosine(in_context, prototypes), model)}


def _paths(distances: Tensor, model: OTAM | CLIPFSAR) -> Alignment:
    """Weigh OTAM's paths through distances [Q, S, n, m]."""
    return matched(distances, metric="otam", single_direction=model.single_direction, smoothing=model.smoothing)


def reconstruct(model: FewShotMethod, features: Features, episode: Episode) -> Reconstruction | None:
    """Decode the motion of an episode's queries from their features.

    None without a trained decoder, or where the episode lacks what it is compared with.
    """
    return model.reconstruct(features, episode) if isinstance(model, MoLo) else None
