"""The contact sheet: what it chooses, how it colours motion, and that any name fits on it."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from folders import shown
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFont
from videos import moving_frames, write_video

from preprocess.datasets.folder import folder_catalogue
from preprocess.decode import Geometry
from preprocess.stage import Settings, preprocess
from shards_spec import FsarError, ShardSet
from shards_spec.cli.console import run_command
from shards_spec.cli.peek import peek
from shards_spec.peek.peek import choose_rows, find_rows, flow_colours
from shards_spec.peek.sheet import GAP, HEIGHT, Block, Row, draw_sheet, png_bytes, printable, shorten
from shards_spec.pictures import decode_picture, flow_field, segment_centres

STEP = 4  # pixels a frame, of 96


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make shards with the aspect kept: a moving texture, a still one, a portrait, a broken file."""
    folder = tmp_path_factory.mktemp("mixed")
    frames = moving_frames(3, 12, size=(72, 96), step=STEP)
    write_video(folder / "in" / "a" / "left.mp4", frames)
    write_video(folder / "in" / "a" / "still.mp4", np.repeat(frames[:1], 12, axis=0))
    write_video(folder / "in" / "b" / "portrait.mp4", moving_frames(4, 2, size=(96, 48)))
    (folder / "in" / "b" / "broken.mp4").write_bytes(b"")
    failures = preprocess(folder_catalogue(folder / "in"), folder / "out", Settings(Geometry(short=256)))
    assert [failure.name for failure in failures] == ["b/broken.mp4"]
    return folder / "out"


def sheet_of(*args: object) -> np.ndarray:
    """Run the command; return its picture [h, w, 3]."""
    out = next(Path(str(value)) for option, value in pairwise(args) if option == "--out")
    CliRunner().invoke(peek, [str(arg) for arg in args], catch_exceptions=False)
    return np.asarray(Image.open(io.BytesIO(out.read_bytes()))).astype(int)


def refusal(*args: object) -> str:
    with pytest.raises(FsarError) as refused:
        CliRunner().invoke(peek, [str(arg) for arg in args], catch_exceptions=False)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_sheet_is_the_same_every_time(tiny_path: Path, tmp_path: Path) -> None:
    args = [tiny_path, "--videos", 3, "--frames", 4, "--out"]
    small = sheet_of(*args, tmp_path / "a.png")
    sheet_of(*args, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    large = sheet_of(tiny_path, "--videos", 4, "--frames", 8, "--out", tmp_path / "a.png")
    assert large.shape[0] - small.shape[0] > 3 * HEIGHT  # one more block of three series
    assert large.shape[1] > 8 * (HEIGHT + GAP)
    one = sheet_of(tiny_path, "--videos", 4, "--frames", 8, "--series", "flow1", "--out", tmp_path / "a.png")
    assert large.shape[0] - one.shape[0] > 4 * 2 * HEIGHT
    sheet_of(*args, tmp_path / "c.png", "--seed", 1)
    assert (tmp_path / "c.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_choice_is_spread_over_classes(tiny_shards: ShardSet) -> None:
    for seed in range(5):
        labels = tiny_shards.labels[choose_rows(tiny_shards, 10, seed=seed)]
        assert set(np.bincount(labels, minlength=7)) == {1, 2}
    assert len({tuple(choose_rows(tiny_shards, 7, seed=seed)) for seed in range(5)}) == 5
    assert len(choose_rows(tiny_shards, 100)) == 35
    assert {tiny_shards.name(row).split("/")[0] for row in choose_rows(tiny_shards, 9, split="val")} == {"dog", "eel"}
    assert {tiny_shards.name(row).split("/")[0] for row in choose_rows(tiny_shards, 3, classes=["bee"])} == {"bee"}


@given(total=st.integers(1, 2000), segments=st.integers(1, 40))
def test_frames_are_centres_of_equal_segments(total: int, segments: int) -> None:
    centres = segment_centres(total, segments)
    count = min(total, segments)
    exact = (np.arange(count) + 0.5) * total / count
    assert len(set(centres.tolist())) == count
    assert centres.tolist() == np.floor(exact).astype(int).tolist()


@pytest.mark.parametrize(
    ("direction", "colour"),
    [((1, 0), (255, 0, 0)), ((0, 1), (255, 234, 0)), ((-1, 0), (0, 197, 255)), ((0, -1), (103, 0, 255))],
)
def test_flow_colours(direction: tuple[int, int], colour: tuple[int, int, int]) -> None:
    full, half, beyond = (np.full((2, 3, 2), direction) * np.float32(length) for length in (5, 2.5, 9))
    assert flow_colours(full, 5.0)[0, 0].tolist() == list(colour)
    assert flow_colours(half, 5.0)[1, 2].tolist() == pytest.approx([(255 + c) / 2 for c in colour], abs=0.6)
    assert (flow_colours(beyond, 5.0) == flow_colours(full, 5.0)).all()
    assert (flow_colours(np.zeros((2, 3, 2)), 5.0) == 255).all()
    assert (flow_colours(full, 0.0) == 255).all()


def test_difference_shows_where_things_move(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moving, still = (shown(mixed, f"a/{name}.mp4", "diff1", monkeypatch).pictures for name in ("left", "still"))
    assert moving[11] is None  # the last frame has no successor
    assert all(picture.std() > 20 for picture in moving[:11])
    assert all(picture.std() < 6 and abs(picture.mean() - 128) < 3 for picture in still[:11])


def test_flow_shows_direction_and_speed(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left, still = (shown(mixed, f"a/{name}.mp4", "flow1", monkeypatch) for name in ("left", "still"))
    red, _, blue = np.median(np.stack(left.pictures[:11]), axis=(0, 1, 2))
    assert blue > 250
    assert red < 30  # cyan: to the left
    _, largest, full = (float(line.split()[-2]) if "px" in line else 0 for line in left.label)
    assert largest >= full == pytest.approx(STEP * 128 / 72, rel=0.1)  # in pixels of the field, which is 128 high
    assert still.label[-1] == "full at 0.5 px"  # a pixel of the frame, which is 256 high
    assert np.median(np.stack(still.pictures[:11])) > 245
    assert left.numbers == [*(f"{n} to {n + 1}" for n in range(11)), "11"]


def test_flow_is_in_pixels_of_the_stored_field(mixed: Path) -> None:
    """The index and a decoded field have one unit, though the frame has twice the field's pixels."""
    with ShardSet.open(mixed) as shards:
        series, row = shards.series("flow1"), find_rows(shards, ["a/left.mp4"])[0]
        fields = [
            flow_field(decode_picture(data, series.name, row), float(scale))
            for data, scale in zip(series.read(row, range(11)), series.scale(row), strict=True)
        ]
        first = int(series.columns["first"][row])
        magnitude = series.columns["magnitude"][first : first + 11]
    assert fields[0].shape == (128, 171, 2)
    lengths = [np.hypot(field[..., 0], field[..., 1]) for field in fields]
    assert [length.mean() for length in lengths] == pytest.approx(magnitude.tolist(), rel=0.02)
    assert np.median(fields[5][..., 0]) == pytest.approx(-STEP * 128 / 72, rel=0.1)


def test_sizes_mix(mixed: Path, tmp_path: Path) -> None:
    sheet = sheet_of(mixed, "--out", tmp_path / "s.png", "--frames", 2)
    assert sheet.shape[1] < 1000
    portrait = sheet_of(mixed, "--video", "b/portrait.mp4", "--series", "diff1", "--out", tmp_path / "s.png")
    assert portrait.shape[0] < 2 * HEIGHT + 60


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--class", "A"], 'has no class "A"; did you mean "a"? (known: a, b)'),
        (["--video", "left"], 'has no video "left"; did you mean "a/left.mp4"?'),
        (["--video", "a/lfet.mp4"], 'did you mean "a/left.mp4"?'),
        (
            ["--video", "a/left.mp4", "--video", "b/broken.mp4"],
            "failed in preprocessing and is not stored: not-a-video",
        ),
        (["--video", "a/left.mp4", "--class", "a"], "not both"),
        (["--split", "test"], 'has no split "test"'),
        (["--series", "rgb,flwo1"], 'did you mean "flow1"?'),
        (["--series", ","], "--series is empty"),
    ],
)
def test_refusals(mixed: Path, tmp_path: Path, args: list[str], expected: str) -> None:
    assert expected in refusal(mixed, "--out", tmp_path / "s.png", *args)
    assert list(tmp_path.iterdir()) == []


def test_targets_that_are_refused(mixed: Path, tmp_path: Path) -> None:
    assert "end the name with .png or .html" in refusal(mixed, "--out", tmp_path / "s.jpg")
    assert "there is no folder" in refusal(mixed, "--out", tmp_path / "no" / "s.png")
    (tmp_path / "d.png").mkdir()
    assert "is a folder" in refusal(mixed, "--out", tmp_path / "d.png")


def test_exit_code(mixed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["peek", str(mixed), "--out", "s.jpg"])
    with pytest.raises(SystemExit) as left:
        run_command(peek)
    assert left.value.code == 2
    assert (
        capsys.readouterr().err
        == 'error: --out "s.jpg": the sheet is a PNG picture or a page; end the name with .png or .html\n'
    )


def test_failed_videos_are_never_chosen(mixed: Path) -> None:
    with ShardSet.open(mixed) as shards:
        assert [shards.name(row) for row in choose_rows(shards, 9)] == ["a/left.mp4", "a/still.mp4", "b/portrait.mp4"]


def test_a_damaged_picture_is_named(mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards_spec.reader.Series.read", lambda _, __, positions: [b"no picture" for _ in positions])
    assert "is damaged" in refusal(mixed, "--out", tmp_path / "s.png")


@given(text=st.text(max_size=60) | st.binary(max_size=60).map(lambda data: data.decode("utf-8", "surrogateescape")))
def test_any_text_can_be_drawn(text: str) -> None:
    plain = printable(text)
    assert plain.isascii()
    assert plain.isprintable()
    font = ImageFont.load_default(15)
    assert font.getlength(shorten(plain, 100, font)) <= 100


def test_names() -> None:
    assert printable("Łódź été.avi") == "\\u0141odz ete.avi"
    assert printable(b"latin-\xe9\n.avi".decode("utf-8", "surrogateescape")) == "latin-\\xe9\\n.avi"
    font = ImageFont.load_default(15)
    cut = shorten("Class/" + "x" * 300 + "_g01.avi", 200, font)
    assert cut.startswith("Class/")
    assert cut.endswith("_g01.avi")
    sheets = [draw_sheet("t", ["s"], [Block(name, name, (64, 64), [Row(("rgb",), [None], ["0"])])])
              for name in ("short", "漢" * 300, "\udce9" * 300)]  # fmt: skip
    assert len({sheet.size for sheet in sheets}) == 1
    assert len({png_bytes(sheet) for sheet in sheets}) == 3
