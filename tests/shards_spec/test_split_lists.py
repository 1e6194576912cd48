"""Test split lists: every form of the field, hashes, published lists, leakage, commands."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from shards_spec import ShardError, ShardSet
from shards_spec.cli.splits import splits
from shards_spec.splits.lists import parse_line
from shards_spec.splits.published import published_lists, recognise
from shards_spec.splits.sets import leakage, load_split_set
from shards_spec.splits.shipped import NAMES, Entry, class_key, read_lists, shipped, shipped_names

Content = dict[str, dict[str, list[str]]]  # split -> class -> stems
CONTENT: Content = {
    "train": {"Archery": ["v_a [1]. b", "v_b.c"], "ski jumping": ["-x_1", "12"]},
    "val": {"Yo Yo": ["y.z"]},
    "test": {"hurling_(sport)": ["AbCdEfGhIjK_000001_000011"], "Surfing": ["51958", "s"]},
}


def text(line: Callable[[str, int, str, str], str], pattern: str) -> Callable[[Path, Content], None]:
    """Return a writer of text lists; `line` gets split, class number, class, stem."""

    def write(folder: Path, content: Content) -> None:
        for split, classes in content.items():
            lines = [line(split, n, c, stem) for n, (c, stems) in enumerate(classes.items()) for stem in stems]
            (folder / pattern.format(split)).write_text("\r\n".join(lines), encoding="utf-8", newline="")

    return write


def kinetics_csv(folder: Path, content: Content) -> None:
    table = io.StringIO()
    rows = [(label, stem, "", "", split) for split, c in content.items() for label, s in c.items() for stem in s]
    csv.writer(table).writerows([("label", "youtube_id", "time_start", "time_end", "split"), *rows])
    (folder / "k100.csv").write_text(table.getvalue(), encoding="utf-8")


def one_json(folder: Path, content: Content) -> None:
    (folder / "splits.json").write_text(json.dumps(content))


def split_jsons(folder: Path, content: Content) -> None:
    for split, classes in content.items():
        names = [f"{label}/{stem}.MKV" for label, stems in classes.items() for stem in stems]
        (folder / f"{split}.json").write_text(json.dumps(names))


WITH_NAMES = {
    "few_shot": text(lambda s, n, c, v: f"{s}{n}//videos/{c}/{v}.avi", "{}_few_shot.txt"),
    "few_shot deep": text(lambda s, n, c, v: f"{s}{n}//{s}_256/{c}/{v}.MP4", "{}_few_shot.txt"),
    "Class/stem": text(lambda _s, _n, c, v: f"{c}/{v}.webm", "{}list03.txt"),
    "official": text(lambda _s, n, c, v: f"{c}/{v}.avi {n + 1}", "{}list01.txt"),
    "csv": kinetics_csv,
    "json": one_json,
    "json a split": split_jsons,
}
NUMBERS_ONLY = {
    "SSv2": text(lambda s, n, _c, v: f"{s}{n}/{v}", "{}_few_shot.txt"),
    "OTAM": text(lambda s, n, _c, v: f"{s}{n}/{v}", "{}list07.txt"),
    "EPIC": text(lambda s, n, _c, v: f"{s}{n}//clips_256/{v}.MP4", "{}_few_shot.txt"),
}


def write(folder: Path, form: str, content: Content = CONTENT) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (WITH_NAMES | NUMBERS_ONLY)[form](folder, content)
    return folder


def as_content(lists: dict[str, tuple[Entry, ...]]) -> dict[str, dict[str | int | None, list[str]]]:
    found: dict[str, dict[str | int | None, list[str]]] = {}
    for split, entries in lists.items():
        for entry in entries:
            key = entry.number if entry.label is None else entry.label
            found.setdefault(split, {}).setdefault(key, []).append(entry.stem)
    return found


# Words of file names.  A stem has no video extension and no blanks at its ends: lists are stripped.
words = st.text(st.characters(codec="utf-8", exclude_characters="/", exclude_categories=["C", "Z"]), min_size=1)
stems = st.builds(" ".join, st.lists(words, min_size=1, max_size=2)).map(lambda s: f"{s}_")
labels = st.builds(" ".join, st.lists(words.filter(lambda w: not w.isdigit()), min_size=1, max_size=2)).map(
    "c{}".format
)


@st.composite
def contents(draw: st.DrawFn) -> Content:
    names = draw(st.lists(labels, min_size=4, max_size=7, unique_by=class_key))
    videos = draw(st.lists(stems, min_size=len(names), max_size=12, unique=True))
    content: Content = {"train": {}, "val": {}, "test": {}}
    for n, name in enumerate(names):
        content[NAMES[n % 3]][name] = videos[n :: len(names)]
    return content


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(content=contents(), form=st.sampled_from([*WITH_NAMES, *NUMBERS_ONLY]))
@example(CONTENT, "few_shot")
@example(CONTENT, "EPIC")
def test_written_is_read(content: Content, form: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        found = as_content(read_lists(write(Path(name), form, content)))
    if form in NUMBERS_ONLY:
        assert found == {split: dict(enumerate(classes.values())) for split, classes in content.items()}
    else:
        assert found == content


@pytest.mark.parametrize(
    ("line", "entry"),
    [
        ("train0//videos/Archery/v_x.avi", Entry("videos/Archery/v_x.avi", "Archery", 0)),
        ("train12/51958", Entry("51958", None, 12)),
        ("train32//clips_256/P01_11_0.MP4", Entry("clips_256/P01_11_0.MP4", "clips_256", 32)),
        ("12/51958", Entry("51958", None, 12)),
        ("train//Archery/v_x", Entry("Archery/v_x", "Archery", None)),
        ("train/v_x", Entry("train/v_x", "train", None)),  # a class of trains
        ("Archery/v_x.avi 1", Entry("Archery/v_x.avi", "Archery", None)),
        ("ski jumping/a b.c 1", Entry("ski jumping/a b.c 1", "ski jumping", None)),
    ],
)
def test_lines(line: str, entry: Entry) -> None:
    assert parse_line(line, "list", "train") == entry


@pytest.mark.parametrize("name", ["a.avi", "a.MKV", "x/a.webm", "x/y/a.mp4", "a"])
def test_known_extensions_alone_are_cut(name: str) -> None:
    assert Entry(name, None, None).stem == "a"
    assert Entry(f"{name}.v1.[2] (3)", None, None).stem.endswith(".v1.[2] (3)")


LINES = st.sampled_from(
    ["train0//v/A/x.avi", "train1/51958", "A b/x", "A/x.avi 1", "[{'a': 1}]", "label,youtube_id,split"]
)


@given(line=LINES, cut=st.integers(0, 30), put=st.text(max_size=6), file=st.sampled_from(["txt", "csv", "json"]))
@example("", 0, '{"train":' * 20_000, "json")
@example("", 0, '{"train": ["\\ud800/b"]}', "json")
@example("label,youtube_id,split\nA,x,train,more,values", 45, "", "csv")
@example("label,youtube_id,time_start,split\nA,x,inf,train", 45, "", "csv")
def test_damaged_lists_raise_nothing_else(line: str, cut: int, put: str, file: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / ("train_few_shot.txt" if file == "txt" else f"all.{file}")
        path.write_bytes((line[:cut] + put + line[cut:]).encode("utf-8", "surrogatepass"))
        try:
            lists = read_lists(Path(name))
        except ShardError:
            return
    entries = [entry for listed in lists.values() for entry in listed]
    assert entries
    assert all(entry.stem and (entry.label or entry.number is not None or file == "json") for entry in entries)


def refuse(folder: Path, match: str, **files: str | bytes) -> None:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        stem, _, ending = name.rpartition("_")
        (folder / f"{stem}.{ending}").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ShardError, match=match) as error:
        read_lists(folder)
    assert "\n" not in str(error.value)


def test_lists_that_are_refused(tmp_path: Path) -> None:
    refuse(tmp_path / "a", "holds no split lists")
    refuse(tmp_path / "b", 'trainlist03.txt, line 3: cannot read "lonely"', trainlist03_txt="A/x\n\nlonely\n")
    refuse(tmp_path / "c", "no text file in UTF-8", trainlist03_txt=b"A/\xff")
    refuse(tmp_path / "d", "several lists of train", trainlist03_txt="A/x", train_few_shot_txt="train0//A/x")
    refuse(tmp_path / "e", 'line 2: "x" of train stands in .*line 1 already', trainlist03_txt="A/x.avi\nA/x.mp4")
    refuse(tmp_path / "f", 'line 1: "7" of test stands in', train_few_shot_txt="train0/7", test_few_shot_txt="test0/7")
    refuse(tmp_path / "g", "list of val holds no video", trainlist03_txt="A/x", vallist03_txt="\n")
    refuse(tmp_path / "h", "is of test, but stands in a list of train", train_few_shot_txt="test0//A/x")
    refuse(tmp_path / "i", "lacks the columns label, split", all_csv="youtube_id\nx")
    refuse(tmp_path / "m", "line 2: a row of val in a list of train", train_csv="label,youtube_id,split\nA,x,validate")
    refuse(tmp_path / "j", "a key stands there twice", all_json='{"train": {"A": ["x"], "A": ["y"]}}')
    refuse(tmp_path / "k", '"training" is no split', all_json='{"training": ["A/x"]}')
    refuse(tmp_path / "l", "several tables", a_json="{}", b_csv="")


def test_official_lists_are_no_few_shot_split(tmp_path: Path) -> None:
    lists = {"trainlist01_txt": "Archery/v_1.avi 1\nYoYo/v_2.avi 2", "testlist01_txt": "Archery/v_3.avi\nYoYo/v_4.avi"}
    refuse(tmp_path / "ucf", '2 classes stand in both train and test, such as "Archery".*few-shot split has', **lists)
    more = {"trainlist02_txt": "Archery/v_1.avi 1", "classInd_txt": "1 Archery"}
    refuse(tmp_path / "ucf", "several lists of train.*few-shot split has", **more)
    refuse(tmp_path / "hmdb", "HMDB51's official lists", run_test_split1_txt="a.avi 1")


def test_kinetics_table(tmp_path: Path) -> None:
    table = 'label,youtube_id,time_start,time_end,split\nski jumping,AbCdEfGhIjK,7,17.0,train\n"a, b",-x,,,validate\n'
    (tmp_path / "k.csv").write_text(table)
    expected = {
        "train": (Entry("AbCdEfGhIjK_000007_000017", "ski jumping", None),),
        "val": (Entry("-x", "a, b", None),),
    }
    assert read_lists(tmp_path) == read_lists(tmp_path / "k.csv") == expected


def test_hashes_know_no_form(tmp_path: Path) -> None:
    backwards = {s: {c: v[::-1] for c, v in reversed(classes.items())} for s, classes in CONTENT.items()}
    shown = [load_split_set(str(write(tmp_path / form, form))) for form in [*WITH_NAMES, *NUMBERS_ONLY]]
    shown += [load_split_set(str(write(tmp_path / "backwards" / form, form, backwards))) for form in WITH_NAMES]
    assert len({one.videos_sha256 for one in shown}) == 1
    assert {one.classes_sha256 for one in shown} - {None} == {shown[0].classes_sha256}
    assert [one.classes_sha256 for one in shown].count(None) == len(NUMBERS_ONLY)
    other = {split: {c: [f"{v}'" for v in stems] for c, stems in classes.items()} for split, classes in CONTENT.items()}
    changed = load_split_set(str(write(tmp_path / "other", "json", other)))
    assert changed.videos_sha256 != shown[0].videos_sha256
    assert changed.classes_sha256 == shown[0].classes_sha256


def test_class_texts_of_one_class() -> None:
    assert len({class_key(text) for text in ("ski jumping", "ski_jumping", "SkiJumping")}) == 1


def test_shipped() -> None:
    sizes = {name: [len(shipped(name).splits[split]) for split in NAMES] for name in shipped_names()}
    assert sizes == {"ucf101": [70, 10, 21], "hmdb51": [31, 10, 10], "kinetics100": [64, 12, 24]}
    for name, count in (("ucf101", 101), ("hmdb51", 51), ("kinetics100", 100)):
        assert len({class_key(label) for labels in shipped(name).splits.values() for label in labels}) == count
    with pytest.raises(ShardError, match='did you mean "hmdb51"'):
        shipped("hmdb")
    for known in published_lists():
        for split, names in known.labels.items():
            assert len(names) == known.sizes[split][0]


def published_copy(name: str, stem: Callable[[int], str]) -> Content:
    """Make a list with the facts of a published one: its classes, its numbers of videos."""
    known = next(one for one in published_lists() if one.name == name)
    content: Content = {}
    count = 0
    for split, (classes, videos) in known.sizes.items():
        least, most = known.videos_a_class[split]
        each, more = divmod(videos - least - most, classes - 2)
        sizes = [least, most, *(each + (n < more) for n in range(classes - 2))]
        content[split] = {}
        for label, size in zip(known.labels.get(split, map(str, range(classes))), sizes, strict=True):
            content[split][label] = [stem(n) for n in range(count, count + size)]
            count += size
    return content


def kinetics_stem(untimed: int) -> Callable[[int], str]:
    return lambda n: f"{n:011d}" if n < untimed else f"{n:011d}_000010_000020"


def fits(folder: Path) -> list[str]:
    return [fit.sentence for fit in recognise(load_split_set(str(folder)))]


def test_published_lists_are_recognised(tmp_path: Path) -> None:
    def found(form: str, content: Content) -> list[str]:
        return fits(write(Path(tempfile.mkdtemp(dir=tmp_path)), form, content))

    molo, cmn, neither = (published_copy("k100-molo", kinetics_stem(untimed)) for untimed in (579, 0, 12))
    assert [fit.split(" (")[0] for fit in found("few_shot deep", molo)] == ["k100-molo"]
    assert [fit.split(" (")[0] for fit in found("Class/stem", cmn)] == ["k100-cmn"]
    assert found("json", neither) == [
        "like k100-cmn, but 12 names without times where it has 0",
        "like k100-molo, but 12 names without times where it has 579",
    ]
    ssv2 = published_copy("ssv2-small-cmn", str)
    assert [fit.split(" (")[0] for fit in found("SSv2", ssv2)] == ["ssv2-small-cmn"]
    full = published_copy("ssv2-full-otam", str)
    assert [fit.split(" (")[0] for fit in found("OTAM", full)] == ["ssv2-full-otam"]
    ucf = published_copy("ucf101-arn", "v_{}".format)
    assert [fit.split(" (")[0] for fit in found("few_shot", ucf)] == ["ucf101-arn"]
    ucf["test"].popitem()
    assert found("few_shot", ucf) == []
    hmdb = published_copy("hmdb51-arn", "{}".format)
    hmdb["train"]["wave"].pop()
    assert found("csv", {s: hmdb[s] for s in ("train", "val")}) == [
        "like hmdb51-arn, but without a list of test; 4,279 of 4,280 videos in train"
    ]
    assert found("few_shot", CONTENT) == []


def test_leakage_of_one_family_into_another(tmp_path: Path) -> None:
    small: Content = {"train": {"a": ["1", "2"]}, "val": {"b": ["3"]}, "test": {"c": ["4", "5"], "d": ["6", "7"]}}
    full: Content = {"train": {"x": ["4", "6", "9"], "y": ["7"]}, "val": {"z": ["5"]}, "test": {"w": ["8", "1"]}}
    a, b = (load_split_set(str(write(tmp_path / n, "SSv2", c))) for n, c in (("small", small), ("full", full)))
    found = {(o.fitted[1], o.tested[0], o.what): o for o in leakage(b, a) if o.fitted[0] != o.tested[0]}
    assert found["train", a.name, "videos"].names == ("4", "6", "7")
    assert found["train", a.name, "videos"].share == 3 / 4
    assert found["val", a.name, "videos"].names == ("5",)
    assert found["train", b.name, "videos"].names == ("1",)
    assert found["val", b.name, "videos"].names == ()
    assert all(overlap.names is None for key, overlap in found.items() if key[2] == "classes")


def test_leakage_by_youtube_id_and_by_class(tmp_path: Path) -> None:
    a = write(tmp_path / "a", "few_shot", {"train": {"ski_jumping": ["AbCdEfGhIjK"]}, "test": {"busking": ["q"]}})
    b = write(tmp_path / "b", "csv", {"train": {"x": ["y"]}, "test": {"Ski jumping": ["AbCdEfGhIjK_000001_000011"]}})
    shared = [o for o in leakage(load_split_set(str(a)), load_split_set(str(b))) if o.names]
    assert [(o.what, o.names) for o in shared] == [
        ("videos", ("AbCdEfGhIjK_000001_000011",)),
        ("classes", ("Ski jumping",)),
    ]


def test_stems_that_repeat_tell_a_video_with_their_class_alone(tmp_path: Path) -> None:
    a = write(tmp_path / "a", "few_shot", {"train": {"a": ["1"], "b": ["1"]}, "test": {"c": ["1"]}})
    b = write(tmp_path / "b", "few_shot", {"train": {"d": ["1"]}, "test": {"B": ["1"], "e": ["1"]}})
    shared = [(o.what, o.fitted[1], o.names) for o in leakage(*(load_split_set(str(p)) for p in (a, b))) if o.names]
    assert shared == [("videos", "train", ("1",)), ("classes", "train", ("B",))]
    numbers = load_split_set(str(write(tmp_path / "c", "SSv2", {"train": {"x": ["1"]}, "test": {"y": ["2"]}})))
    with pytest.raises(ShardError, match="can be compared"):
        leakage(load_split_set(str(a)), numbers)


def run(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(splits, [str(arg) for arg in args])
    return result.exit_code, result.output


def test_show_and_list(tmp_path: Path) -> None:
    code, output = run("show", write(tmp_path, "few_shot"))
    assert code == 0
    assert output.splitlines()[1].split()[:6] == ["train", "2", "4", "2", "/", "2"]
    assert output.splitlines()[-1].startswith("fits no published list")
    shown = json.loads(run("show", tmp_path, "--json")[1])
    assert len(shown["splits"]["test"]["videos_sha256"]) == 64
    assert shown["splits"]["test"]["videos_a_class"] == {"least": 1, "median": 2, "most": 2}
    shown = run("show", "kinetics100")[1].splitlines()
    assert [line.split(" (")[0] for line in shown if "fits" in line] == ["fits k100-cmn", "fits k100-molo"]
    assert all("class names, videos not compared" in line for line in shown[-2:])
    listed = run("list")[1]
    assert all(name in listed for name in [*shipped_names(), *(known.name for known in published_lists())])
    assert {split["source"] for split in json.loads(run("list", "--json")[1])["ships"]} == set(shipped_names())


def test_check_tells_by_its_exit_code(tmp_path: Path) -> None:
    other: Content = {"train": {"Surfing": ["51958"]}, "test": {"new": ["n"]}}
    a, b = write(tmp_path / "a", "few_shot"), write(tmp_path / "b", "few_shot", other)
    code, output = run("check", a, b)
    assert (code, "test: videos 1 of 3 shared (33.3%): 51958" in output) == (3, True)
    assert run("check", a, a) == run("check", a, a)
    assert run("check", a, a)[0] == 0
    code, output = run("check", "ucf101", "hmdb51")
    assert (code, "classes 1 of 10 shared (10.0%): fencing" in output) == (3, True)
    code, output = run("check", "kinetics100", b)
    assert (code, output.splitlines()[-1]) == (0, "clean as far as it can be compared (not everywhere: videos)")
    found = json.loads(run("check", a, b, "--json")[1])
    assert (found["clean"], sum(overlap["shared"] or 0 for overlap in found["overlaps"])) == (False, 2)


def test_shard_set_is_a_split_too(tiny_shards: ShardSet) -> None:
    listed = load_split_set(str(tiny_shards.path))
    for name, part in listed.parts.items():
        assert part.num_videos == len(tiny_shards.split_rows(name))
        assert set(part.labels or ()) <= set(tiny_shards.dataset.splits[name].classes)
    assert run("check", tiny_shards.path, "ucf101")[0] == 0


def test_a_name_that_is_nothing() -> None:
    with pytest.raises(ShardError, match=r'ucf10 is no folder of lists .* did you mean "ucf101"'):
        splits.main(["show", "ucf10"], standalone_mode=False)
