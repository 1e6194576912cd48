"""Splits: the class lists that ship, and the lists that papers publish."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocess.catalogue import CatalogueError, Video
from preprocess.folder import hold_out, read_class_list
from preprocess.splits import NAMES, _stem, class_splits, read_splits
from preprocess.ucf101 import ucf101_catalogue
from shards_spec import ShardError

CLASSES = ("Archery", "Biking", "Diving", "HandstandPushups", "YoYo")


def clip(label: str, number: int) -> Video:
    spelled = label.replace("Handstand", "HandStand")
    stem = f"v_{spelled}_g{number:02d}_c01"
    return Video(f"{label}/{stem}.avi", label, f"{label}/g{number:02d}", Path(f"{label}/{stem}.avi"))


VIDEOS = [clip(label, number) for label in CLASSES for number in (1, 2)]
SPLIT = {"train": VIDEOS[:4], "val": VIDEOS[4:6], "test": VIDEOS[6:9]}
FORMS = {
    "few_shot": ("{}_few_shot.txt", lambda n, video: f"train{n}//data/UCF-101/{video.name}"),
    "single slash": ("{}_few_shot.txt", lambda n, video: f"test{n}/{video.path.stem}"),
    "list03": ("{}list03.txt", lambda _, video: f"{video.label}/{video.path.stem}"),
    "spaced": ("{}list07.txt", lambda _, video: f"Some class/{video.path.stem}"),
    "official": ("{}list01.txt", lambda n, video: f"{video.name} {n + 1}"),
}


def write_lists(folder: Path, form: str, extra: str = "") -> Path:
    pattern, line = FORMS[form]
    for name, videos in SPLIT.items():
        text = "".join(f"{line(n, video)}\r\n" for n, video in enumerate(videos))
        (folder / pattern.format(name)).write_text(text + extra, encoding="utf-8")
    return folder


def test_shipped_ucf101() -> None:
    splits = class_splits("ucf101")
    assert [len(splits[name].classes) for name in NAMES] == [70, 10, 21]
    assert len(set().union(*(splits[name].classes for name in NAMES))) == 101


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_list(tmp_path: Path, form: str) -> None:
    splits, unmatched = read_splits(write_lists(tmp_path, form, "\nArchery/v_Archery_g99_c01\n"), VIDEOS)
    assert unmatched == ["v_Archery_g99_c01"] * 3
    for name, videos in SPLIT.items():
        assert splits[name].videos == tuple(sorted(video.name for video in videos))
        assert splits[name].classes == tuple(sorted({video.label for video in videos}))


def test_lists_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match="holds none of"):
        read_splits(tmp_path, VIDEOS)
    write_lists(tmp_path, "list03")
    with pytest.raises(CatalogueError, match="none of the 9 listed videos"):
        read_splits(tmp_path, [clip("Surfing", 1)])
    (tmp_path / "vallist03.txt").write_text("Archery/v_Archery_g01_c01\n")
    with pytest.raises(ShardError, match='"train" and "val" share'):
        read_splits(tmp_path, VIDEOS)
    (tmp_path / "vallist03.txt").write_text("lonely\n")
    with pytest.raises(CatalogueError, match='cannot read the line "lonely"'):
        read_splits(tmp_path, VIDEOS)
    (tmp_path / "vallist03.txt").write_bytes(b"Archery/\xff\n")
    with pytest.raises(CatalogueError, match="no text file in UTF-8"):
        read_splits(tmp_path, VIDEOS)
    write_lists(tmp_path, "few_shot")
    with pytest.raises(CatalogueError, match="holds several lists of train"):
        read_splits(tmp_path, VIDEOS)


names = st.text(st.characters(codec="utf-8", exclude_characters="/", exclude_categories=["C", "Z"]), min_size=1)


@given(stem=names, folder=names, number=st.integers(0, 200), form=st.sampled_from(["train{}//x/{}/", "val{}/", "{1}/"]))
def test_line_parser(stem: str, folder: str, number: int, form: str) -> None:
    stem = stem.strip(".") or "x"
    line = form.format(number, folder) + stem
    assert _stem(f"{line}.avi", Path("list")) == stem
    assert _stem(f"{line}.webm", Path("list")) == stem


def test_ucf101_catalogue(tmp_path: Path) -> None:
    for video in VIDEOS:
        path = tmp_path / "deep" / video.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    catalogue = ucf101_catalogue(tmp_path)
    assert [video.name for video in catalogue.videos] == [f"deep/{video.name}" for video in VIDEOS]
    assert {video.label for video in catalogue.videos} == set(CLASSES)
    assert catalogue.videos[-1].group == "YoYo/g02"
    assert len(catalogue.dataset.classes) == 101
    assert any("without a video: 96 of 101 classes" in line for line in catalogue.coverage())
    (tmp_path / "v_Walking_g01_c01.avi").write_bytes(b"")
    with pytest.raises(CatalogueError, match='"Walking" is no class of UCF101'):
        ucf101_catalogue(tmp_path)


@given(labels=st.sets(names, min_size=4, max_size=30), data=st.data())
def test_hold_out_depends_on_names_alone(labels: set[str], data: st.DataObject) -> None:
    count = data.draw(st.integers(2, len(labels) - 2))
    held = hold_out(sorted(labels), count)
    assert held == hold_out(data.draw(st.permutations(sorted(labels))), count)
    assert len(held["test"]) == count
    assert sorted([*held["train"], *held["test"]]) == sorted(labels)


def test_class_lists(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("one\n two words \n\none\n", encoding="utf-8")
    assert read_class_list(str(tmp_path / "list.txt")) == ["one", "two words"]
    assert read_class_list(" a, b,,a") == ["a", "b"]
    (tmp_path / "list.txt").write_bytes(b"\xff")
    with pytest.raises(CatalogueError, match="cannot be read as a list"):
        read_class_list(str(tmp_path / "list.txt"))
