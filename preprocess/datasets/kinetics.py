"""The catalogue `kinetics`: `{train,val}/<class>/<YouTube id>_<start>_<end>.mp4`, at any depth."""

from __future__ import annotations

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
from preprocess.datasets.coverage import covered, listed_names
from preprocess.datasets.folder import choose_classes
from preprocess.datasets.match_lists import listed_catalogue, published_catalogue
from shards_spec import Dataset
from shards_spec.splits.sets import video_key
from shards_spec.splits.shipped import class_key, shipped

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
    """Return the catalogue of Kinetics.

    Args:
        folder: Its top.
        classes: `100`: the few-shot classes that ship, or those of `splits`, and then only the
            listed clips; `all`: every class folder.
        splits: Folder of lists.
        class_lists: Class names by split, for `all`.
        links: Whether links may lead out of the folder.

    Raises:
        CatalogueError: no clips found (the message shows the expected tree), or lists that do not
            fit.
        ShardError: unreadable lists.
    """
    require_folder(folder, "Kinetics", HELP)
    known = {class_key(name): name for name in shipped("kinetics100").classes}
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
        return listed_catalogue("kinetics", videos, splits, labels, short=video_key)
    splits_of_classes = choose_classes(class_lists or {}, labels)
    return covered(Dataset("kinetics", tuple(labels), splits_of_classes), videos, Expected())


def _few_shot(videos: list[Video], splits: Path | None) -> Catalogue:
    """Return Kinetics-100; with lists, only the videos that they name.

    The classes have ten times as many.
    """
    catalogue = published_catalogue("kinetics100", videos, splits, short=video_key)
    if splits is None:
        return catalogue
    listed = listed_names(catalogue.dataset)
    return covered(catalogue.dataset, [video for video in videos if video.name in listed], catalogue.expected)


def _clips(paths: Iterable[Path], folder: Path, known: Mapping[str, str]) -> Iterator[Video]:
    """Yield the clips; the group of a clip is the YouTube video that it was cut from."""
    for path in paths:
        label = text_of(Path("_".join(path.parent.name.split())))
        label = known.get(class_key(label), label)
        group = f"{label}/{text_of(Path(video_key(path.stem)))}"
        yield Video(text_of(path.relative_to(folder)), label, group, path)
