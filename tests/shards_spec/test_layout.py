"""The columns of the index: one definition, the same in SPEC.md, and limits that hold."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import shards_spec
from shards_spec import ShardError, ShardSet
from shards_spec.index.checks import check_values
from shards_spec.index.layout import SERIES, VIDEOS, Column


def described() -> Iterator[tuple[str, str, str]]:
    """Yield group, name and `DTYPE [SHAPE]` of each column in the table of section 5."""
    text = (Path(shards_spec.__file__).parent / "SPEC.md").read_text(encoding="utf-8")
    for names, kinds in re.findall(r"^\| (`(?:videos|series/S)/[^|]*) \| ([^|]*) \|", text, re.MULTILINE):
        found = re.findall(r"`(?:(videos|series/S)/)?([a-z0-9_*]+)`", names)
        types = re.findall(r"\w+ \[[^\]]*\]", kinds)
        for (_, name), kind in zip(found, types if len(types) == len(found) else types * len(found), strict=True):
            yield found[0][0], name, kind


def written(column: Column) -> str:
    """Write a column as SPEC.md does."""
    sides = ", ".join(str(side) for side in column.shape)
    return f"{column.dtype} [{sides.replace('V + 1', 'V+1').replace('2 stored', '2·stored')}]"


def test_the_page_has_the_columns_that_are_defined() -> None:
    for group, columns in (("videos", VIDEOS), ("series/S", SERIES)):
        texts = {name.removesuffix("_ends") for name in columns if name.endswith("_ends")}
        pairs = {f"{text}_{part}" for text in texts for part in ("bytes", "ends")}
        page = {name: kind for where, name, kind in described() if where == group}
        plain = {name: kind for name, kind in page.items() if not name.endswith("_*")}
        assert plain == {name: written(column) for name, column in columns.items() if name not in pairs}
        assert page.keys() - plain.keys() == {f"{text}_*" for text in texts}


def test_an_index_holds_the_columns_that_are_defined(tiny_shards: ShardSet) -> None:
    for group, columns in (("videos", VIDEOS), *((f"series/{name}", SERIES) for name in tiny_shards.series_names)):
        held = tiny_shards._columns(group)
        for name, column in columns.items():
            assert name in held or column.optional
            if name in held:
                assert held[name].dtype == column.dtype
                assert held[name].ndim == len(column.shape)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("videos/fps", [0.0, 25.0], [-1.0, np.nan, np.inf]),
        ("videos/frames", [0, 99_999], [-1, 100_000]),
        ("series/rgb/frame", [0, 99_999], [-1, 100_000]),
        ("series/rgb/stored_size", [0, 65_535], [-1, 65_536]),
        ("series/flow1/scale", [0.0, -1.0], [np.nan, np.inf, -np.inf]),
        ("series/flow8g2/motion_score", [np.nan, 0.0], [np.inf, -np.inf]),
    ],
)
def test_limits_of_values(name: str, good: list, bad: list) -> None:
    dtype = (VIDEOS | SERIES)[name.rpartition("/")[2]].dtype
    check_values("x", name, np.array(good, dtype))
    check_values("x", name, np.array([], dtype))
    for value in bad:
        with pytest.raises(ShardError, match="x holds numbers"):
            check_values("x", name, np.array([*good, value], dtype))
