"""Embed stored videos: each is decoded and embedded once, however many episodes it serves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from fsar.evaluation.cache_keys import model_sha256, view_facts
from fsar.evaluation.logits import EpisodeVideos, tensors_of
from fsar.evaluation.store import FORMAT, Group, Values
from fsar.loader import EpisodeLoader
from fsar.methods import Embedding, FewShotMethod
from fsar.run import ranks
from fsar.run.device import autocast, keep_freed_memory
from fsar.trunks import Stream
from pipelines.augment.clips import render
from pipelines.augment.motion import motion_maps
from pipelines.draw import PhiloxDraw
from pipelines.episodes.clip_views import ClipList, ClipPlanner, Clips
from pipelines.episodes.rules import EpisodeRules
from pipelines.episodes.views import draw_views, number_views, rows_of
from pipelines.loader import Executor
from shards_spec import ShardSet
from shards_spec.errors import ConfigError, FsarError
from shards_spec.files import read_json

Ints = NDArray[np.int64]
Three = tuple[float, float, float]
ReadViews = Callable[[Ints], Clips]  # numbers of views -> how they are made
Make = Callable[[Ints], Iterable[Embedding]]  # numbers of views -> their embeddings in order, some at a time

BATCH = 8  # videos that go through the model together
PART = 128 << 20  # bytes of a stored part: what a killed run may lose
TOGETHER = 512  # embeddings that are read at a time
NAMES = {field.name for field in fields(Embedding)}
FORMATS = (FORMAT, "fsar-embeddings 1")  # the second one's groups have other keys, and are left as they are


class EmbeddingStore:
    """A folder of embeddings, one group for each model and way of looking at videos.

    Raises:
        ConfigError: the path is a file or a folder of other things.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        other = path.is_dir() and any(path.iterdir()) and _format_of(path) not in FORMATS
        if other or path.is_file():
            raise ConfigError(f"{path} is no store of embeddings: name a new folder, or one that fsar-eval made")

    def fetch(self, facts: Mapping[str, Any], numbers: Ints, make: Make, *, device: torch.device) -> Embedding:
        """Read the embedding [n, ...] of views; those that are missing are made and stored.

        All processes of a run get the embedding, and the first one stores.

        Args:
            facts: All that the embeddings depend on besides the numbers.
            numbers: [n] of the views, rising.
            make: Makes embeddings.
            device: Where the embedding is wanted.

        Raises:
            FsarError: a stored part is damaged, or another process is adding to the same group.
            DiskError: the disk is full; what was stored before stays.
        """
        group, gathered = Group(self.path, facts), _Gathered(numbers, device)
        found = group.find(numbers)
        if found.names and not {"tokens"} <= found.names <= NAMES:
            raise FsarError(f"{group.folder} holds other columns than embeddings; delete it")
        places = np.flatnonzero(found.there)
        for start in range(0, len(places), TOGETHER):
            own = places[start : start + TOGETHER]
            gathered.put(numbers[own], found.read(own))
        missing = found.lacking()
        tqdm.write(f"{self.path}: {len(numbers) - len(missing):,} of {len(numbers):,} embeddings were there")
        if len(missing):
            with group.adding() as part:
                for number, (made, values) in enumerate(_in_parts(missing, make(missing)), part):
                    gathered.put(made, values)  # not read back: another machine may not see the first one's disk
                    if ranks.is_first():
                        group.write(number, made, values)
        return Embedding(**gathered.tensors)


class _Gathered:
    """The tensors [n, ...] of an embedding, filled in as its rows are read or made."""

    def __init__(self, numbers: Ints, device: torch.device) -> None:
        self.numbers, self.device = numbers, device
        self.tensors: dict[str, Tensor] = {}

    def put(self, numbers: Ints, values: Values) -> None:
        """Take the rows of these numbers, all of which are wanted."""
        index = torch.from_numpy(np.searchsorted(self.numbers, numbers)).to(self.device)
        for name, rows in values.items():
            if name not in self.tensors:
                shape = (len(self.numbers), *rows.shape[1:])
                self.tensors[name] = torch.empty(shape, dtype=rows.dtype, device=self.device)
            self.tensors[name][index] = rows.to(self.device)


def _format_of(path: Path) -> str | None:
    """Read which format a zarr group says that it has; None for anything else."""
    try:
        found: str = read_json(path / "zarr.json")["attributes"]["format"]
    except (FsarError, KeyError, TypeError):
        return None
    return found


def _in_parts(numbers: Ints, made: Iterable[Embedding]) -> Iterator[tuple[Ints, Values]]:
    """Join embeddings of numbers, which come in order, to parts of `PART` bytes on the host."""
    first, waiting, size = 0, [], 0
    for embedding in made:
        waiting.append(_columns(embedding))
        size += sum(values.nbytes for values in waiting[-1].values())
        stop = first + sum(len(columns["tokens"]) for columns in waiting)
        if size >= PART or stop == len(numbers):
            yield numbers[first:stop], {name: torch.cat([each[name] for each in waiting]) for name in waiting[0]}
            first, waiting, size = stop, [], 0


def _columns(embedding: Embedding) -> Values:
    """Copy the tensors of an embedding to the host."""
    if type(embedding) is not Embedding:
        raise ConfigError(f"a {type(embedding).__name__} of a method's own cannot be stored: leave --embeddings out")
    return {name: values.cpu().contiguous() for name, values in tensors_of(embedding).items()}


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
        loader: The episodes, whose rules decide frames and views.
        model: The model, on the loader's device.
        rows: [V] catalogue rows, ascending.
        precision: "fp32" or "bf16".
        shuffled: Shuffle the frames of each clip.
        store: Embeddings from one evaluation to the next; missing ones are computed and added.

    Returns:
        [V, ...] at centre frames and crop; or, with views, [V * views, ...] with those of a video
        side by side.
    """
    numbers = number_views(rows, loader.views)
    read = partial(draw_views, loader.stream) if loader.views else centre_reader(loader.shards, rows, loader.rules)

    def make(numbers: Ints) -> Iterator[Embedding]:
        how: dict[str, Any] = {"executor": loader.executor, "precision": precision, "shuffled": shuffled}
        return embed_views(model, numbers, loader.rules, read=read, progress=True, **how)

    if store is None:
        return join(list(make(numbers)))
    facts = view_facts(loader, precision, stream=model.stream) | {"model": model_sha256(model), "shuffled": shuffled}
    return store.fetch(facts, numbers, make, device=loader.device)


def clips_of(loader: EpisodeLoader, clips: Clips, stream: Stream = "frames") -> Tensor:
    """Make clips of frames [v, T, 3, H, W], or of motion [v, T, 2, h, w], on the loader's device."""
    how: dict[str, Any] = {"mean": loader.mean, "std": loader.std, "executor": loader.executor}
    return render_clips(clips, loader.rules, stream=stream, device=loader.device, **how)


def places_in_embedding(loader: EpisodeLoader, episodes: EpisodeVideos, videos: Ints) -> EpisodeVideos:
    """Find the videos of episodes 0, 1, ... in what `embed_rows` makes of `videos` [V]."""
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
    """Embed stored videos at their segments' centres and the centre crop; return [V, ...].

    Args:
        model: It embeds in eval mode, where an embedding does not depend on the episode, and keeps
            its mode.
        shards: The opened shard set.
        rows: [V] catalogue rows.
        rules: Frames, resize and crop.
        executor: It decodes.
        precision: "fp32" or "bf16".
        shuffled: Put each clip's frames in another order.
        progress: Show a bar.
    """
    chosen = np.asarray(rows, dtype=np.int64)
    numbers, read = number_views(chosen, 1), centre_reader(shards, chosen, rules)
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
    """Embed numbered views of videos; yield [v, ...] batch after batch, in order.

    Of several processes each makes every k-th batch, and all get all of them.  Arguments are those
    of `embed_videos`.
    """
    assert model.trunk is not None
    # untrained motion has no parameters, only a buffer
    device, was_training = next(chain(model.parameters(), model.buffers())).device, model.training
    model.eval()
    try:
        starts = range(0, len(numbers), BATCH * ranks.count())
        for start in tqdm(
            starts, desc="embed", unit_scale=BATCH * ranks.count(), unit="video", leave=False, disable=not progress
        ):
            together = [numbers[first : first + BATCH] for first in _firsts(start, len(numbers))]
            # In the last round, processes without a batch repeat the last one: all take part in
            # the exchange.
            batch = together[min(ranks.rank(), len(together) - 1)]
            how = {"mean": model.trunk.mean, "std": model.trunk.std}
            clips = render_clips(read(batch), rules, stream=model.stream, executor=executor, device=device, **how)
            clips = shuffle_clips(clips, rows_of(batch).tolist()) if shuffled else clips
            with autocast(device, precision):
                embedding = model.embed(model.trunk(clips))
            if not start:
                keep_freed_memory(device)  # once a batch has taken its memory
            yield from _of_all(embedding, [len(each) for each in together])
    finally:
        model.train(was_training)


def _firsts(start: int, stop: int) -> range:
    """Return where the next batch of each process begins."""
    return range(start, min(start + BATCH * ranks.count(), stop), BATCH)


def _of_all(embedding: Embedding, sizes: Sequence[int]) -> Iterator[Embedding]:
    """Exchange the embeddings [v, ...] of all processes; the first ones are of these sizes."""
    if ranks.count() == 1:
        yield embedding
        return
    gathered = {name: _padded(values) for name, values in tensors_of(embedding).items()}
    for number, size in enumerate(sizes):
        place = slice(number * BATCH, number * BATCH + size)
        yield type(embedding)(**{name: values[place] for name, values in gathered.items()})


def _padded(values: Tensor) -> Tensor:
    """Gather [v, ...] of each process to [processes * BATCH, ...], each padded with zeros."""
    padded = values.new_zeros(BATCH, *values.shape[1:])
    padded[: len(values)] = values
    return ranks.gather(padded)


def shuffle_clips(clips: Tensor, rows: Sequence[int]) -> Tensor:
    """Put the T frames of each video [V, T, ...] in an order that its catalogue row decides.

    The segments of motion are shuffled likewise. The frames of clips [V, S, clip, 3, H, W] are
    mixed throughout the video.
    """
    frames = clips.flatten(1, -4)  # [V, T, 3, H, W]
    orders = [torch.randperm(frames.shape[1], generator=torch.Generator().manual_seed(row)) for row in rows]
    index = torch.stack(orders).to(clips.device)  # [V, T]
    return frames[torch.arange(len(rows), device=clips.device)[:, None], index].view_as(clips)


def render_clips(
    clips: Clips,
    rules: EpisodeRules,
    *,
    stream: Stream,
    mean: Three,
    std: Three,
    executor: Executor,
    device: torch.device,
) -> Tensor:
    """Decode chosen clips, and make what a stream reads of them.

    Returns:
        Normalised frames [V, T, 3, crop, crop], or clips [V, S, clip, 3, crop, crop] of them; of
        motion displacements [V, T, 2, h, w].
    """
    if stream == "motion":
        fields = [executor.decode(each).to(device) for each in clips.motion_reads]
        return motion_maps(fields, clips.motion, camera=rules.camera, channels=rules.motion_channels).to(device)
    frames = [executor.decode(each).to(device) for each in clips.reads]
    return rules.parted(render(frames, clips.views, mean=mean, std=std, crop=rules.crop, resize=rules.resized))


def centre_reader(shards: ShardSet, rows: Ints, rules: EpisodeRules) -> ReadViews:
    """Make the reader of the centre views of videos `rows` [n]: nothing is drawn."""
    planner = ClipPlanner(shards, replace(rules, random_frames=False, random_crop=False), rows)
    draw = PhiloxDraw(0, 0)  # draws nothing

    def read(numbers: Ints) -> Clips:
        clips = ClipList(rules.motion_series)
        planner.add(clips, rows_of(numbers), draw, draw, query=False)
        return clips.clips()

    return read


def join(parts: Sequence[Embedding]) -> Embedding:
    """Join the embeddings of several sets of videos to one."""
    names = tensors_of(parts[0])
    return type(parts[0])(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})
