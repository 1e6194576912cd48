"""The catalogue `hmdb51`: `<class>/<name>.avi`, at any depth."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from preprocess.datasets.catalogue import Catalogue, CatalogueError, Video, arrange, require_folder, text_of, walk
from preprocess.datasets.match_lists import published_catalogue
from shards_spec.errors import suggest
from shards_spec.splits.shipped import class_key, shipped

# HMDB51 adds to the name of the film or upload that a clip was cut from: visible part of the body,
# camera motion, number of people, viewpoint, quality, number of the clip.
ATTRIBUTES = re.compile(r"_[ulfh]_(?:cm|nm)_np\d+_(?:ba|fr|le|ri)_(?:bad|med|goo)_\d+$")

HELP = """\
expected tree:
  data/hmdb51/
    brush_hair/April_09_brush_hair_u_nm_np1_ba_goo_0.avi
    ...
    wave/winKen_wave_u_cm_np1_ri_bad_1.avi
(51 folders, 6,766 clips, 2 GB; any depth and extension will do, the folder that a clip lies in is its class)
HMDB51 is had from its authors, the Serre Lab of Brown University:
  https://serre-lab.clps.brown.edu/resource/hmdb-a-large-human-motion-database/"""


def hmdb51_catalogue(folder: Path, *, splits: Path | None = None, links: bool = False) -> Catalogue:
    """Return the catalogue of HMDB51, with the class lists that ship or the lists in `splits`.

    Raises:
        CatalogueError: no clips found (the message shows the expected tree), or lists that do not
            fit.
        ShardError: unreadable lists.
    """
    require_folder(folder, "HMDB51", HELP)
    classes = {class_key(name): name for name in shipped("hmdb51").classes}
    videos = list(_clips(walk(folder, links=links), folder, classes))
    if not videos:
        raise CatalogueError(f"{folder} holds no folder of HMDB51's classes with clips in it\n{HELP}")
    return published_catalogue("hmdb51", arrange(videos, folder), splits)


def _clips(paths: Iterable[Path], folder: Path, classes: Mapping[str, str]) -> Iterator[Video]:
    for path in paths:
        place = text_of(Path(path.parent.name))
        label = classes.get(class_key(place))
        source = ATTRIBUTES.sub("", path.stem)
        if label is not None:
            name = text_of(path.relative_to(folder))
            yield Video(name, label, f"{label}/{text_of(Path(source))}", path)
        elif source != path.stem:
            raise CatalogueError(
                f'{path} is named like a clip of HMDB51, but "{place}" is no class of it; {suggest(place, classes)}'
            )
