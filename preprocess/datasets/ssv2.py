"""The catalogue `ssv2`: `<id>.webm` of Something-Something V2, as few-shot splits list them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from preprocess.datasets.catalogue import Catalogue, CatalogueError, require_folder
from preprocess.datasets.match_lists import ListClass, Lists, catalogue_of_lists, list_class, numbered_class
from shards_spec.files import read_json
from shards_spec.splits.shipped import read_lists

SMALL = 100  # videos a class in every split of SSv2-small; SSv2-full has 17 to 3,170
# Share of a listed class's videos that must have one template: else the labels are of other videos.
AGREE = 0.9
LABEL_FILES = (
    ("something-something-v2-train.json", "train.json"),
    ("something-something-v2-validation.json", "validation.json"),
)

HELP = """\
expected tree:
  data/ssv2/
    20bn-something-something-v2/1.webm
    ...
    20bn-something-something-v2/220847.webm
    labels/something-something-v2-train.json, something-something-v2-validation.json   (--labels data/ssv2/labels)
(220,847 clips, 19 GB; any depth and extension will do; clips are matched by number, and the listed ones are taken)
Something-Something V2 is had from its owner, Qualcomm:
  https://developer.qualcomm.com/software/ai-datasets/something-something"""

NO_LISTS = (
    "ssv2 needs --splits: few-shot splits of it name their videos, and such lists are published in the repository of "
    "TRX (splits/ssv2_CMN is SSv2-small, splits/ssv2_OTAM is SSv2-full) and of CLIP-FSAR "
    "(configs/projects/MoLo/ssv2_small and ssv2_full); copy one of these folders and name it"
)


def ssv2_catalogue(
    folder: Path,
    *,
    splits: Path | None,
    labels: Path | None = None,
    variant: str | None = None,
    links: bool = False,
) -> Catalogue:
    """Return the catalogue of the listed videos, called `ssv2-small` or `ssv2-full`.

    Args:
        folder: Top of Something-Something V2.
        splits: Folder of lists.
        labels: Folder of its own `train` and `validation` JSON files, which name the classes.
        variant: `small` or `full`; None: the sizes of the lists tell it.
        links: Whether links may lead out of the folder.

    Raises:
        CatalogueError: no lists, or none of their videos (the message shows the expected tree), or
            labels that do not fit.
        ShardError: unreadable lists.
    """
    if splits is None:
        raise CatalogueError(NO_LISTS)
    require_folder(folder, "Something-Something V2", HELP)
    lists = read_lists(splits)
    names = _class_names(lists, _templates(labels) if labels else {})
    return catalogue_of_lists(
        folder,
        lists,
        name=f"ssv2-{variant or _variant(lists)}",
        class_of=lambda split, entry: names[list_class(split, entry)],
        tree=HELP,
        links=links,
    )


def _variant(lists: Lists) -> str:
    """Tell SSv2-small from SSv2-full by the number of videos a class."""
    sizes = Counter(list_class(split, entry) for split, entries in lists.items() for entry in entries)
    return "small" if set(sizes.values()) == {SMALL} else "full"


def _class_names(lists: Lists, templates: Mapping[str, str]) -> dict[ListClass, str]:
    """Name each class of the lists.

    The name is the template of its videos, else the text of the lists, else such as `train07`.

    Raises:
        CatalogueError: the videos of a class have several templates, or two classes have one.
    """
    names: dict[ListClass, str] = {}
    texts: dict[ListClass, Counter[str]] = defaultdict(Counter)
    for split, entries in lists.items():
        for entry in entries:
            key = list_class(split, entry)
            names[key] = entry.label or numbered_class(split, entry)
            if entry.stem in templates:
                texts[key][templates[entry.stem]] += 1
    for key, counts in texts.items():
        (text, count), *others = counts.most_common()
        if count < AGREE * counts.total():
            raise CatalogueError(
                f'the videos of the listed class "{names[key]}" have several templates in --labels ("{text}", '
                f'"{others[0][0]}", ...): the labels or the lists are of another data set'
            )
        names[key] = text
    return _distinct(names)


def _distinct(names: dict[ListClass, str]) -> dict[ListClass, str]:
    """Return the names, which must be of one class each."""
    keys: dict[str, ListClass] = {}
    for key, name in names.items():
        if keys.setdefault(name, key) != key:
            raise CatalogueError(
                f'two classes of the lists ({keys[name]}, {key}) are both "{name}" by --labels: '
                "the labels or the lists are of another data set"
            )
    return names


def _templates(folder: Path) -> dict[str, str]:
    """Read the class text of each video: its template without the brackets."""
    texts: dict[str, str] = {}
    found = [next((folder / name for name in names if (folder / name).is_file()), None) for names in LABEL_FILES]
    if not any(found):
        names = ", ".join(name for names in LABEL_FILES for name in names)
        raise CatalogueError(f"--labels {folder} holds none of {names}")
    for path in found:
        if path:
            texts |= _read_templates(path)
    return texts


def _read_templates(path: Path) -> dict[str, str]:
    entries: Any = read_json(path)
    try:
        return {str(entry["id"]): entry["template"].replace("[", "").replace("]", "") for entry in entries}
    except (KeyError, TypeError, AttributeError) as error:
        raise CatalogueError(f'{path}: expected a list of objects with "id" and "template" ({error!r})') from error
