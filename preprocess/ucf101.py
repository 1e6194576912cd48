"""The catalogue `ucf101`: `UCF-101/<Class>/v_<Class>_gNN_cNN.avi`, at any depth."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from preprocess.catalogue import Catalogue, CatalogueError, Video, arrange, text_of, walk
from preprocess.splits import class_splits, read_splits
from shards_spec import Dataset

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# UCF101's own name for its clips; the group is the long video that a clip was cut from.
CLIP = re.compile(r"v_(?P<label>[A-Za-z]+?)_.*?g(?P<group>\d+)_c\d+", re.IGNORECASE)
# One class is spelled differently in its file names than in its folder and in the lists.
SPELLINGS = {"HandStandPushups": "HandstandPushups"}

HELP = """\
expected tree:
  data/UCF-101/
    ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi
    ...
    YoYo/v_YoYo_g25_c05.avi
(101 folders, 13,320 clips, 6.5 GB; any depth and extension will do, clips are matched by name)
UCF101 is had from its authors, the Center for Research in Computer Vision of the University of Central Florida:
  https://www.crcv.ucf.edu/data/UCF101.php (UCF101.rar)"""


def ucf101_catalogue(folder: Path, *, splits: Path | None = None) -> Catalogue:
    """Catalogue of UCF101, with the class lists that ship with the project or the lists in `splits`.

    Raises:
        CatalogueError: no clips found (with the tree that is expected), or unreadable lists.
    """
    if not folder.is_dir():
        raise CatalogueError(f"{folder} is no folder; put UCF101 there or name its folder with --videos\n{HELP}")
    shipped = class_splits("ucf101")
    classes = tuple(sorted(name for split in shipped.values() for name in split.classes))
    videos = list(_clips(folder, set(classes)))
    if not videos:
        raise CatalogueError(f"{folder} holds no clip of UCF101 (v_<Class>_gNN_cNN)\n{HELP}")
    videos = arrange(videos, folder)
    if splits is None:
        return Catalogue(Dataset("ucf101", classes, shipped), videos)
    listed, unmatched = read_splits(splits, videos)
    return Catalogue(Dataset("ucf101", classes, listed), videos, unmatched)


def _clips(folder: Path, classes: set[str]) -> Iterator[Video]:
    for path in walk(folder):
        match = CLIP.search(path.name)
        if match:
            label = SPELLINGS.get(match["label"], match["label"])
            if label not in classes:
                raise CatalogueError(f'{path}: "{label}" is no class of UCF101; move the file elsewhere or rename it')
            yield Video(text_of(path.relative_to(folder)), label, f"{label}/g{match['group']}", path)
