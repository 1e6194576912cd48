"""Catalogues of the field's data sets: every layout is read, and gaps are told before decoding."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from folders import command_line, stamps
from videos import moving_frames, write_video

from preprocess.cli import cli
from preprocess.datasets.catalogue import Catalogue, CatalogueError
from preprocess.datasets.coverage import check_coverage, report, share
from preprocess.datasets.epic import epic_catalogue
from preprocess.datasets.hmdb51 import hmdb51_catalogue
from preprocess.datasets.kinetics import kinetics_catalogue
from preprocess.datasets.ssv2 import ssv2_catalogue
from preprocess.datasets.ucf101 import ucf101_catalogue
from shards_spec import Dataset, FsarError, ShardSet


def touch(folder: Path, names: Iterable[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def write_lists(folder: Path, lists: Mapping[str, Iterable[str]], pattern: str = "{}_few_shot.txt") -> Path:
    folder.mkdir(exist_ok=True)
    for split, lines in lists.items():
        (folder / pattern.format(split)).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder


def split_videos(catalogue: Catalogue) -> dict[str, tuple[str, ...] | None]:
    return {name: split.videos for name, split in catalogue.dataset.splits.items()}


def test_ucf101(tmp_path: Path) -> None:
    """Any depth; the class is that of the name, in one spelling; hidden files are left out."""
    clips = [
        "a/Archery/v_Archery_g01_c01.avi",
        "v_HandStandPushups_g12_c03.mkv",
        "a/._v_Archery_g01_c02.avi",
        "a/x.avi",
    ]
    catalogue = ucf101_catalogue(touch(tmp_path, clips))
    assert [(v.name, v.label, v.group) for v in catalogue.videos] == [
        (clips[0], "Archery", "Archery/g01"),
        (clips[1], "HandstandPushups", "HandstandPushups/g12"),
    ]
    assert len(catalogue.dataset.classes) == 101
    assert catalogue.dataset.coverage == {"train": (1, 9154), "val": (1, 1421), "test": (0, 2745)}
    touch(tmp_path, ["v_Walking_g01_c01.avi"])
    with pytest.raises(CatalogueError, match='"Walking" is no class of UCF101'):
        ucf101_catalogue(tmp_path)


def test_hmdb51(tmp_path: Path) -> None:
    """The class is the folder; clips of one film share a group, whatever their names hold."""
    names = [
        "eat/#[a]@home!~&+_(1);-)_eat_h_cm_np1_fr_goo_0.avi",
        "eat/#[a]@home!~&+_(1);-)_eat_u_nm_np2_le_bad_12.avi",
        "eat/plain.mp4",
        "shake hands/A_shake_hands_l_nm_np2_ba_med_3.avi",
    ]
    catalogue = hmdb51_catalogue(touch(tmp_path / "deep", names))
    assert [video.name for video in catalogue.videos] == names
    film, again, plain, other = (video.group for video in catalogue.videos)
    assert film == again == "eat/#[a]@home!~&+_(1);-)_eat"
    assert (plain, other) == ("eat/plain", "shake_hands/A_shake_hands")
    assert {split: sum(pair) for split, pair in catalogue.dataset.coverage.items()} == {
        "train": 4281,
        "val": 1197,
        "test": 1292,
    }
    touch(tmp_path, ["eating/B_eat_u_nm_np2_le_bad_1.avi"])
    with pytest.raises(CatalogueError, match='"eating" is no class of it; did you mean "eat"'):
        hmdb51_catalogue(tmp_path)


IDS = [f"a-b_{n:07d}" for n in range(6)]


@pytest.fixture
def kinetics(tmp_path: Path) -> Path:
    """A class with blanks and with underscores, one with brackets, one that is not few-shot."""
    return touch(
        tmp_path / "kinetics",
        [
            f"train_256/air drumming/{IDS[0]}_000001_000011.mp4",
            f"val/air_drumming/{IDS[1]}.mkv",
            f"train_256/hurling_(sport)/{IDS[2]}_000003_000013.mp4",
            f"train_256/hurling_(sport)/{IDS[2]}_000030_000040.mp4",
            f"train_256/zumba/{IDS[3]}.webm",
        ],
    )


def test_kinetics_classes(kinetics: Path) -> None:
    few = kinetics_catalogue(kinetics)
    assert few.dataset.name == "kinetics100"
    assert [video.label for video in few.videos] == ["air_drumming"] * 2 + ["hurling_(sport)"] * 2
    assert few.videos[0].group == f"air_drumming/{IDS[0]}"
    assert few.videos[2].group == few.videos[3].group
    whole = kinetics_catalogue(kinetics, classes="all", class_lists={"train": ["all"], "test": ["zumba"]})
    assert whole.dataset.name == "kinetics"
    assert whole.dataset.classes == ("air_drumming", "hurling_(sport)", "zumba")
    assert whole.dataset.splits["train"].classes == ("air_drumming", "hurling_(sport)")
    assert whole.dataset.coverage == {}


def test_kinetics_lists(kinetics: Path, tmp_path: Path) -> None:
    """A bare id finds a timed file and the reverse; exact names go first, and files serve once."""
    lists = {
        "train": [f"air drumming/{IDS[0]}", f"air drumming/{IDS[1]}_000001_000011"],
        "test": [f"hurling (sport)/{IDS[2]}", f"hurling (sport)/{IDS[2]}_000003_000013", f"hurling (sport)/{IDS[4]}"],
    }
    catalogue = kinetics_catalogue(kinetics, splits=write_lists(tmp_path / "cmn", lists, "{}list03.txt"))
    assert [len(videos or ()) for videos in split_videos(catalogue).values()] == [2, 2]
    assert [video.name for video in catalogue.expected.missing] == [IDS[4]]
    lists = {
        "train": [f"train0//train_256/air_drumming/{IDS[0]}_000001_000011.mp4"],
        "test": [f"test0//val_256/hurling_(sport)/{IDS[2]}_000030_000040.mp4", f"test1//val_256/busking/{IDS[5]}.mp4"],
    }
    catalogue = kinetics_catalogue(kinetics, splits=write_lists(tmp_path / "molo", lists))
    assert len(catalogue.videos) == 2  # only the listed ones
    assert catalogue.dataset.splits["test"].classes == ("busking", "hurling_(sport)")
    assert catalogue.dataset.coverage == {"train": (1, 1), "test": (1, 2)}
    timed = [f"train0//train_256/air_drumming/{IDS[0]}_000500_000510.mp4"]  # another part of the same video
    with pytest.raises(CatalogueError, match="none of the 1 listed videos"):
        kinetics_catalogue(kinetics, splits=write_lists(tmp_path / "other", {"train": timed}))


@pytest.fixture
def ssv2(tmp_path: Path) -> Path:
    return touch(tmp_path / "ssv2", [f"{n % 2}/{n}.{'webm' if n % 3 else 'mp4'}" for n in range(1, 13)])


NUMBERED = {"train": ["train0/1", "train0/2", "train7/3"], "val": ["val0/4"], "test": ["test0/5", "test0/99"]}


def write_labels(folder: Path, names: tuple[str, str], templates: Mapping[int, str]) -> Path:
    entries = [{"id": str(n), "label": "a cup", "template": text} for n, text in templates.items()]
    folder.mkdir(exist_ok=True)
    (folder / names[0]).write_text(json.dumps(entries[::2]))
    (folder / names[1]).write_text(json.dumps(entries[1::2]))
    return folder


def test_ssv2_takes_what_is_listed(ssv2: Path, tmp_path: Path) -> None:
    catalogue = ssv2_catalogue(ssv2, splits=write_lists(tmp_path / "lists", NUMBERED))
    assert catalogue.dataset.name == "ssv2-full"
    assert catalogue.dataset.classes == ("test00", "train00", "train07", "val00")
    assert {video.name: video.label for video in catalogue.videos} == {
        "1/1.webm": "train00",
        "0/2.webm": "train00",
        "1/3.mp4": "train07",
        "0/4.webm": "val00",
        "1/5.webm": "test00",
    }
    assert catalogue.dataset.coverage == {"train": (3, 3), "val": (1, 1), "test": (1, 2)}
    named = ssv2_catalogue(ssv2, splits=tmp_path / "lists", variant="small")
    assert named.dataset.name == "ssv2-small"


def test_ssv2_small_is_known_by_its_lists(ssv2: Path, tmp_path: Path) -> None:
    texts = {"train": "Lifting (up) something", "test": "Poking a hole"}
    lists = {split: [f"{text}/{1000 * n + k}" for k in range(100)] for n, (split, text) in enumerate(texts.items())}
    catalogue = ssv2_catalogue(ssv2, splits=write_lists(tmp_path / "cmn", lists, "{}list03.txt"))
    assert catalogue.dataset.name == "ssv2-small"
    assert catalogue.dataset.classes == ("Lifting (up) something", "Poking a hole")
    assert catalogue.dataset.coverage == {"train": (12, 100), "test": (0, 100)}


@pytest.mark.parametrize(
    "names",
    [
        ("something-something-v2-train.json", "something-something-v2-validation.json"),
        ("train.json", "validation.json"),
    ],
)
def test_ssv2_labels_name_the_classes(ssv2: Path, tmp_path: Path, names: tuple[str, str]) -> None:
    splits = write_lists(tmp_path / "lists", NUMBERED)
    texts = {1: "Lifting [one]", 2: "Lifting [one]", 3: "Poking [a] into [b]", 5: "Tearing [x]"}
    catalogue = ssv2_catalogue(ssv2, splits=splits, labels=write_labels(tmp_path / "labels", names, texts))
    assert catalogue.dataset.classes == ("Lifting one", "Poking a into b", "Tearing x", "val00")
    assert catalogue.expected.missing[0].label == "Tearing x"
    wrong = write_labels(tmp_path / "labels", names, texts | {2: "Dropping [one]"})
    with pytest.raises(CatalogueError, match=r'class "train00" have several templates .*"Lifting one", "Dropping one"'):
        ssv2_catalogue(ssv2, splits=splits, labels=wrong)
    wrong = write_labels(tmp_path / "labels", names, texts | {5: "Lifting [one]"})
    with pytest.raises(CatalogueError, match='are both "Lifting one" by --labels'):
        ssv2_catalogue(ssv2, splits=splits, labels=wrong)
    with pytest.raises(CatalogueError, match=r"holds none of something-something-v2-train\.json"):
        ssv2_catalogue(ssv2, splits=splits, labels=tmp_path)


def test_epic(tmp_path: Path) -> None:
    folder = touch(
        tmp_path / "epic", [f"clips/{name}.MP4" for name in ("P01_11_0", "P01_11_1", "P02_03_10", "P02_03_2")]
    )
    lists = {
        "train": ["train32//clips_256/P01_11_0.MP4", "train8//clips_256/P01_11_1.MP4"],
        "test": ["test8//clips_256/P02_03_10.MP4"],
    }
    catalogue = epic_catalogue(folder, splits=write_lists(tmp_path / "lists", lists))
    assert [(video.label, video.group) for video in catalogue.videos] == [
        ("test08", "P02_03"),
        ("train08", "P01_11"),
        ("train32", "P01_11"),
    ]
    assert list(catalogue.dataset.splits) == ["train", "test"]


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["hmdb51"], ["data/hmdb51 is no folder; put HMDB51 there", "brush_hair/", "serre-lab"]),
        (["hmdb51", "--videos", "."], ["holds no folder of HMDB51's classes", "brush_hair/"]),
        (
            ["kinetics", "--videos", "."],
            ["100 few-shot classes (--classes all", "train/air_drumming/", "cvdfoundation"],
        ),
        (["kinetics", "--videos", ".", "--test-classes", "a"], ["go with --classes all"]),
        (["ssv2"], ["needs --splits", "splits/ssv2_CMN", "splits/ssv2_OTAM", "configs/projects/MoLo"]),
        (["ssv2", "--videos", "nowhere", "--splits", "lists"], ["put Something-Something V2 there", "220847.webm"]),
        (["ssv2", "--videos", ".", "--splits", "lists"], ['listed videos (such as "1") was found', "220847.webm"]),
        (["epic"], ["needs --splits", "hyrsmplusplus/epic_kitchens"]),
        (["epic", "--splits", "lists"], ["data/epic is no folder; put EPIC-Kitchens there", "clips_256/P01_11_0.MP4"]),
        (["ucf101", "--videos", ".", "--splits", "nowhere"], ["holds no clip of UCF101"]),
    ],
)
def test_what_is_expected_is_shown(
    args: list[str], parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lists(tmp_path / "lists", NUMBERED)
    with pytest.raises(FsarError) as refused:
        CliRunner().invoke(cli, [*args, "--out", "out"], catch_exceptions=False)
    assert all(part in str(refused.value) for part in parts), str(refused.value)
    assert not (tmp_path / "out").exists()


def lines_of(catalogue: Catalogue) -> str:
    return "\n".join(report(catalogue))


def test_the_report_of_a_long_table_shows_what_lacks(tmp_path: Path) -> None:
    lists = {
        "train": [f"train{c}/{100 * c + k}" for c in range(40) for k in range(20)],
        "test": [f"test{c}/{5000 + 100 * c + k}" for c in range(2) for k in range(20)],
    }
    held = [int(line.rpartition("/")[2]) for lines in lists.values() for line in lines]
    lost_names = ["train03/300", "train03/301", *(f"test01/{n}" for n in range(5100, 5120))]
    lost = {int(name.rpartition("/")[2]) for name in lost_names}
    folder = touch(tmp_path / "ssv2", [f"{n}.webm" for n in held if n not in lost])
    catalogue = ssv2_catalogue(folder, splits=write_lists(tmp_path / "lists", lists))
    assert lines_of(catalogue).splitlines() == [
        "ssv2-full: 818 videos in 41 of 42 classes",
        "  test01        0 of     20",
        "  train03      18 of     20",
        "  the other 40 classes: 20 videos each",
        "  split train: 40 of 40 classes, 798 of 800 videos (99.7%)",
        "  split test: 1 of 2 classes, 20 of 40 videos (50.0%); without a video: test01",
        f"  listed but not found: 22 videos ({', '.join(lost_names[:5])}, and 17 more)",
        "coverage: 818 of 840 expected videos (97.3%)",
    ]
    check_coverage(catalogue, 0.97)
    with pytest.raises(CatalogueError, match=r"818 of 840 .* 1 class has no video at all \(test01\)"):
        check_coverage(catalogue, 0.98)


def test_more_than_is_expected_hides_nothing(tmp_path: Path) -> None:
    """A split with too many videos does not make up for one with too few."""
    names = [f"train/busking/{n:011d}.mp4" for n in range(2600)]
    catalogue = kinetics_catalogue(touch(tmp_path, names))
    assert catalogue.dataset.coverage["test"] == (2600, 2400)
    assert share(catalogue) == 0.24
    assert "split test: 1 of 24 classes, 2,600 of 2,400 videos" in lines_of(catalogue)
    assert "published lists name fewer" in lines_of(catalogue)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of UCF101, two clips each, and lists that name five."""
    folder = tmp_path_factory.mktemp("ucf101")
    for n, name in enumerate(("Archery_g01_c01", "Archery_g02_c01", "Diving_g01_c01", "Diving_g02_c01")):
        write_video(folder / "videos" / name.split("_")[0] / f"v_{name}.avi", moving_frames(n, 4, size=(48, 64)))
    lists = {
        "train": ["Archery/v_Archery_g01_c01", "Archery/v_Archery_g02_c01"],
        "test": ["Diving/v_Diving_g01_c01", "Diving/v_Diving_g02_c01", "Diving/v_Diving_g03_c01"],
    }
    write_lists(folder / "lists", lists, "{}list03.txt")
    return folder


def invoke(clips: Path, out: Path, *args: object) -> Result:
    options = ["ucf101", "--videos", clips / "videos", "--out", out, "--size", 64, "--motion", "none", "--workers", 1]
    return CliRunner().invoke(cli, [str(arg) for arg in (*options, *args)])


def test_too_little_is_refused_before_anything_is_decoded(clips: Path, tmp_path: Path) -> None:
    out, lost = tmp_path / "out", tmp_path / "lost.txt"
    refused = invoke(clips, out, "--splits", clips / "lists", "--unmatched", lost)
    assert isinstance(refused.exception, CatalogueError)
    assert "4 of 5 expected videos (80.0%), less than --min-coverage 0.95" in str(refused.exception)
    assert "lowest: Diving 2 of 3, Archery 2 of 2; add" in str(refused.exception)
    assert "--allow-missing" in str(refused.exception)
    assert "split test: 1 of 1 classes, 2 of 3 videos (66.6%)" in refused.stdout
    assert lost.read_text() == "test\tDiving\tv_Diving_g03_c01\n"
    tried = invoke(clips, out, "--splits", clips / "lists", "--dry-run")
    assert tried.exit_code == 0
    assert "warning: ucf101 is not complete: 4 of 5" in tried.stderr
    assert not out.exists()


def test_coverage_is_stored_and_follows_the_videos(clips: Path, tmp_path: Path) -> None:
    """It is in the data set's file; a run with other lists or more files changes it and no tar."""
    out = tmp_path / "out"
    done = invoke(clips, out, "--allow-missing")
    assert done.exit_code == 0, done.stderr
    assert f"next: fsar-train --shards {out} --method molo --trunk-weights FILE\n" in done.stdout
    assert "99 classes of its splits have no video" in done.stdout
    with ShardSet.open(out) as shards:
        assert shards.dataset.coverage == {"train": (2, 9154), "val": (0, 1421), "test": (2, 2745)}
    tars = stamps(out, "*.tar")
    before = stamps(out, "**/*")
    assert invoke(clips, out, "--min-coverage", 0).exit_code == 0
    assert stamps(out, "**/*") == before
    assert invoke(clips, out, "--splits", clips / "lists", "--min-coverage", 0.8).exit_code == 0
    assert stamps(out, "*.tar") == tars
    with ShardSet.open(out) as shards:
        assert shards.dataset.coverage == {"train": (2, 2), "test": (2, 3)}
    whole = clips / "videos" / "Diving" / "v_Diving_g03_c01.avi"
    write_video(whole, moving_frames(9, 4, size=(48, 64)))
    try:
        assert invoke(clips, out, "--splits", clips / "lists").exit_code == 0
    finally:
        whole.unlink()
    with ShardSet.open(out) as shards:
        assert shards.dataset.coverage == {"train": (2, 2), "test": (3, 3)}


def test_a_data_set_without_coverage_is_as_before(tmp_path: Path) -> None:
    dataset = Dataset("d", ("a",))
    assert "coverage" not in dataset.to_json()
    (tmp_path / "dataset.json").write_text(json.dumps(dataset.to_json() | {"coverage": {"train": [1]}}))
    with pytest.raises(FsarError, match="is damaged"):
        Dataset.load(tmp_path / "dataset.json")


def test_real_clips(real_data: Path, tmp_path: Path) -> None:
    """A part of UCF101 as a user has it: the report, then one sentence."""
    done = command_line("ucf101", "--videos", real_data / "clips" / "ucf101", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "  Punch               12\n" in done.stdout
    assert done.stdout.endswith("coverage: 28 of 13,320 expected videos (0.2%)\n")
    assert done.stderr.startswith("error: ucf101 is not complete: 28 of 13,320 expected videos")
    assert "97 classes have no video at all" in done.stderr
    assert done.stderr.count("\n") == 1
