"""The catalogue `kinetics`: `{train,val}/<class>/<YouTube id>_<start>_<end>.mp4`, at any depth."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from preprocess.datasets.catalogue import (
    Catalogue,
    CatalogueError,
    Expected,
    Video,
    arrange,
    require_folder,
    text_of,
    walk,
)
from preprocess.datasets.coverage import covered
from preprocess.datasets.folder import choose_classes
from preprocess.datasets.matching import listed_catalogue, published_catalogue
from shards_spec import Dataset
from shards_spec.splits.shipped import class_key, shipped

# A clip is named by its YouTube id; with or without the seconds that it was cut from.
CLIP = re.compile(r"(?P<id>[\w-]{11})(?:_\d{6}_\d{6})?")

HELP = """\
expected tree:
  data/kinetics/
    train/air_drumming/-VtLx-mcPds_000012_000022.mp4
    ...
    val/zumba/zpYwmpdJtIQ_000043_000053.mp4
(any depth and extension will do, such as train_256/; the folder that a clip lies in is its class, with blanks or
underscores; a clip is matched by its YouTube id, with or without the seconds)
Kinetics-400 is had from its host, the Common Visual Data Foundation:
  https://github.com/cvdfoundation/kinetics-dataset (its archives may be flat: sort the clips into class folders)"""


def kinetics_catalogue(
    folder: Path,
    *,
    classes: str = "100",
    splits: Path | None = None,
    class_lists: Mapping[str, Sequence[str]] | None = None,
    links: bool = False,
) -> Catalogue:
    """Catalogue of Kinetics.

    Args:
        folder: Its top.
        classes: `100`: the few-shot classes that ship, or those of `splits`, whose listed clips alone are taken;
            `all`: every class folder.
        splits: Folder of lists.
        class_lists: Class names by split, for `all`.
        links: Whether links may lead out of the folder.

    Raises:
        CatalogueError: no clips found (with the tree that is expected), or lists that do not fit.
        ShardError: unreadable lists.
    """
    require_folder(folder, "Kinetics", HELP)
    known = {class_key(name): name for names in shipped("kinetics100").splits.values() for name in names}
    clips = _clips(walk(folder, links=links), folder, known)
    videos = [video for video in clips if classes == "all" or class_key(video.label) in known]
    if not videos:
        wanted = "100 few-shot classes (--classes all takes every folder)" if classes == "100" else "classes"
        raise CatalogueError(f"{folder} holds no clip of Kinetics in a folder of its {wanted}\n{HELP}")
    videos = arrange(videos, folder)
    if classes == "100":
        return _few_shot(videos, splits)
    labels = sorted({video.label for video in videos})
    if splits is not None:
        return listed_catalogue("kinetics", videos, splits, labels, short=youtube_id)
    splits_of_classes = choose_classes(class_lists or {}, labels)
    return covered(Dataset("kinetics", tuple(labels), splits_of_classes), videos, Expected())


def youtube_id(stem: str) -> str:
    """The id of the video that a clip was cut from: the first eleven characters of its name."""
    match = CLIP.fullmatch(stem)
    return match["id"] if match else stem


def _few_shot(videos: list[Video], splits: Path | None) -> Catalogue:
    """Kinetics-100; of lists only the videos that they name: the classes have ten times as many."""
    catalogue = published_catalogue("kinetics100", videos, splits, short=youtube_id)
    if splits is None:
        return catalogue
    listed = {name for split in catalogue.dataset.splits.values() for name in split.videos or ()}
    return covered(catalogue.dataset, [video for video in videos if video.name in listed], catalogue.expected)


def _clips(paths: Iterable[Path], folder: Path, known: Mapping[str, str]) -> Iterator[Video]:
    for path in paths:
        label = text_of(Path("_".join(path.parent.name.split())))
        label = known.get(class_key(label), label)
        group = f"{label}/{text_of(Path(youtube_id(path.stem)))}"
        yield Video(text_of(path.relative_to(folder)), label, group, path)
