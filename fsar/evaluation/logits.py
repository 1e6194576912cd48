"""Compute the logits of episodes of embedded videos: from a table of pairs, or in batches.

Both are faster than one episode after the other, and both give its logits up to rounding:

* Some methods compare videos two by two, and the logit of a class is the mean over its shots.  A
  test split has few videos, and its episodes compare the same pairs again and again.
  `Matching.table` matches each pair once, and an episode then reads its pairs from the table.
* Other methods look at an episode as a whole.  `torch.func.vmap` then matches a batch of episodes
  in one call, which spares a GPU its many small kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import singledispatch

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fsar.methods import Embedding, FewShotMethod
from fsar.methods.clip_fsar import CLIPFSAR
from fsar.methods.ctx import CTX
from fsar.methods.hyrsm import HyRSM
from fsar.methods.molo import MoLo
from fsar.methods.otam import OTAM
from fsar.methods.prototype import Prototype
from fsar.methods.trx import TRX
from fsar.run import ranks
from fsar.run.device import autocast
from pipelines.episodes.stream import Chosen
from pipelines.episodes.views import choose_views

Ints = NDArray[np.int64]

# Bytes of embeddings of a batch: they fit into a CPU's cache, and keep a GPU busy.
BATCH_BYTES = {"cpu": 24 << 20, "cuda": 512 << 20}
# Queries and support videos of a block of the table: few, since a pair may take many numbers
BLOCK = (128, 16)
TABLE_VIDEOS = 8192  # most rows and columns of the table
TABLE_EPISODES = 256  # episodes that are read from it at a time
# One episode fills the cores, and batched attention has no fused kernel.
ALONE_ON_CPU: tuple[type[FewShotMethod], ...] = (HyRSM,)


@dataclass(frozen=True)
class EpisodeVideos:
    """The videos of N episodes of one shape, as catalogue rows or as places in an embedding.

    Columns, not one object an episode: 10,000 episodes are then a few array operations.

    Attributes:
        classes: [N, way] places in the data set's class table.
        support: [N, way, shot].
        query: [N, Q].
        labels: [N, Q] episode labels of the queries.
        unlabelled: [N, U].
    """

    classes: Ints
    support: Ints
    query: Ints
    labels: Ints
    unlabelled: Ints

    @classmethod
    def of(cls, chosen: Sequence[Chosen], *, unlabelled: bool = False) -> EpisodeVideos:
        """Collect episodes of one shape in columns; unlabelled videos only if asked for."""
        count, way = len(chosen), len(chosen[0].classes)
        query = np.array([one.query for one in chosen], np.int64)  # [N, Q, 2]
        return cls(
            classes=np.array([one.classes for one in chosen], np.int64),
            support=np.array([one.support for one in chosen], np.int64).reshape(count, way, -1),
            query=query[..., 0],
            labels=query[..., 1],
            unlabelled=np.array([one.unlabelled if unlabelled else () for one in chosen], np.int64).reshape(count, -1),
        )

    def __len__(self) -> int:
        return len(self.classes)

    def videos(self) -> Ints:
        """List all videos [V] once, ascending."""
        return np.unique(np.concatenate([part.ravel() for part in (self.support, self.query, self.unlabelled)]))

    def within(self, videos: Ints) -> EpisodeVideos:
        """Replace each row by its place in `videos` [V], which ascend."""
        places = (np.searchsorted(videos, part) for part in (self.support, self.query, self.unlabelled))
        support, query, unlabelled = places
        return EpisodeVideos(self.classes, support, query, self.labels, unlabelled)

    def in_views(self, views: int, *, seed: int, flips: bool) -> EpisodeVideos:
        """Replace each place of a video by that of the view that episode 0, 1, ... takes of it.

        The views of a video lie side by side: view v of the video at place p is at p * views + v.
        """
        of_videos = (self.support.reshape(len(self), -1), self.query, self.unlabelled)
        counts = tuple(part.shape[1] for part in of_videos)
        chosen = [choose_views(n, counts, views, seed=seed, flips=flips) for n in range(len(self))]
        support, query, unlabelled = (
            part * views + np.stack(own) for part, own in zip(of_videos, zip(*chosen, strict=True), strict=True)
        )
        return replace(self, support=support.reshape(self.support.shape), query=query, unlabelled=unlabelled)

    def part(self, start: int, stop: int) -> EpisodeVideos:
        """Take episodes start to stop."""
        return EpisodeVideos(*(getattr(self, column.name)[start:stop] for column in fields(self)))


def episode_logits(
    model: FewShotMethod,
    embedding: Embedding,
    episodes: EpisodeVideos,
    *,
    own: range | None = None,
    texts: Callable[[Tensor], Tensor | None] | None = None,
    precision: str = "fp32",
) -> Iterator[Tensor]:
    """Compute logits [B, Q, way], batch after batch: those of `match`, up to rounding.

    Args:
        model: In eval mode; `by_pairs` tells whether a table of all pairs of videos will do.
        embedding: [V, ...] of all videos.
        episodes: Places in it.
        own: Consecutive numbers of the episodes whose logits are wanted, this process's part; None:
            all.
        texts: Class numbers [n] -> their text vectors [n, C]; called where the method reads class
            texts.
        precision: fp32 or bf16 (autocast).
    """
    match = Matching(model, embedding, texts if "class_text" in model.reads else None, precision)
    own = range(len(episodes)) if own is None else own
    if table_pays(model, episodes):
        return match.from_table(episodes, own)
    return match.in_batches(episodes.part(own.start, own.stop)) if own else iter(())


def table_pays(model: FewShotMethod, episodes: EpisodeVideos) -> bool:
    """Tell whether a table of pairs is right for a model, and less work than the episodes."""
    queries, support = (len(np.unique(part)) for part in (episodes.query, episodes.support))
    compared = episodes.query.size * episodes.support[0].size
    fits = max(queries, support) <= TABLE_VIDEOS and queries * support <= compared
    return fits and not episodes.unlabelled.size and by_pairs(model, episodes.support.shape[2])


@singledispatch
def by_pairs(model: FewShotMethod, shot: int) -> bool:  # noqa: ARG001 -- methods of others: False
    """Tell whether a logit is a mean over the videos of a class, each taken as a class by itself.

    Evaluation then matches each pair of videos once.  A method of one's own joins by
    `@by_pairs.register(ItsClass)`.
    """
    return False


@by_pairs.register(MoLo)
@by_pairs.register(TRX)
@by_pairs.register(CTX)
def _of_one_shot(model: FewShotMethod, shot: int) -> bool:
    """Tell it of methods whose logit depends on all shots together."""
    del model
    return shot == 1


@by_pairs.register(OTAM)
@by_pairs.register(Prototype)
def _of_merged(model: OTAM | Prototype, shot: int) -> bool:
    """Tell it of methods that compare a query with each video of a class, or with their mean."""
    return shot == 1 or model.support_merge == "video"


@by_pairs.register(CLIPFSAR)
def _of_clip_fsar(model: CLIPFSAR, shot: int) -> bool:
    """Tell it of CLIP-FSAR: its probabilities of texts depend on all classes together."""
    return shot == 1 and model.inference == "visual"


@dataclass(frozen=True)
class Matching:
    """A model and the embedding [V, ...] of all videos.

    Attributes:
        model: In eval mode.
        embedding: Of all videos.
        texts: Class numbers -> text vectors; None where the method reads none.
        precision: fp32 or bf16 (autocast).
    """

    model: FewShotMethod
    embedding: Embedding
    texts: Callable[[Tensor], Tensor | None] | None
    precision: str
    _room: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Device of the embedding."""
        return self.embedding.tokens.device

    def in_batches(self, episodes: EpisodeVideos) -> Iterator[Tensor]:
        """Compute logits [B, Q, way] in batches; one by one where a method cannot be batched."""
        step = self._step(episodes)
        first = self._try_batch(episodes.part(0, step)) if step > 1 else None
        if first is None:
            start = 0
            step = 1
        else:
            start = step
            yield first
        for begin in range(start, len(episodes), step):
            yield self.match_batch(episodes.part(begin, begin + step))

    def _step(self, episodes: EpisodeVideos) -> int:
        """Choose the number of episodes of a batch."""
        if self.device.type == "cpu" and isinstance(self.model, ALONE_ON_CPU):
            return 1
        of_video = sum(tensor[0].nbytes for tensor in tensors_of(self.embedding).values())
        videos: int = sum(part[0].size for part in (episodes.support, episodes.query, episodes.unlabelled))
        most = BATCH_BYTES.get(self.device.type, BATCH_BYTES["cpu"])
        return max(1, min(len(episodes), most // (of_video * videos)))

    def _try_batch(self, episodes: EpisodeVideos) -> Tensor | None:
        """Match a first batch; None if `vmap` cannot, as where shapes depend on values."""
        try:
            return self.match_batch(episodes)
        except RuntimeError:  # vmap says so by an error of this general type
            return None

    @torch.no_grad()
    def match_batch(self, episodes: EpisodeVideos) -> Tensor:
        """Match B episodes in one call; return logits [B, Q, way]."""
        parts = {
            "support": self._pick(episodes.support, "support"),
            "query": self._pick(episodes.query, "query"),
            "unlabelled": self._pick(episodes.unlabelled, "unlabelled") if episodes.unlabelled.size else {},
        }
        text = self._texts(episodes.classes)
        if text is not None:
            parts["class_text"] = {"text": text}
        with autocast(self.device, self.precision):
            if len(episodes) == 1:
                return self._match({name: {k: x[0] for k, x in part.items()} for name, part in parts.items()})[None]
            with sdpa_kernel(SDPBackend.MATH):  # vmap has no rule for the fused kernels of attention
                logits: Tensor = torch.func.vmap(self._match)(parts)
                return logits

    def _match(self, parts: dict[str, dict[str, Tensor]]) -> Tensor:
        """Match one episode; return logits [Q, way]."""
        return self.model.match(
            Embedding(**parts["support"]),
            Embedding(**parts["query"]),
            class_text=parts["class_text"]["text"] if "class_text" in parts else None,
            unlabelled=Embedding(**parts["unlabelled"]) if parts["unlabelled"] else None,
        )

    def from_table(self, episodes: EpisodeVideos, wanted: range | None = None) -> Iterator[Tensor]:
        """Read the logits [B, Q, way] of the `wanted` episodes from the table: means over shots.

        Every process makes its part of the table of all episodes, also of those that it does not
        read.
        """
        rows, query = np.unique(episodes.query, return_inverse=True)
        # A support video has one class in all episodes, so its first place tells it.
        columns, first, support = np.unique(episodes.support, return_index=True, return_inverse=True)
        shot = episodes.support.shape[2]
        table = self.table(rows, columns, episodes.classes.ravel()[first // shot])
        query, support = query.reshape(episodes.query.shape), support.reshape(episodes.support.shape)
        wanted = range(len(episodes)) if wanted is None else wanted
        for start in wanted[::TABLE_EPISODES]:
            stop = min(start + TABLE_EPISODES, wanted.stop)
            own, other = (torch.from_numpy(part[start:stop]).to(self.device) for part in (query, support))
            yield table[own[:, :, None, None], other[:, None]].mean(dim=-1)

    @torch.no_grad()
    def table(self, rows: Ints, columns: Ints, classes: Ints) -> Tensor:
        """Match all pairs [rows, columns]: each support video stands for a class of one shot.

        Of several processes each makes every k-th block of rows.
        """
        table = torch.zeros(len(rows), len(columns), device=self.device)
        for column in range(0, len(columns), BLOCK[1]):
            part = slice(column, column + BLOCK[1])
            support = Embedding(**{name: x[:, None] for name, x in self._pick(columns[part], "support").items()})
            text = self._texts(classes[part])
            with autocast(self.device, self.precision):
                for row in range(BLOCK[0] * ranks.rank(), len(rows), BLOCK[0] * ranks.count()):
                    queries = Embedding(**self._pick(rows[row : row + BLOCK[0]], "query"))
                    table[row : row + BLOCK[0], part] = self.model.match(support, queries, class_text=text)
        ranks.add_up([table])
        return table

    def _pick(self, places: Ints, role: str) -> dict[str, Tensor]:
        """Gather the embedding's tensors [..., ...] of the videos at places [...].

        They hold until the next ones of that role are picked, which are written to the same memory.
        Fresh memory for every batch costs more than the matching: the system must clear its pages
        first.
        """
        index = torch.from_numpy(places.ravel()).to(self.device)
        picked = {}
        for name, tensor in tensors_of(self.embedding).items():
            room = self._room.get((role, name))
            if room is None or len(room) < len(index):
                room = self._room[role, name] = tensor.new_empty(len(index), *tensor.shape[1:])
            picked[name] = torch.index_select(tensor, 0, index, out=room[: len(index)])
            picked[name] = picked[name].view(*places.shape, *tensor.shape[1:])
        return picked

    def _texts(self, classes: Ints) -> Tensor | None:
        """Look up the text vectors [..., C] of classes [...]."""
        return None if self.texts is None else self.texts(torch.from_numpy(classes))


def decide(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the class that is said of each query [...]; a tie, or NaN, counts as wrong.

    The true class is said only if its logit is above all others. Otherwise the best of the others
    is.

    Args:
        logits: [..., way].
        labels: [...] the true classes.
    """
    truth = labels[..., None]
    others = logits.scatter(-1, truth, -torch.inf)
    best, said = others.nan_to_num(nan=torch.inf).max(dim=-1)
    return torch.where(logits.gather(-1, truth)[..., 0] > best, labels, said)


def tensors_of(embedding: Embedding) -> dict[str, Tensor]:
    """Return the tensors that an embedding has, by name."""
    values = {part.name: getattr(embedding, part.name) for part in fields(embedding)}
    return {name: value for name, value in values.items() if value is not None}
