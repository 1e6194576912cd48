"""Workers that are killed, crash or hang: the shard is retried, the video named, the run whole."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
from folders import digests
from injector import in_child, resident
from videos import moving_frames, write_video

from preprocess.datasets.folder import folder_catalogue
from preprocess.decode import Geometry
from preprocess.stage import Settings, preprocess
from preprocess.workers import fork_server, pool
from preprocess.workers.job import Job, run_job
from preprocess.workers.retries import Retries, death_cause
from shards_spec import FsarError, ShardError, ShardSet
from shards_spec.schema import Failure
from shards_spec.verify import verify

# Faults of the process that computes the flow of a white video.
ESTIMATORS = """
import contextlib, ctypes, os, pathlib, signal, time
import numpy as np

def killed(before, after):
    return fall(before, lambda: os.kill(os.getpid(), signal.SIGKILL))

def crashed(before, after):
    return fall(before, lambda: ctypes.string_at(0))

def hung(before, after):
    return fall(before, lambda: time.sleep(1000))

def lonely(before, after):
    return fall(before, kill_decoders)

def kill_decoders():
    for status in pathlib.Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # others come and go
            if f"PPid:\\t{os.getpid()}\\n" in status.read_text():
                os.kill(int(status.parent.name), signal.SIGKILL)

def always(before, after):
    os._exit(3)

def fall(frame, how):
    if frame.mean() > 240:
        how()
    return np.zeros((32, 32, 2), np.float32)
"""


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five videos in two shards; the second video is white, and longer than its decoder's pipe."""
    folder = tmp_path_factory.mktemp("videos")
    for n in (0, 2, 3, 4):
        write_video(folder / "a" / f"{n}.mp4", moving_frames(n, 8, size=(48, 64)))
    write_video(folder / "a" / "1.mp4", np.full((300, 48, 64, 3), 255, np.uint8))
    return folder


@pytest.fixture
def estimators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module with the flow estimators of ESTIMATORS."""
    name = f"estimators_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(ESTIMATORS)
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


def make(videos: Path, out: Path, **options: object) -> list[Failure]:
    settings = {"motion": ("flow",), "rows_per_shard": 3, "workers": 2} | options
    return preprocess(folder_catalogue(videos), out, Settings(Geometry(64, 64), **settings))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("killed", "2 workers were lost at it: killed by SIGKILL (out of memory?)"),
        ("crashed", "2 workers were lost at it: killed by SIGSEGV"),
        ("hung", "2 workers were lost at it: silent for more than 1.5 s"),
        ("lonely", "2 workers were lost at it: the decoder was killed"),
    ],
)
def test_the_video_is_found_and_the_run_goes_on(
    videos: Path, tmp_path: Path, estimators: str, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    out = tmp_path / "set"
    options: dict[str, object] = {"flow_estimator": f"{estimators}:{name}"}
    if name == "hung":
        monkeypatch.setattr(pool, "GRACE", 1.5 - 2 * 300)
    failures = make(videos, out, **options)
    assert [(f.row, f.name, f.reason) for f in failures] == [(1, "a/1.mp4", "crash")]
    assert failures[0].detail.startswith(said)
    assert verify(out) == []
    assert not list(out.glob("*.tmp"))
    with ShardSet.open(out, series=("rgb", "flow1")) as shards:
        assert (shards.frames > 0).tolist() == [True, False, True, True, True]


def test_workers_that_die_at_every_video_end_the_run(videos: Path, tmp_path: Path, estimators: str) -> None:
    with pytest.raises(FsarError, match=r"workers die at every video, at last at a/.\.mp4 \(ended with exit code 3\)"):
        make(videos, tmp_path / "set", flow_estimator=f"{estimators}:always", workers=1)
    assert not list((tmp_path / "set").glob("*.tmp"))


def test_retries_name_the_video_at_which_two_workers_died() -> None:
    catalogue = {row: type("Video", (), {"name": f"v{row}"}) for row in (3, 4, 7)}
    retries = Retries(Job(1, catalogue, {}, ("rgb",), Path(), Geometry(64, 64), 60))
    assert retries.count_video()
    assert retries.count_death("once") is None
    assert not retries.count_video()  # reported before
    assert retries.count_video()
    assert retries.count_death("elsewhere") is None
    assert not retries.count_video()
    assert retries.count_death("again") == "v4"
    assert retries.job.fatal == {4: "2 workers were lost at it: again"}
    for _ in range(3):
        retries.count_video()
    assert retries.count_death("late") is None
    with pytest.raises(FsarError, match="lost at the end of shard 1"):
        [retries.count_video() for _ in range(3)], retries.count_death("late")
    assert death_cause(-11) == "killed by SIGSEGV"
    assert death_cause(-63) == "killed by signal 63"


def workers() -> list[int]:
    """Return the processes that our fork server started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            if f"PPid:\t{forkserver._forkserver._forkserver_pid}\n" in status.read_text():
                found.append(int(status.parent.name))
        except OSError:  # it ended
            continue
    return found


def with_a_worker_killed(videos: Path, out: Path, after: float) -> int:
    """Run while another thread kills one worker after some seconds; return how many it killed."""
    killed: list[int] = []

    def kill() -> None:
        alive = workers()
        if alive:
            os.kill(alive[0], signal.SIGKILL)
            killed.append(alive[0])

    timer = threading.Timer(after, kill)
    timer.start()
    try:
        make(videos, out, motion=("diff", "flow"))
    finally:
        timer.cancel()
        timer.join()
    return len(killed)


@pytest.fixture(scope="module")
def undisturbed(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], float]:
    """Digests of a run without faults, and its seconds."""
    out = tmp_path_factory.mktemp("undisturbed")
    make(videos, out / "warm", motion=("diff", "flow"))
    began = time.monotonic()
    make(videos, out / "set", motion=("diff", "flow"))
    return digests(out / "set"), time.monotonic() - began


def kill_workers(videos: Path, tmp_path: Path, undisturbed: tuple[dict[str, str], float], *, kills: int) -> None:
    expected, seconds = undisturbed
    draw, done = random.Random(7), 0
    for _ in range(10 * kills):
        done += with_a_worker_killed(videos, tmp_path / "set", draw.uniform(0, 0.8 * seconds))
        assert digests(tmp_path / "set") == expected
        shutil.rmtree(tmp_path / "set")
        if done >= kills:
            return
    raise AssertionError(f"only {done} workers were there to be killed")


def kill_runs(videos: Path, tmp_path: Path, undisturbed: tuple[dict[str, str], float], *, kills: int) -> int:
    """Kill runs at random moments, five times on each folder; return how many came out whole."""
    expected, seconds = undisturbed
    draw, out, folders = random.Random(8), tmp_path / "set", 0
    for done in range(1, kills + 1):
        kill_run(videos, out, draw.uniform(0, seconds))
        check_whole(out, expected)
        if done % 5 == 0 or done == kills:
            make(videos, out, motion=("diff", "flow"))
            assert digests(out) == expected
            folders += 1
            shutil.rmtree(out)
    return folders


NO_SERVER = 75


def kill_run(videos: Path, out: Path, after: float) -> None:
    """Run in a process that is killed after some seconds, unless it is done by then."""

    def work() -> None:
        # The fork server of our parent serves us.
        forkserver.ensure_running = forkserver._forkserver.ensure_running = lambda: None
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # no handler: it ends us as SIGKILL would
        signal.setitimer(signal.ITIMER_REAL, max(after, 1e-3))
        try:
            make(videos, out, motion=("diff", "flow"))
        except FsarError as error:
            os._exit(NO_SERVER if fork_server.NO_SERVER in str(error) else 1)

    code = NO_SERVER
    # Python's fork server dies with a client that is killed while it asks for a process.
    while code == NO_SERVER:
        fork_server.start_server()
        code = in_child(work)
    assert code in {0, -signal.SIGALRM}


def check_whole(out: Path, expected: dict[str, str]) -> None:
    for path in out.glob("*-*.*"):
        assert path.suffix == ".tmp" or hashlib.sha256(path.read_bytes()).hexdigest() == expected[path.name]
    if (out / "index.zarr").exists():
        assert verify(out) == []
    else:
        with pytest.raises(ShardError, match=r"unfinished|no shard set|no folder"):
            ShardSet.open(out)


def test_a_killed_worker_changes_no_byte(
    videos: Path, tmp_path: Path, undisturbed: tuple[dict[str, str], float]
) -> None:
    kill_workers(videos, tmp_path, undisturbed, kills=2)


@pytest.mark.faults
def test_100_killed_workers_change_no_byte(
    videos: Path, tmp_path: Path, undisturbed: tuple[dict[str, str], float]
) -> None:
    kill_workers(videos, tmp_path, undisturbed, kills=100)
    print("\nworkers: 100 of 100 kills: the same bytes", end="")


@pytest.mark.faults
def test_500_killed_runs_change_no_byte(
    videos: Path, tmp_path: Path, undisturbed: tuple[dict[str, str], float]
) -> None:
    folders = kill_runs(videos, tmp_path, undisturbed, kills=500)
    print(f"\nruns: 500 of 500 kills: nothing half there, the same bytes in {folders} of 100 folders", end="")


def job_memory(videos: Path, out: Path, shards: int) -> Iterator[float]:
    """Yield the MB in use after each shard of 50 videos, all made in one process."""
    one = next(video for video in folder_catalogue(videos).videos if "0.mp4" in video.name)
    for number in range(shards):
        rows = range(50 * number, 50 * number + 50)
        job = Job(number, dict.fromkeys(rows, one), {"a": 0}, ("rgb", "diff1", "flow1"), out, Geometry(64, 64), 60)
        for written, _ in run_job(job, lambda _: None).tars.values():
            written.unlink()
        yield resident()


@pytest.mark.faults
def test_memory_is_flat_over_1000_videos(videos: Path, tmp_path: Path) -> None:
    held = list(job_memory(videos, tmp_path, 20))
    print(f"\nmemory, preprocessing: {held[3]:.1f} MB after 200 videos, {held[-1]:.1f} MB after 1,000", end="")
    assert held[-1] - held[3] < 10
