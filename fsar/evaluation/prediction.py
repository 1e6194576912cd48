"""Tell the classes of plain video files, from a trained model and a few example videos a class.

    model, viewing = open_run(Path("run"))
    support = read_support(model, find_examples(Path("examples")), viewing)
    for answer in predict(model, support, [Path("new.mp4")], viewing):
        print(answer.path, answer.scores)

In a script this belongs under `if __name__ == "__main__":`, since other processes decode the
videos, and they import the script.  Videos go through the preprocessing of training into shards in
a temporary folder.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fsar.evaluation.embeddings import embed_videos, join
from fsar.evaluation.fusion import SUPPORT, of_support
from fsar.methods import Embedding, FewShotMethod, Model, TwoStreams, streams_of
from fsar.methods.class_text import ClassText
from fsar.run.build import class_text_of, evaluation_rules, open_model
from fsar.run.config import build_config, run_config
from fsar.run.device import autocast, choose_device
from fsar.run.weights import weights_of_run
from fsar.trunks import Stream
from pipelines.episodes.rules import EpisodeRules
from pipelines.loader import Executor, executor_for
from preprocess.datasets.catalogue import Catalogue, Video, walk
from preprocess.datasets.folder import folder_catalogue
from preprocess.decode import Geometry
from preprocess.stage import Settings, preprocess
from shards_spec import Dataset, ShardError, ShardSet
from shards_spec.errors import ConfigError, FsarError
from shards_spec.files import read_json
from shards_spec.schema import Failure
from shards_spec.splits.lists import VIDEO_EXTENSIONS

VIDEOS_AT_ONCE = 256  # whose frames lie in the temporary folder together


@dataclass(frozen=True)
class Viewing:
    """Steps by which a video file becomes a clip as the model was trained on.

    Attributes:
        geometry: Size of the stored frames.
        rules: Frames, frame rule, resize and crop of a clip, always the centre; its other values
            are not read.
        precision: fp32 or bf16.
        executor: "auto" and "dali" decode frames on a GPU, where DALI is installed.
        workers: Processes that decode videos.
        time_limit: Seconds that one video may take.
        class_text: The texts of classes; None where the model reads none.
    """

    geometry: Geometry
    rules: EpisodeRules
    precision: str = "fp32"
    executor: str = "auto"
    workers: int = 1
    time_limit: float = 300.0
    class_text: ClassText | None = None


@dataclass(frozen=True)
class Support:
    """The embedded examples of each class.

    Attributes:
        classes: Their names.
        embedding: [way, shot, ...] of each stream, zeros where a class has fewer examples than
            another.
        mask: [way, shot] bool on the host, False at those zeros; None where all classes have
            equally many.
        errors: Examples that could not be read, and their errors.
        class_text: [way, w] text vectors of the classes; None where the model reads none.
    """

    classes: tuple[str, ...]
    embedding: Mapping[Stream, Embedding]
    mask: Tensor | None
    errors: dict[Path, str]
    class_text: Tensor | None = None


@dataclass(frozen=True)
class Prediction:
    """A model's answer to one video.

    Attributes:
        path: The video, as it was given.
        frames: Number of its decoded frames; 0 where it could not be read.
        scores: Class -> softmax of its logit, best first; it ranks, but is no calibrated
            probability.
        error: Why the video could not be read; None where it was.
    """

    path: Path
    frames: int
    scores: dict[str, float]
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return all of it; of a video that could not be read, path and error."""
        if self.error is not None:
            return {"path": str(self.path), "error": self.error}
        classes = [{"class": name, "score": score} for name, score in self.scores.items()]
        return {"path": str(self.path), "frames": self.frames, "classes": classes}


@dataclass(frozen=True)
class _Embedded:
    """Embedded video files: the place of each in the embedding, or the reason that it has none."""

    embedding: Mapping[Stream, Embedding]  # [V, ...] of each stream; empty where no video could be read
    places: dict[Path, int]
    frames: dict[Path, int]
    errors: dict[Path, str]


def open_run(
    run: Path, *, checkpoint: str | None = None, workers: int = 1, time_limit: float = 300.0, **changes: str
) -> tuple[Model, Viewing]:
    """Load the trained model of a run folder, and its way of viewing videos.

    Args:
        run: A folder of `fsar-train`.
        checkpoint: best or last; by default the best where there is one.
        workers: Processes that decode videos.
        time_limit: Seconds that one video may take.
        changes: `device`, `precision` or `class_text`, in place of the run's own.

    Raises:
        ConfigError: no run folder, no such checkpoint or device, or a checkpoint that does not fit.
    """
    config = build_config(run_config(run).flat() | changes)
    device = choose_device(config.device)
    model = open_model(config, weights_of_run(run, checkpoint)).to(device)
    if isinstance(model, TwoStreams) and model.rule == "train" and model.fusion.frames is None:
        raise ConfigError(f"{run} has not come to its end, which chooses how its streams are mixed: add --resume to it")
    rules = replace(evaluation_rules(config), random_frames=False)
    how = (config.precision, config.executor, workers, time_limit, class_text_of(config))
    return model.eval(), Viewing(read_geometry(run), rules, *how)


def read_geometry(run: Path) -> Geometry:
    """Read the size of the stored frames of a run's training; by default, what it resizes to.

    Raises:
        ConfigError: no run folder, or its data.json is damaged.
    """
    path = run / "data.json"
    data = read_json(path) if path.is_file() else {}
    if not isinstance(data, dict) or "geometry" not in data:
        height, width = evaluation_rules(run_config(run)).resized
        return Geometry(height=height, width=width)
    sizes = data["geometry"]
    known = isinstance(sizes, dict) and set(sizes) in ({"height", "width"}, {"short"})
    if not known or any(type(size) is not int or size < 1 for size in sizes.values()):
        raise ConfigError(
            f'{path} is damaged: its geometry is {str(sizes)[:80]!r}, not {{"height": H, "width": W}} or {{"short": S}}'
        )
    return Geometry(**sizes)


def find_examples(folder: Path, *, most: int | None = None) -> dict[str, list[Path]]:
    """List the videos of a CLASS/video tree by class and name; at most the first `most` of each.

    Raises:
        FsarError: no such folder, videos outside class folders, or a class folder without a video.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder; give one that holds a folder of example videos for each class")
    examples: dict[str, list[Path]] = {}
    filled: set[str] = set()
    for video in folder_catalogue(folder, links=True).videos:
        examples.setdefault(video.label, []).append(video.path)
        filled.add(video.path.relative_to(folder).parts[0])
    for place in sorted(folder.iterdir()):
        if place.is_dir() and place.name not in filled and place.name[0] != ".":
            raise ConfigError(f"{place} holds no video; put an example there, or remove the folder")
    return {label: paths[:most] for label, paths in examples.items()}


def find_videos(paths: Iterable[Path]) -> list[Path]:
    """List files as they are, and for each folder all videos below it, in order of their names.

    Raises:
        ConfigError: a folder without a video.
    """
    found: list[Path] = []
    for path in paths:
        # A folder that is named like a video is no place to look for videos, as in preprocessing.
        if not os.path.isdir(path) or path.suffix.lower() in VIDEO_EXTENSIONS:  # noqa: PTH112 -- raises for no name at all
            found.append(path)
            continue
        below = sorted(walk(path, links=True))
        if not below:
            raise ConfigError(
                f"{path} holds no video ({', '.join(sorted(VIDEO_EXTENSIONS))}); name a video or its folder"
            )
        found += below
    return found


def read_support(model: Model, examples: Mapping[str, Sequence[Path]], viewing: Viewing) -> Support:
    """Embed the examples of each class; name those that cannot be read in `errors`.

    Raises:
        ConfigError: fewer than two classes, or one without an example that can be read.
    """
    if len(examples) < 2:
        raise ConfigError(
            f"the examples are of {len(examples)} class ({', '.join(examples)}); give at least 2, a folder each"
        )
    found = _embed_files(model, [path for paths in examples.values() for path in paths], viewing)
    read = {name: [found.places[path] for path in paths if path in found.places] for name, paths in examples.items()}
    for name in (name for name, places in read.items() if not places):
        first = next(iter(examples[name]), None)
        why = f" ({first}: {found.errors[first]})" if first else ""
        raise ConfigError(f'class "{name}" has no example that can be read{why}; repair one, or leave the class out')
    shot = max(map(len, read.values()))
    mask = torch.tensor([[i < len(places) for i in range(shot)] for places in read.values()])  # [way, shot]
    index = torch.tensor([places + [0] * (shot - len(places)) for places in read.values()])  # [way, shot]

    def grouped(videos: Tensor) -> Tensor:
        """Group videos [V, ...] to [way, shot, ...]."""
        padding = mask.logical_not().reshape(*mask.shape, *(1,) * (videos.ndim - 1))
        return videos[index.to(videos.device)].masked_fill(padding.to(videos.device), 0)

    texts = None if viewing.class_text is None else viewing.class_text.rows(list(read)).to(_device(model))
    embedding = {name: one.map(grouped) for name, one in found.embedding.items()}
    return Support(tuple(read), embedding, None if bool(mask.all()) else mask, found.errors, texts)


def predict(model: Model, support: Support, queries: Iterable[Path], viewing: Viewing) -> Iterator[Prediction]:
    """Classify videos: one answer each, in their order, which depends on no other query.

    Raises:
        FsarError: the method needs more than example videos, the disk is full, or the weights are
            of no use.
    """
    waiting = iter(queries)
    while paths := list(islice(waiting, VIDEOS_AT_ONCE)):
        found = _embed_files(model, paths, viewing)
        scores = _scores(model, support, found, viewing.precision)
        for path in paths:
            if path in found.errors:
                yield Prediction(path, 0, {}, found.errors[path])
            else:
                yield Prediction(path, found.frames[path], scores[found.places[path]])


@torch.no_grad()
def _scores(model: Model, support: Support, found: _Embedded, precision: str) -> list[dict[str, float]]:
    """Score the classes of each embedded video, best first."""
    if not found.embedding:
        return []
    with autocast(_device(model), precision):
        logits = _logits(model, support, found)
    if not bool(logits.isfinite().all()):
        raise FsarError("the model's logits are not finite; choose another --checkpoint, or --precision fp32")
    shares = logits.double().softmax(dim=1).cpu()
    orders = shares.argsort(dim=1, descending=True, stable=True)
    return [
        {support.classes[i]: float(share[i]) for i in order.tolist()}
        for share, order in zip(shares, orders, strict=True)
    ]


def _logits(model: Model, support: Support, found: _Embedded) -> Tensor:
    """Compare all embedded videos with the classes, in each stream: logits [Q, way]."""
    logits: dict[Stream, Tensor] = {}
    for name, method in streams_of(model).items():
        text = support.class_text if "class_text" in method.reads and name == "frames" else None
        logits[name] = method.match(support.embedding[name], found.embedding[name], mask=support.mask, class_text=text)
    if not isinstance(model, TwoStreams):
        (own,) = logits.values()
        return own
    fusion = model.fusion
    if model.rule == SUPPORT:
        way, shot = next(iter(support.embedding.values())).tokens.shape[:2]
        groups = np.arange(way * shot).reshape(way, shot)  # what examples share is not known
        fusion = of_support(streams_of(model), support.embedding, groups, support.mask)
    return fusion.logits(logits["frames"], logits["motion"])


def _embed_files(model: Model, paths: Sequence[Path], viewing: Viewing) -> _Embedded:
    """Decode and embed each video once, one temporary folder of shards after the other."""
    waiting = iter(dict.fromkeys(paths))
    embeddings: dict[Stream, list[Embedding]] = {name: [] for name in streams_of(model)}
    places: dict[Path, int] = {}
    frames: dict[Path, int] = {}
    errors: dict[Path, str] = {}
    while batch := list(islice(waiting, VIDEOS_AT_ONCE)):
        with tempfile.TemporaryDirectory(prefix="fsar-predict-") as name:
            failed = _store(batch, Path(name), viewing)
            errors |= {batch[row]: reason for row, reason in failed.items()}
            rows = [row for row in range(len(batch)) if row not in failed]
            if not rows:
                continue
            with ShardSet.open(name) as shards:
                for stream, method in streams_of(model).items():
                    embeddings[stream].append(_embed(method, shards, rows, viewing))
                frames |= {batch[row]: int(shards.frames[row]) for row in rows}
        places |= {batch[row]: len(places) + i for i, row in enumerate(rows)}
    embedding = {stream: join(parts) for stream, parts in embeddings.items() if parts}
    return _Embedded(embedding, places, frames, errors)


def _store(paths: Sequence[Path], folder: Path, viewing: Viewing) -> dict[int, str]:
    """Preprocess videos into shards of frames; return the row and error of each that failed."""
    videos = [Video(f"video/{row}", "video", None, path) for row, path in enumerate(paths)]
    settings = Settings(
        viewing.geometry,
        motion=(viewing.rules.motion_series,) if viewing.rules.reads_motion else (),
        rows_per_shard=-(-len(paths) // (2 * viewing.workers)),  # a worker's share is whole shards
        time_limit=viewing.time_limit,
        workers=viewing.workers,
    )
    try:
        preprocess(Catalogue(Dataset("videos", ("video",), {}), videos), folder, settings)
    except ShardError:
        if len(_failures(folder)) < len(paths):  # where all failed, that is the answer
            raise
    return {row: f"{failure.reason}: {failure.detail}" for row, failure in _failures(folder).items()}


def _failures(folder: Path) -> dict[int, Failure]:
    return Failure.load_all(folder / "failures.jsonl")


def _embed(model: FewShotMethod, shards: ShardSet, rows: Sequence[int], viewing: Viewing) -> Embedding:
    """Embed stored videos; return [V, ...]."""
    with closing(_executor(shards, viewing, _device(model), model.stream)) as executor:
        return embed_videos(model, shards, rows, viewing.rules, executor=executor, precision=viewing.precision)


def _executor(shards: ShardSet, viewing: Viewing, device: torch.device, stream: Stream) -> Executor:
    """Choose training's executor on a GPU; on a CPU the portable one, which starts faster."""
    name = viewing.executor if device.type == "cuda" else "portable"
    series = [viewing.rules.motion_series if stream == "motion" else "rgb"]
    return executor_for(shards, device, name=name, threads=viewing.workers, series=series)


def _device(model: Model) -> torch.device:
    return next(model.parameters()).device
