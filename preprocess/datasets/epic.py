"""The catalogue `epic`: `<recording>_<n>.MP4`, clips of EPIC-Kitchens as HyRSM++ lists them."""

from __future__ import annotations

from pathlib import Path

from preprocess.datasets.catalogue import Catalogue, CatalogueError, require_folder
from preprocess.datasets.match_lists import catalogue_of_lists, numbered_class
from shards_spec.splits.shipped import read_lists

HELP = """\
expected tree:
  data/epic/
    clips_256/P01_11_0.MP4
    ...
(one file an action, named by recording and number; any depth and extension will do; the listed clips are taken)
EPIC-Kitchens is had from its authors: https://epic-kitchens.github.io (whole recordings, to be cut into clips)"""

NO_LISTS = (
    "epic needs --splits: its few-shot split names its videos, and the lists are published in the repository of "
    "CLIP-FSAR (configs/projects/hyrsmplusplus/epic_kitchens, train and test); copy that folder and name it"
)


def epic_catalogue(folder: Path, *, splits: Path | None, links: bool = False) -> Catalogue:
    """Return the catalogue of the listed clips of EPIC-Kitchens.

    Its classes have numbers only, such as `train07`. The group of a clip is its recording.

    Raises:
        CatalogueError: no lists, or none of their clips (the message shows the expected tree).
        ShardError: unreadable lists.
    """
    if splits is None:
        raise CatalogueError(NO_LISTS)
    require_folder(folder, "EPIC-Kitchens", HELP)
    return catalogue_of_lists(
        folder,
        read_lists(splits),
        name="epic",
        class_of=lambda split, entry: entry.label or numbered_class(split, entry),
        group_of=lambda stem: stem.rpartition("_")[0] or stem,
        tree=HELP,
        links=links,
    )
