"""The stage videos -> shards: the same bytes whatever happens, or one sentence with the reason."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path

import cv2
import pytest
from click.testing import CliRunner
from folders import ROOT, command_line, digests, stamps
from videos import moving_frames, write_video

from preprocess.cli import cli
from preprocess.datasets.folder import folder_catalogue
from preprocess.decode import Geometry, Planes, VideoReader
from preprocess.encode import series as encode
from preprocess.plan import usual_rows
from preprocess.stage import Settings, preprocess
from preprocess.workers import job
from shards_spec import ShardError, ShardSet
from shards_spec.errors import FsarError
from shards_spec.files import only_writer, sweep
from shards_spec.schema import Failure, Plan
from shards_spec.verify import verify


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, seven videos; one of them is damaged."""
    folder = tmp_path_factory.mktemp("seven")
    for n in range(6):
        write_video(folder / "ab"[n // 3] / f"video {n}.mp4", moving_frames(n, 10, size=(48, 64)))
    (folder / "b" / "broken.avi").write_text("no video")
    return folder


def run(videos: Path, out: Path, **options: object) -> list[Failure]:
    settings = {"rows_per_shard": 3, "workers": 2} | options
    return preprocess(folder_catalogue(videos), out, Settings(Geometry(64, 64), **settings))


@pytest.fixture(scope="module")
def expected(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of every file of an undisturbed run with one worker."""
    out = tmp_path_factory.mktemp("expected") / "set"
    assert [f.reason for f in run(videos, out, workers=1)] == ["not-a-video"]
    assert verify(out) == []
    return digests(out)


def cli_options(videos: Path, out: Path) -> list[object]:
    return ["folder", "--videos", videos, "--out", out, "--size", 64, "--rows-per-shard", 3, "--workers", 2]


def test_workers_locale_umask_and_cpu_do_not_matter(videos: Path, tmp_path: Path, expected: dict[str, str]) -> None:
    before = os.umask(0o077)
    try:
        other = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TZ": "Asia/Kathmandu"}
        slow = {"OPENCV_CPU_DISABLE": "AVX2", "OPENCV_IPP": "sse42", "JSIMD_FORCENONE": "1", "PYTHONHASHSEED": "7"}
        done = command_line(*cli_options(videos, tmp_path / "set"), **other, **slow)
    finally:
        os.umask(before)
    assert done.returncode == 3, done.stderr
    assert "1 videos failed (1 not-a-video)" in done.stderr
    assert digests(tmp_path / "set") == expected


def test_typed_again_it_touches_nothing(videos: Path, tmp_path: Path, expected: dict[str, str]) -> None:
    run(videos, tmp_path / "set")
    before = stamps(tmp_path / "set", "**/*")
    run(videos, tmp_path / "set")
    after = stamps(tmp_path / "set", "**/*")
    assert after == before
    assert digests(tmp_path / "set") == expected


CRASH = 9


def run_until(step: int, videos: Path, out: Path, **options: object) -> int:
    """Run in a child process that kills itself at its `step`-th call that makes a file durable."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        left = [step]

        def counted(call: Callable[..., object]) -> Callable[..., object]:
            def die_or_do(*args: object, **named: object) -> object:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **named)

            return die_or_do

        # The fork server of our parent serves us.
        forkserver.ensure_running = forkserver._forkserver.ensure_running = lambda: None
        os.fsync, os.replace = counted(os.fsync), counted(os.replace)
        run(videos, out, **options)
    finally:
        os._exit(1)


def test_killed_at_any_step_it_goes_on(videos: Path, tmp_path: Path, expected: dict[str, str]) -> None:
    run(videos, tmp_path / "warm")  # the fork server lives from here on
    draw = random.Random(11)
    for n in range(3):
        out, deaths = tmp_path / str(n), 0
        for _ in range(4):
            deaths += run_until(draw.randrange(30), videos, out) == -signal.SIGKILL
            if not (out / "index.zarr").exists():
                with pytest.raises(ShardError, match=r"unfinished|no shard set|no folder"):
                    ShardSet.open(out)
        assert deaths
        run(videos, out)
        assert digests(out) == expected


def test_a_file_that_goes_while_it_is_swept_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that outlives a killed run removes its own file at that moment."""
    (tmp_path / "rgb-000000.tar.7.tmp").touch()
    is_dir = Path.is_dir

    def gone(path: Path) -> bool:
        if path.suffix == ".tmp":
            path.unlink()
        return is_dir(path)

    monkeypatch.setattr(Path, "is_dir", gone)
    sweep(tmp_path)
    assert not list(tmp_path.iterdir())


def test_killed_at_any_moment_it_goes_on(videos: Path, tmp_path: Path, expected: dict[str, str]) -> None:
    out, draw = tmp_path / "set", random.Random()
    for _ in range(3):
        call = [sys.executable, "-m", "preprocess.cli", *map(str, cli_options(videos, out))]
        process = subprocess.Popen(call, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (out / "plan.json").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 3))
        process.kill()
        process.wait()
    run(videos, out)
    assert digests(out) == expected


def test_retried_equals_never_failed(videos: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(videos, tmp_path / "videos"))
    whole = write_video(tmp_path / "whole.avi", moving_frames(9, 10, size=(48, 64)))
    run(folder, tmp_path / "set")
    shutil.copy(whole, folder / "b" / "broken.avi")
    assert len(run(folder, tmp_path / "set")) == 1  # not without the option
    untouched = stamps(tmp_path / "set", "*-000000.*")
    assert run_until(9, folder, tmp_path / "set", retry_failed=True) == -signal.SIGKILL
    assert run(folder, tmp_path / "set", retry_failed=True) == []
    assert stamps(tmp_path / "set", "*-000000.*") == untouched
    assert run(folder, tmp_path / "fresh") == []
    assert digests(tmp_path / "set") == digests(tmp_path / "fresh")


def test_motion_added_later_touches_nothing_else(videos: Path, tmp_path: Path, expected: dict[str, str]) -> None:
    run(videos, tmp_path / "set", motion=())
    with ShardSet.open(tmp_path / "set") as shards, pytest.raises(ShardError, match="--motion flow"):
        shards.series("flow1")
    before = stamps(tmp_path / "set", "rgb-*") | stamps(tmp_path / "set", "[df]*.json*")
    run(videos, tmp_path / "set", motion=("flow",))
    run(videos, tmp_path / "set", motion=("diff",))
    run(videos, tmp_path / "set", motion=())
    assert stamps(tmp_path / "set", "rgb-*") | stamps(tmp_path / "set", "[df]a*.json*") == before
    assert digests(tmp_path / "set") == expected


def test_motion_of_a_video_that_is_gone_is_refused(videos: Path, tmp_path: Path, expected: dict[str, str]) -> None:
    folder = Path(shutil.copytree(videos, tmp_path / "videos"))
    run(folder, tmp_path / "set", motion=())
    (folder / "a" / "video 1.mp4").write_bytes(b"")
    with pytest.raises(ShardError, match=r"a/video 1.mp4 is stored but cannot be decoded now"):
        run(folder, tmp_path / "set")
    assert not list((tmp_path / "set").glob("*.tmp"))
    write_video(folder / "a" / "video 1.mp4", moving_frames(1, 13, size=(48, 64)))
    with pytest.raises(ShardError, match=r"1 videos of which the file changed between them"):
        run(folder, tmp_path / "set")
    for path in (tmp_path / "set").glob("*1-000000.tar"):
        path.unlink()
    shutil.copy(videos / "a" / "video 1.mp4", folder / "a" / "video 1.mp4")
    run(folder, tmp_path / "set")
    assert digests(tmp_path / "set") == expected


def test_a_catalogue_may_grow_at_its_end_only(videos: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(videos, tmp_path / "videos"))
    run(folder, tmp_path / "set", motion=("diff",))
    shutil.copy(folder / "a" / "video 1.mp4", folder / "b" / "wide.mp4")
    (folder / "c").mkdir()
    shutil.copy(folder / "a" / "video 2.mp4", folder / "c" / "first.mp4")
    untouched = stamps(tmp_path / "set", "*-00000[01].*")
    run(folder, tmp_path / "set", motion=("diff",))
    assert stamps(tmp_path / "set", "*-00000[01].*") == untouched
    run(folder, tmp_path / "fresh", motion=("diff",))
    assert digests(tmp_path / "set") == digests(tmp_path / "fresh")
    (folder / "a" / "video 1.mp4").rename(folder / "a" / "another.mp4")
    with pytest.raises(ShardError, match="made from other videos: the first 9 videos"):
        run(folder, tmp_path / "set", motion=("diff",))


@pytest.mark.parametrize(("many", "rows"), [(1, 8), (28, 8), (500, 16), (2_000, 63), (2_100, 64), (10**6, 64)])
def test_small_sets_have_several_shards(many: int, rows: int) -> None:
    assert usual_rows(many) == rows


def test_an_old_set_keeps_its_rows_per_shard(videos: Path, tmp_path: Path, expected: dict[str, str]) -> None:
    out = tmp_path / "set"
    run(videos, out)
    run(videos, out, rows_per_shard=0)
    assert digests(out) == expected
    run(videos, tmp_path / "new", rows_per_shard=0)
    assert Plan.load(tmp_path / "new" / "plan.json").rows_per_shard == usual_rows(7)


def test_another_plan_is_refused(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "set"
    run(videos, out, motion=("flow",))
    with pytest.raises(ShardError, match=r"flow1.geometry is '64x64', asked for 'short side 64'; rgb.geometry"):
        preprocess(folder_catalogue(videos), out, Settings(Geometry(short=64), rows_per_shard=3))
    with pytest.raises(ShardError, match="rows_per_shard is 3, asked for 4"):
        run(videos, out, rows_per_shard=4)
    with pytest.raises(ShardError, match="dataset is 'folder', asked for 'other'"):
        preprocess(folder_catalogue(videos, name="other"), out, Settings(Geometry(64, 64), rows_per_shard=3))
    monkeypatch.setattr(encode, "ffmpeg_version", lambda: "ffmpeg 4.1")
    with pytest.raises(ShardError, match=r"rgb.decoder is 'ffmpeg .*', asked for 'ffmpeg 4.1'"):
        run(videos, out, motion=())


def test_the_next_decoder_starts_before_its_turn(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Watched(VideoReader):
        def __init__(self, path: Path, *args: object, **named: object) -> None:
            events.append(f"start {path.stem[-1]}")
            super().__init__(path, *args, **named)

        def __iter__(self) -> Iterator[Planes]:
            events.append(f"read {self._path.stem[-1]}")
            return super().__iter__()

    monkeypatch.setattr(job, "VideoReader", Watched)
    catalogue = folder_catalogue(videos)
    classes = {"a": 0, "b": 1}
    work = job.Job(0, dict(enumerate(catalogue.videos[2:6])), classes, ("rgb",), tmp_path, Geometry(64, 64), 60)
    done = job.run_job(work, lambda _: None)
    assert events == ["start 2", "start n", "read 2", "start 3", "read n", "start 4", "read 3", "read 4"]
    assert [failure.reason for failure in done.failures] == ["not-a-video"]


def test_decoders_end_with_a_job_that_fails(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[VideoReader] = []

    class Watched(VideoReader):
        def __init__(self, *args: object, **named: object) -> None:
            super().__init__(*args, **named)
            started.append(self)

    monkeypatch.setattr(job, "VideoReader", Watched)
    catalogue = folder_catalogue(videos)
    work = job.Job(0, dict(enumerate(catalogue.videos[:3])), {"a": 0}, ("rgb",), tmp_path, Geometry(64, 64), 60)
    with pytest.raises(FsarError, match="stop here"):
        job.run_job(work, lambda _: stop())
    assert len(started) == 2
    assert all(reader._process.poll() is not None for reader in started)
    assert not list(tmp_path.iterdir())


def test_every_thread_of_a_job_is_steady(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: set[tuple[bool, bool]] = set()  # (in the main thread, IPP in use)

    class Watched(encode.FlowEncoder):
        def add(self, frame: Planes) -> None:
            settings.add((threading.current_thread() is threading.main_thread(), cv2.ipp.useIPP()))
            super().add(frame)

    monkeypatch.setattr(encode, "FlowEncoder", Watched)
    threads = cv2.getNumThreads()
    work = job.Job(
        0, {0: folder_catalogue(videos).videos[0]}, {"a": 0}, ("rgb", "flow1"), tmp_path, Geometry(64, 64), 60
    )
    job.run_job(work, lambda _: None)
    cv2.setNumThreads(threads)
    assert settings == {(False, False)}


def stop() -> None:
    raise FsarError("stop here")


def test_workers_do_not_import_the_program(videos: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "from pathlib import Path\n"
        "from preprocess.decode import Geometry\n"
        "from preprocess.datasets.folder import folder_catalogue\n"
        "from preprocess.stage import Settings, preprocess\n"
        f"with open({str(tmp_path / 'runs')!r}, 'a') as file: file.write('x')\n"
        f"catalogue = folder_catalogue(Path({str(videos)!r}))\n"
        f"preprocess(catalogue, Path({str(tmp_path / 'set')!r}), Settings(Geometry(64, 64)))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs").read_text() == "x"


def test_workers_start_without_pytorch() -> None:
    code = (
        "import sys, preprocess.workers.preload\n"
        "assert 'preprocess.workers.job' in sys.modules\n"
        "from webdataset import TarWriter\n"
        "assert 'torch' not in sys.modules\n"  # neither loaded nor hidden: an estimator may want it
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_two_runs_at_once_are_refused(videos: Path, tmp_path: Path) -> None:
    with only_writer(tmp_path), pytest.raises(FsarError, match="being written by another process"):
        run(videos, tmp_path)


def test_a_damaged_shard_is_made_again(videos: Path, tmp_path: Path, expected: dict[str, str]) -> None:
    out = tmp_path / "set"
    run(videos, out)
    tar = out / "diff1-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    (out / "rgb-000001.tar").unlink()
    run(videos, out)
    assert digests(out) == expected


def test_a_full_disk_is_one_sentence(videos: Path, tmp_path: Path, expected: dict[str, str]) -> None:
    """No file may pass 20 kB: the workers' writes fail as on a full disk."""
    out = tmp_path / "set"
    call = f'ulimit -f 20; exec "{sys.executable}" -m preprocess.cli "$@"'
    args = ["bash", "-c", call, "bash", *map(str, cli_options(videos, out))]
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "cannot write" in done.stderr
    assert "type the same command again: finished files are kept" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    assert not list(out.glob("*.tmp"))
    run(videos, out)
    assert digests(out) == expected


@pytest.mark.parametrize("step", [0, 3, 9, 20, 33])
def test_each_write_may_fail(
    videos: Path, tmp_path: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """The `step`-th fsync of the parent finds the disk full."""
    left, fsync = [step], os.fsync

    def full(handle: int) -> None:
        left[0] -= 1
        if left[0] == -1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FsarError, match=r"cannot write .*No space left on device \(\d+ MB free\)"):
        run(videos, tmp_path / "set")
    assert run(videos, tmp_path / "set")
    assert digests(tmp_path / "set") == expected


def test_ctrl_c_is_one_sentence(videos: Path, tmp_path: Path, expected: dict[str, str]) -> None:
    out = tmp_path / "set"
    call = [sys.executable, "-m", "preprocess.cli", *map(str, cli_options(videos, out))]
    # Background jobs of a shell ignore Ctrl-C, and so would what they start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        call, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    signal.signal(signal.SIGINT, before)
    while not list(out.glob("*-000000.tar.*")):  # the first shard: most of the work lies ahead
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to workers and the fork server too
    error = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert "interrupted; type the same command again to go on" in error
    assert "Traceback" not in error
    assert not list(out.glob("*.tmp"))
    run(videos, out)
    assert digests(out) == expected


def test_dry_run_writes_nothing(videos: Path, tmp_path: Path) -> None:
    args = [str(arg) for arg in cli_options(videos, tmp_path / "set")]
    result = CliRunner().invoke(cli, [*args, "--dry-run"], catch_exceptions=False)
    assert result.exit_code == 0
    assert "estimate from 6 of 7 videos" in result.output
    for name in ("decode", "rgb", "diff1", "flow1", "all"):
        assert f"\n  {name}" in result.output
    assert not (tmp_path / "set").exists()


def test_retrying_never_drops_a_video_that_is_stored(tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    for n in range(3):
        write_video(folder / "a" / f"{n}.mp4", moving_frames(n, 6))
    (folder / "a" / "1.mp4").write_bytes(b"not yet")
    assert [failure.row for failure in run(folder, tmp_path / "set")] == [1]
    before = digests(tmp_path / "set")
    (folder / "a" / "2.mp4").write_bytes(b"lost since")
    with pytest.raises(ShardError, match=r"a/2\.mp4 is stored but cannot be decoded now"):
        run(folder, tmp_path / "set", retry_failed=True)
    after = digests(tmp_path / "set")
    assert {name: value for name, value in before.items() if name.endswith(".tar")}.items() <= after.items()


def test_unfinished_files_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "set" / "precious.tmp").mkdir(parents=True)
    (tmp_path / "set" / "notes.tmp").write_text("keep")
    (tmp_path / "set" / "rgb-000000.tar.77.tmp").write_text("left by a killed run")
    write_video(tmp_path / "videos" / "a" / "0.mp4", moving_frames(0, 6))
    run(tmp_path / "videos", tmp_path / "set")
    assert (tmp_path / "set" / "precious.tmp").is_dir()
    assert {path.name for path in (tmp_path / "set").glob("*.tmp")} == {"precious.tmp", "notes.tmp"}
