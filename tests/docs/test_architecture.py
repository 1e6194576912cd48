"""The page on the layout: every file and folder that it names is there, and it names every room."""

from __future__ import annotations

import re

import pytest
from folders import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PATH = re.compile(r"`((?:benchmarks|fsar|pipelines|preprocess|shards_spec|tests)/[\w./]*)`")


@pytest.mark.parametrize("name", sorted(set(PATH.findall(PAGE))))
def test_the_named_file_is_there(name: str) -> None:
    path = ROOT / name
    assert path.is_dir() if name.endswith("/") else path.is_file()


def test_every_folder_of_code_is_named() -> None:
    rooms = ("fsar", "pipelines", "preprocess", "shards_spec")
    folders = {path.parent for room in rooms for path in (ROOT / room).glob("*/__init__.py")}
    unnamed = [str(path.relative_to(ROOT)) for path in folders if f"`{path.relative_to(ROOT)}/`" not in PAGE]
    assert sorted(unnamed) == []


def test_names_of_code_on_the_page_are_there() -> None:
    for name, file in (("FRAME_RULES", "pipelines/sampling.py"), ("CODECS", "shards_spec/schema.py")):
        assert f"`{name}` in `{file}`" in PAGE
        assert f"\n{name}" in (ROOT / file).read_text(encoding="utf-8")
