"""Bad input of every kind gives one sentence and one reason, and no other file is opened."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from folders import command_line, flip_bit
from videos import moving_frames, write_video

from preprocess.cli import cli
from preprocess.datasets.folder import folder_catalogue
from preprocess.decode import Geometry, VideoError, VideoReader, ffmpeg_program
from preprocess.stage import Settings, preprocess
from shards_spec import FsarError, ShardSet
from shards_spec.schema import REASONS

FRAMES = moving_frames(0, 10, size=(48, 64))


def ffmpeg(*args: object) -> None:
    subprocess.run([ffmpeg_program(), "-nostdin", "-v", "error", "-y", *map(str, args)], check=True)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole videos of 10 frames, one in each container."""
    folder = tmp_path_factory.mktemp("good")
    write_video(folder / "v.avi", FRAMES)
    for name in ("v.mkv", "v.ts"):
        codec = ["-c:v", "mpeg2video"] if name == "v.ts" else ["-c", "copy"]
        ffmpeg("-i", folder / "v.avi", *codec, folder / name)
    ffmpeg("-i", folder / "v.avi", "-c", "copy", folder / "last.mp4")
    ffmpeg("-i", folder / "v.avi", "-c", "copy", "-movflags", "+faststart", folder / "first.mp4")
    return folder


def read(path: Path, time_limit: float = 60) -> tuple[int, tuple[int, int]]:
    """Return the number of frames and the source size."""
    with VideoReader(path, Geometry(64, 64), time_limit=time_limit) as reader:
        return sum(1 for _ in reader), reader.source_size


def reason(path: Path) -> str:
    with pytest.raises(VideoError) as failed:
        read(path)
    assert failed.value.reason in REASONS
    assert str(path.parent) not in failed.value.detail
    assert "0x" not in failed.value.detail
    assert "\n" not in failed.value.detail
    return failed.value.reason


@pytest.mark.parametrize("name", ["v.avi", "v.mkv", "v.ts", "first.mp4", "last.mp4"])
def test_whole_videos_are_read(good: Path, name: str) -> None:
    assert read(good / name) == (10, (48, 64))


def test_what_a_title_says_is_not_believed(good: Path, tmp_path: Path) -> None:
    title = "title=matches no streams [error] Stream #0:0: Video: 9x9"
    ffmpeg("-i", good / "v.avi", "-metadata", title, "-c", "copy", tmp_path / "v.mkv")
    assert read(tmp_path / "v.mkv") == (10, (48, 64))


@pytest.mark.parametrize(
    ("name", "part", "expected"),
    [
        ("v.avi", 0.6, {"truncated"}),
        ("v.avi", 0.1, {"truncated"}),
        ("first.mp4", 0.6, {"truncated"}),
        ("last.mp4", 0.6, {"truncated"}),
        ("v.mkv", 0.6, {"damaged", "no-frames"}),
    ],
)
def test_cut_short(good: Path, tmp_path: Path, name: str, part: float, expected: set[str]) -> None:
    data = (good / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(part * len(data))])
    assert reason(tmp_path / name) in expected


def test_rubbish(good: Path, tmp_path: Path) -> None:
    contents = {"empty.avi": b"", "text.avi": b"This is no video.\n" * 50, "noise.mp4": bytes(range(256)) * 20}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
        assert reason(tmp_path / name) == "not-a-video"
    (tmp_path / "folder.avi").mkdir()
    os.mkfifo(tmp_path / "pipe.avi")
    (tmp_path / "link.avi").symlink_to("nowhere.avi")
    for name in ("folder.avi", "pipe.avi", "link.avi", "missing.avi"):
        assert reason(tmp_path / name) == "unreadable"


def test_permission(good: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    shutil.copy(good / "v.avi", tmp_path / "v.avi").chmod(0)
    assert reason(tmp_path / "v.avi") == "unreadable"


def test_streams(tmp_path: Path) -> None:
    ffmpeg("-f", "lavfi", "-i", "sine=duration=0.3", tmp_path / "sound.mp4")
    assert reason(tmp_path / "sound.mp4") == "no-video-stream"
    ffmpeg("-f", "lavfi", "-i", "sine=duration=0.3", "-f", "lavfi", "-i", "testsrc=s=64x48:d=0.04", "-c:v", "mjpeg",
           "-disposition:v", "attached_pic", tmp_path / "cover.mp4")  # fmt: skip
    assert reason(tmp_path / "cover.mp4") == "no-video-stream"
    write_video(tmp_path / "one.mp4", FRAMES[:1])
    assert reason(tmp_path / "one.mp4") == "one-frame"
    assert read(write_video(tmp_path / "two.mp4", FRAMES[:2]))[0] == 2


def test_bit_rot(good: Path, tmp_path: Path) -> None:
    rotten = Path(shutil.copy(good / "v.avi", tmp_path / "rot.avi"))
    start = rotten.read_bytes().index(b"movi")
    for n in range(40):
        flip_bit(rotten, 8 * (start + 40 + 37 * n) + n % 8)
    assert reason(rotten) == "damaged"


def test_lists_that_name_other_files_open_nothing(good: Path, tmp_path: Path) -> None:
    other = shutil.copy(good / "v.ts", tmp_path / "secret.ts")
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{other}\n#EXT-X-ENDLIST\n"
    for name, text in {"list.avi": playlist, "concat.avi": f"ffconcat version 1.0\nfile {other.name}\n"}.items():
        (tmp_path / name).write_text(text)
        assert reason(tmp_path / name) == "not-a-video"


def test_time_limit(good: Path) -> None:
    with pytest.raises(VideoError, match="timeout"):
        read(good / "v.avi", time_limit=1e-4)


def test_a_long_side_that_no_jpeg_holds(tmp_path: Path) -> None:
    ffmpeg("-f", "lavfi", "-i", "color=s=2048x16:d=0.2", "-c:v", "ffv1", tmp_path / "wide.mkv")
    with (
        pytest.raises(VideoError, match="too-large"),
        VideoReader(tmp_path / "wide.mkv", Geometry(short=256), time_limit=60) as reader,
    ):
        list(reader)


NAMES = [
    "two words.avi", 'quo"te.avi', "it's.avi", "dots.in.name.avi", "é漢字.avi", "-dash.avi", "co:lon.avi", "%03d.avi",
    "back\\slash.avi", "(a)[b]{c}*?.avi", "x" * 200 + ".avi", b"latin-\xe9.avi", "UPPER.AVI",
]  # fmt: skip


def test_names(good: Path, tmp_path: Path) -> None:
    for name in NAMES:
        target = tmp_path / "in" / "-class 1.0%" / os.fsdecode(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(good / "v.avi", target)
    (tmp_path / "in" / "-class 1.0%" / "._two words.avi").write_bytes(b"what an archive leaves")
    broken = tmp_path / "in" / "broken"
    broken.mkdir()
    (broken / os.fsdecode(b"latin-\xe9.avi")).write_bytes(b"")
    done = command_line("folder", "--videos", tmp_path / "in", "--out", tmp_path / "out", "--size", 64)
    assert done.returncode == 3, done.stderr
    assert "1 videos failed (1 not-a-video)" in done.stderr
    assert "Traceback" not in done.stderr
    with ShardSet.open(tmp_path / "out", series=("rgb", "diff1", "flow1")) as shards:
        names = {shards.name(row).removeprefix("-class 1.0%/") for row in range(len(NAMES))}
        assert names == {os.fsdecode(name) for name in NAMES}
        assert shards.frames.tolist() == [10] * len(NAMES) + [0]
    assert command_line("info", tmp_path / "out", module="shards_spec.cli.shards").returncode == 0


def refusal(*args: object) -> str:
    """Return the sentence with which the command refuses, run in this process."""
    with pytest.raises(FsarError) as refused:
        CliRunner().invoke(cli, [str(arg) for arg in args], catch_exceptions=False)
    return str(refused.value)


def test_folders_that_are_refused(good: Path, tmp_path: Path) -> None:
    def folder(*args: object) -> str:
        return refusal("folder", "--videos", tmp_path / "in", "--out", tmp_path / "out", *args)

    assert "is no folder; name the folder of your videos with --videos" in folder()
    (tmp_path / "in" / "a").mkdir(parents=True)
    assert "holds no video (.3gp, .asf, .avi" in folder()
    shutil.copy(good / "v.avi", tmp_path / "in" / "a" / "v.avi")
    (tmp_path / "in" / "a" / "loop").symlink_to(tmp_path / "in")
    assert len(folder_catalogue(tmp_path / "in").videos) == 1
    assert "at least 2 must be held out" in folder("--holdout", 1)
    assert 'no modality "flwo"; did you mean "flow"?' in folder("--motion", "diff,flwo")
    assert "expected N or HxW" in folder("--size", "big")
    assert "even and of 32 to 4096" in folder("--size", "31")
    assert "is no regular expression" in folder("--group", "(")
    assert 'no class "b" among the videos' in folder("--train-classes", "b")
    assert "each choose the splits: give one of these" in folder("--train-classes", "a", "--holdout", 2)
    assert "share 1 classes" in folder("--train-classes", "a", "--test-classes", "a")
    assert 'no class "c0"' in folder("--train-classes", ",".join(f"c{n}" for n in range(300)))  # longer than a name
    shutil.copy(good / "v.mkv", tmp_path / "in" / "a" / "v.mkv")
    assert '2 videos of the name "v" (a/v.avi, a/v.mkv)' in folder()
    (tmp_path / "in" / "a" / "v.mkv").rename(tmp_path / "in" / "top.mkv")
    assert "top.mkv lies in no class folder: expected" in folder()
    assert not (tmp_path / "out").exists()
    (tmp_path / "in" / "top.mkv").unlink()
    (tmp_path / "file").write_text("")
    args = ["folder", "--videos", tmp_path / "in", "--out", tmp_path / "file"]
    assert "cannot write" in refusal(*args)


def test_nothing_stored_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "v.avi").write_text("text")
    with pytest.raises(FsarError, match=r"none of the 1 videos could be stored \(the first, a/v.avi: not-a-video"):
        preprocess(folder_catalogue(tmp_path), tmp_path / "out", Settings(Geometry(64, 64)))
    with pytest.raises(FsarError, match="unfinished"):
        ShardSet.open(tmp_path / "out")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["ufc101", "--out", "x"], 'did you mean "ucf101"?'),
        (["folder", "--out", "x", "--vidoes", "."], "Did you mean '--videos'?"),
        (["folder", "--out", "x"], "Missing option '--videos'"),
        (["folder", "--out", "x", "--videos", ".", "--workers", "0"], "'--workers'"),
        (["ucf101", "--out", "x"], "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi"),
    ],
)
def test_command_line_errors(args: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = command_line(*args)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert "ucf101" in args or done.stderr.count("\n") == 1


CORRUPT = {
    "audio_only.mp4": "no-video-stream",
    "directory_named.avi": "unreadable",
    "no_frames.avi": "no-frames",
    "one_frame.mp4": "one-frame",
    "text_renamed.avi": "not-a-video",
    "truncated_faststart.mp4": "truncated",
    "truncated_no_index.mp4": "truncated",
    "v_YoYo_bitrot_g01_c01.avi": "damaged",
    "v_YoYo_header_only_g01_c01.avi": "truncated",
    "v_YoYo_truncated_g01_c01.avi": "truncated",
    "zero_bytes.avi": "not-a-video",
}


def test_real_damaged_files(real_data: Path, good: Path, tmp_path: Path) -> None:
    (tmp_path / "in" / "b").mkdir(parents=True)
    (tmp_path / "in" / "a").symlink_to(real_data / "corrupt")
    shutil.copy(good / "v.avi", tmp_path / "in" / "b")
    failures = preprocess(
        folder_catalogue(tmp_path / "in", links=True),
        tmp_path / "out",
        Settings(Geometry(64, 64), workers=2, rows_per_shard=6),
    )
    assert {f.name.removeprefix("a/"): f.reason for f in failures} == CORRUPT
    lines = (tmp_path / "out" / "failures.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == list(range(11))
    assert str(tmp_path) not in "".join(lines)
