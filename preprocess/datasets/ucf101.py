"""The catalogue `ucf101`: `UCF-101/<Class>/v_<Class>_gNN_cNN.avi`, at any depth."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from preprocess.datasets.catalogue import Catalogue, CatalogueError, Video, arrange, require_folder, text_of, walk
from preprocess.datasets.match_lists import published_catalogue
from shards_spec.splits.shipped import shipped

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


def ucf101_catalogue(folder: Path, *, splits: Path | None = None, links: bool = False) -> Catalogue:
    """Return the catalogue of UCF101, with the class lists that ship or the lists in `splits`.

    Raises:
        CatalogueError: no clips found (the message shows the expected tree), or lists that do not
            fit.
        ShardError: unreadable lists.
    """
    require_folder(folder, "UCF101", HELP)
    videos = list(_clips(walk(folder, links=links), folder, set(shipped("ucf101").classes)))
    if not videos:
        raise CatalogueError(f"{folder} holds no clip of UCF101 (v_<Class>_gNN_cNN)\n{HELP}")
    return published_catalogue("ucf101", arrange(videos, folder), splits)


def _clips(paths: Iterable[Path], folder: Path, classes: set[str]) -> Iterator[Video]:
    for path in paths:
        match = CLIP.search(path.name)
        if match:
            label = SPELLINGS.get(match["label"], match["label"])
            if label not in classes:
                raise CatalogueError(f'{path}: "{label}" is no class of UCF101; move the file elsewhere or rename it')
            yield Video(text_of(path.relative_to(folder)), label, f"{label}/g{match['group']}", path)
