"""Published lists find the videos that are there, and classes are chosen by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocess.datasets.catalogue import CatalogueError, Missing, Video
from preprocess.datasets.folder import choose_classes, hold_out, read_class_list
from preprocess.datasets.match_lists import match_lists
from shards_spec import ShardError
from shards_spec.splits.shipped import read_lists

CLASSES = ("Archery", "Biking", "Diving", "HandstandPushups", "YoYo")


def clip(label: str, number: int) -> Video:
    spelled = label.replace("Handstand", "HandStand")
    stem = f"v_{spelled}_g{number:02d}_c01"
    return Video(f"{label}/{stem}.avi", label, f"{label}/g{number:02d}", Path(f"{label}/{stem}.avi"))


VIDEOS = [clip(label, number) for label in CLASSES for number in (1, 2)]
SPLIT = {"train": VIDEOS[:4], "val": VIDEOS[4:6], "test": VIDEOS[6:9]}
FORMS = {
    "few_shot": ("{}_few_shot.txt", lambda split, video: f"{split}{number(video)}//data/UCF-101/{video.name}"),
    "single slash": ("{}_few_shot.txt", lambda split, video: f"{split}{number(video)}/{video.path.stem}"),
    "list03": ("{}list03.txt", lambda _, video: f"{video.label}/{video.path.stem}"),
    "other texts": ("{}list07.txt", lambda _, video: f"Doing {video.label}/{video.path.stem}"),
    "labelled": ("{}list01.txt", lambda _, video: f"{video.name} {number(video)}"),
}


def number(video: Video) -> int:
    return CLASSES.index(video.label)


def write_lists(folder: Path, form: str, extra: str = "") -> Path:
    pattern, line = FORMS[form]
    for name, videos in SPLIT.items():
        text = "".join(f"{line(name, video)}\n" for video in videos)
        (folder / pattern.format(name)).write_text(text + (extra if name == "train" else ""), encoding="utf-8")
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_lines_find_their_videos_by_stem(tmp_path: Path, form: str) -> None:
    """Lists may give classes as names, as other texts, or as numbers only."""
    lists = read_lists(write_lists(tmp_path, form, "Archery/v_Archery_g99_c01\n" if form == "list03" else ""))
    splits, expected = match_lists(lists, VIDEOS, CLASSES)
    for name, videos in SPLIT.items():
        assert splits[name].videos == tuple(sorted(video.name for video in videos))
        assert splits[name].classes == tuple(sorted({video.label for video in videos}))
    lost = (Missing("train", "Archery", "v_Archery_g99_c01"),) if form == "list03" else ()
    assert expected.missing == lost
    assert expected.splits == {"train": 4 + len(lost), "val": 2, "test": 3}
    assert expected.classes["Archery"] == 2 + len(lost)


def test_a_class_without_a_file_is_in_the_split(tmp_path: Path) -> None:
    lists = read_lists(write_lists(tmp_path, "list03"))
    splits, expected = match_lists(lists, [video for video in VIDEOS if video.label != "Biking"], CLASSES)
    assert splits["train"].classes == ("Archery", "Biking")
    assert [video.label for video in expected.missing] == ["Biking", "Biking"]
    assert expected.classes == {"Archery": 2, "Biking": 2, "Diving": 2, "HandstandPushups": 2, "YoYo": 1}


def test_equal_names_are_told_apart_by_class(tmp_path: Path) -> None:
    """`001` of a class that is not there is not `001` of another."""
    videos = [Video(f"{label}/001.avi", label, None, Path(f"{label}/001.avi")) for label in "abc"]
    for split, labels in {"train": "ab", "test": "d"}.items():
        (tmp_path / f"{split}list03.txt").write_text("".join(f"{label}/001\n" for label in labels))
    splits, expected = match_lists(read_lists(tmp_path), videos, "abc")
    assert splits["train"].videos == ("a/001.avi", "b/001.avi")
    assert splits["test"].videos == ()
    assert expected.missing == (Missing("test", "d", "001"),)
    (tmp_path / "trainlist03.txt").write_text("x/001\n")
    (tmp_path / "testlist03.txt").write_text("y/002\n")
    with pytest.raises(CatalogueError, match=r'the lists name "001" without a class.*a/001.avi, b/001.avi, c/001.avi'):
        match_lists(read_lists(tmp_path), videos, "abc")


def test_lists_of_other_videos_are_refused(tmp_path: Path) -> None:
    lists = read_lists(write_lists(tmp_path, "list03"))
    with pytest.raises(CatalogueError, match=r'none of the 9 listed videos \(such as "v_Archery_g01_c01"\) was found'):
        match_lists(lists, [clip("Surfing", 1)], CLASSES)


names = st.text(st.characters(codec="utf-8", exclude_characters="/", exclude_categories=["C", "Z"]), min_size=1)


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


def test_all_stands_for_every_other_class() -> None:
    splits = choose_classes({"train": ["all"], "val": [], "test": ["b", "d"]}, ["a", "b", "c", "d"])
    assert {name: split.classes for name, split in splits.items()} == {"train": ("a", "c"), "test": ("b", "d")}
    assert choose_classes({"test": ["all"]}, ["all", "other"])["test"].classes == ("all",)
    with pytest.raises(CatalogueError, match="give it to one split, not to train and test"):
        choose_classes({"train": ["all"], "test": ["all"]}, ["a", "b"])
    with pytest.raises(ShardError, match="share 1 classes"):
        choose_classes({"train": ["a"], "test": ["a"]}, ["a", "b"])
