"""Folds of small sets: no class, or no group, on both sides, and only classes that give an episode."""

from __future__ import annotations

from importlib import import_module
from itertools import chain
from pathlib import Path

import pytest
from small_runs import call

from benchmarks.models.streams import Models, folds, group_of, of_set, read_tree, serves, table

GROUP = r"_g(\d+)"


def make_tree(folder: Path, classes: dict[str, list[str]]) -> Path:
    for label, names in classes.items():
        (folder / label).mkdir(parents=True)
        for name in names:
            (folder / label / name).touch()
    return folder


def names(groups: str, each: int = 3) -> list[str]:
    return [f"v_g{group}_{number}.avi" for group in groups for number in range(each)]


def test_classes_of_one_group_and_beside_large_ones_small_ones_are_left_out(tmp_path: Path) -> None:
    tree = {"one": names("1", 9), "two": names("12"), "three": names("123", 2), "few": names("12", 1)}
    assert list(read_tree(make_tree(tmp_path / "a", tree), GROUP)) == ["three", "two"]
    small = {"few": tree["few"], "one": tree["one"][:3], "three": tree["three"][1:4]}
    assert list(read_tree(make_tree(tmp_path / "b", small), GROUP)) == ["few", "three"]
    assert not serves([Path(name) for name in names("12")], GROUP, 4)  # three others at most
    assert serves([Path(name) for name in names("12")], GROUP, 3)


@pytest.mark.parametrize("classes", [4, 2])
def test_the_sides_of_a_fold_share_nothing(tmp_path: Path, classes: int) -> None:
    tree = read_tree(make_tree(tmp_path, {f"c{n}": names("1234", 2) for n in range(classes)}), GROUP)
    (_, none, everything), *halves = folds(tree, GROUP)
    assert not none
    assert everything == tree
    for _, train, test in halves:
        assert not set(train) & set(test)
        sides = [set(chain(*side.values())) for side in (train, test)]
        assert not sides[0] & sides[1]
        assert sides[0] | sides[1] == set(chain(*tree.values()))
        if classes == 2:
            groups = [{(video.parent.name, group_of(video, GROUP)) for video in side} for side in sides]
            assert not groups[0] & groups[1]
    assert halves[0][1:] == halves[1][:0:-1]


def test_rows_come_from_the_commands(tiny_videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames, motion and both of all classes and of two folds, and a network trained on the other fold."""
    made: list[str] = []

    def run(module: str, *words: str) -> None:
        made.append(module)
        sizes = ["--option", "resize=64", "--option", "crop=56"] if "--trunk-weights" in words else []
        quick = ["--episodes", "2", "--resize", "64", "--crop", "56"] if module == "fsar.cli.train" else []
        assert call(import_module(module).cli, *words, *sizes, *quick) == 0

    monkeypatch.setattr("benchmarks.models.streams.run", run)
    monkeypatch.setattr("benchmarks.models.streams.SHOTS", (1,))
    rows = list(of_set(tiny_videos, GROUP, Models(("tiny", "random"), trained=True, episodes=3)))
    found = {(row["part"], row["model"]) for row in rows}
    of_folds = {
        (f"fold {n}", model) for n in (1, 2) for model in ("frames", "motion", "both, train", "motion, trained")
    }
    assert found == {("all", model) for model in ("frames", "motion", "both, 0.5")} | of_folds
    assert all(row["episodes"] == 3 and 0 <= row["accuracy"] <= 1 for row in rows)
    assert len(table(rows).splitlines()) == 2 + 3
    assert made.count("fsar.cli.train") == 2
