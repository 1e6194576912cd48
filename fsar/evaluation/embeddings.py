"""Stored videos -> their embeddings: each decoded and embedded once, whatever number of episodes it serves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from fsar.evaluation.keys import model_sha256, view_facts
from fsar.evaluation.logits import EpisodeVideos
from fsar.evaluation.store import EmbeddingStore
from fsar.loader import EpisodeLoader
from fsar.methods import Embedding, FewShotMethod
from fsar.run import ranks
from fsar.run.device import autocast, keep_freed_memory
from pipelines.augment.clips import render
from pipelines.draw import PhiloxDraw
from pipelines.episodes.rules import EpisodeRules
from pipelines.episodes.stream import View
from pipelines.episodes.views import draw_views, number_views, rows_of
from pipelines.loader import Executor
from pipelines.reads import Reads
from shards_spec import ShardSet

Ints = NDArray[np.int64]
Three = tuple[float, float, float]
ReadViews = Callable[[Ints], tuple[Sequence[Reads], Sequence[View]]]  # numbers of views -> what makes them

BATCH = 8  # videos that go through the model together


def embed_rows(
    loader: EpisodeLoader,
    model: FewShotMethod,
    rows: Ints,
    *,
    precision: str = "fp32",
    shuffled: bool = False,
    store: EmbeddingStore | None = None,
) -> Embedding:
    """Embed videos as the episodes of a loader show them.

    Args:
        loader: The episodes; it says which frames and views are taken.
        model: The model, on the loader's device.
        rows: [V] catalogue rows, ascending.
        precision: "fp32" or "bf16".
        shuffled: Shuffle the frames of each clip.
        store: Holds embeddings from one evaluation to the next; what it lacks is computed and added.

    Returns:
        [V, ...], or [V * views, ...] with the views of a video side by side; without views, centre frames and crop.
    """
    numbers = number_views(rows, loader.views)
    read = partial(draw_views, loader.stream) if loader.views else _centre_reader(loader)

    def make(numbers: Ints) -> Iterator[Embedding]:
        how: dict[str, Any] = {"executor": loader.executor, "precision": precision, "shuffled": shuffled}
        return embed_views(model, numbers, loader.rules, read=read, progress=True, **how)

    if store is None:
        return join(list(make(numbers)))
    facts = view_facts(loader, precision) | {"model": model_sha256(model), "shuffled": shuffled}
    return store.fetch(facts, numbers, make, device=loader.device)


def _centre_reader(loader: EpisodeLoader) -> ReadViews:
    return partial(centre_views, loader.shards, rules=loader.rules)


def clips_of(loader: EpisodeLoader, chosen: tuple[Sequence[Reads], Sequence[View]]) -> Tensor:
    """Render clips [v, T, 3, H, W] of views on the loader's device, whatever the episode."""
    how: dict[str, Any] = {"mean": loader.mean, "std": loader.std, "executor": loader.executor}
    return render_views(chosen, loader.rules, device=loader.device, **how)


def places_in_embedding(loader: EpisodeLoader, episodes: EpisodeVideos, videos: Ints) -> EpisodeVideos:
    """Find the videos of episodes 0, 1, ... in what `embed_rows` makes of `videos` [V] (ascending rows)."""
    found = episodes.within(videos)
    if not loader.views:
        return found
    return found.in_views(loader.views, seed=loader.stream.seed, flips=loader.rules.query_flip)


def embed_videos(
    model: FewShotMethod,
    shards: ShardSet,
    rows: Sequence[int],
    rules: EpisodeRules,
    *,
    executor: Executor,
    precision: str = "fp32",
    shuffled: bool = False,
    progress: bool = False,
) -> Embedding:
    """Embedding [V, ...] of stored videos at their segments' centres and the centre crop, the model in eval mode.

    `shuffled` puts each clip's frames in another order.  In eval mode a video's embedding does not depend on the
    episode; the model is left in the mode it had.
    """
    numbers = number_views(np.asarray(rows, dtype=np.int64), 1)
    read = partial(centre_views, shards, rules=rules)
    options: dict[str, Any] = {"executor": executor, "precision": precision, "shuffled": shuffled, "progress": progress}
    return join(list(embed_views(model, numbers, rules, read=read, **options)))


@torch.no_grad()
def embed_views(
    model: FewShotMethod,
    numbers: Ints,
    rules: EpisodeRules,
    *,
    read: ReadViews,
    executor: Executor,
    precision: str = "fp32",
    shuffled: bool = False,
    progress: bool = False,
) -> Iterator[Embedding]:
    """Embeddings [v, ...] of numbered views of videos, some at a time and in order; otherwise as `embed_videos`.

    Of several processes each makes every k-th batch, and all get all of them.
    """
    assert model.trunk is not None
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    try:
        starts = range(0, len(numbers), BATCH * ranks.count())
        for start in tqdm(
            starts, desc="embed", unit_scale=BATCH * ranks.count(), unit="video", leave=False, disable=not progress
        ):
            together = [numbers[first : first + BATCH] for first in _firsts(start, len(numbers))]
            batch = together[min(ranks.rank(), len(together) - 1)]  # at the end some do what is done already
            how = {"mean": model.trunk.mean, "std": model.trunk.std}
            clips = render_views(read(batch), rules, executor=executor, device=device, **how)
            clips = shuffle_clips(clips, rows_of(batch).tolist()) if shuffled else clips
            with autocast(device, precision):
                embedding = model.embed(model.trunk(clips))
            if not start:
                keep_freed_memory(device)  # now that a batch's memory has been had
            yield from _of_all(embedding, [len(each) for each in together])
    finally:
        model.train(was_training)


def _firsts(start: int, stop: int) -> range:
    """Where the next batch of each process begins."""
    return range(start, min(start + BATCH * ranks.count(), stop), BATCH)


def _of_all(embedding: Embedding, sizes: Sequence[int]) -> Iterator[Embedding]:
    """This process's embedding [v, ...] -> those of all processes, of which the first ones have these sizes."""
    if ranks.count() == 1:
        yield embedding
        return
    values = {field.name: getattr(embedding, field.name) for field in fields(embedding)}
    gathered = {name: None if value is None else _padded(value) for name, value in values.items()}
    for number, size in enumerate(sizes):
        place = slice(number * BATCH, number * BATCH + size)
        own: dict[str, Any] = {name: None if value is None else value[place] for name, value in gathered.items()}
        yield type(embedding)(**own)


def _padded(values: Tensor) -> Tensor:
    """[v, ...] of this process -> [processes * BATCH, ...] of all, each with zeros behind its own."""
    padded = values.new_zeros(BATCH, *values.shape[1:])
    padded[: len(values)] = values
    return ranks.gather(padded)


def shuffle_clips(clips: Tensor, rows: Sequence[int]) -> Tensor:
    """[V, T, 3, H, W] with the T frames of each video in an order that its catalogue row decides.

    The frames of clips [V, S, clip, 3, H, W] are mixed throughout the video.
    """
    frames = clips.flatten(1, -4)  # [V, T, 3, H, W]
    orders = [torch.randperm(frames.shape[1], generator=torch.Generator().manual_seed(row)) for row in rows]
    index = torch.stack(orders).to(clips.device)  # [V, T]
    return frames[torch.arange(len(rows), device=clips.device)[:, None], index].view_as(clips)


def render_views(
    chosen: tuple[Sequence[Reads], Sequence[View]],
    rules: EpisodeRules,
    *,
    mean: Three,
    std: Three,
    executor: Executor,
    device: torch.device,
) -> Tensor:
    """Frames [V, T, 3, crop, crop], or clips [V, S, clip, ...] of them, of what is to be read and seen; normalised."""
    reads, views = chosen
    frames = [executor.decode(each).to(device) for each in reads]
    return rules.parted(render(frames, views, mean=mean, std=std, crop=rules.crop, resize=rules.resized))


def centre_views(shards: ShardSet, numbers: Ints, *, rules: EpisodeRules) -> tuple[list[Reads], list[View]]:
    """The centre view of each video of these numbers."""
    pairs = [centre_view(shards, row, place, rules) for place, row in enumerate(rows_of(numbers).tolist())]
    return [reads for reads, _ in pairs], [view for _, view in pairs]


def centre_view(shards: ShardSet, row: int, number: int, rules: EpisodeRules) -> tuple[Reads, View]:
    """What to read of a video, and the clip at the centres of its segments and of its frames, from reads `number`."""
    chosen = rules.chooser()(
        PhiloxDraw(0, 0),  # draws nothing
        int(shards.frames[row]),
        steps=rules.frames,
        random_frames=False,
        fps=float(shards.fps[row]),
    )
    frames, places = np.unique(np.array(chosen, dtype=np.int64), return_inverse=True)
    height, width = shards.series("rgb").sizes[row].tolist()
    top, left = ((side - rules.crop) // 2 for side in rules.resized)
    whole = (height, width) != rules.resized  # to be resized first
    tops, lefts = (np.full(len(frames), 0 if whole else edge) for edge in (top, left))
    size = (height, width) if whole else (rules.crop, rules.crop)
    reads = Reads("rgb", np.full(len(frames), row), frames, tops, lefts, size)
    return reads, View(number, tuple(places.tolist()), flip=False, box=(top, left) if whole else None, jitter=None)


def join(parts: Sequence[Embedding]) -> Embedding:
    """Embeddings of several sets of videos as one."""
    columns = {field.name: [getattr(part, field.name) for part in parts] for field in fields(parts[0])}
    joined: dict[str, Any] = {
        name: None if values[0] is None else torch.cat(values) for name, values in columns.items()
    }
    return type(parts[0])(**joined)
