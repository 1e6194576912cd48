"""Parts of an array job make the same bytes as one run, and --join names what is missing."""

from __future__ import annotations

import errno
import fcntl
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from folders import digests
from hypothesis import given
from hypothesis import strategies as st

from preprocess.cli import cli
from preprocess.datasets.catalogue import Catalogue
from preprocess.datasets.folder import folder_catalogue
from preprocess.decode import Geometry
from preprocess.stage import Settings, join_parts, preprocess, preprocess_part
from preprocess.workers.parts import Part, holding
from shards_spec import FsarError
from shards_spec.errors import ConfigError
from shards_spec.files import only_writer

SETTINGS = Settings(Geometry(32, 32), motion=("diff",), rows_per_shard=4)


@pytest.fixture
def catalogue(tiny_videos: Path, tmp_path: Path) -> Catalogue:
    """Ten videos, one of them no video."""
    for path in sorted(tiny_videos.glob("[ab]*/*.mp4")):
        target = tmp_path / "videos" / path.relative_to(tiny_videos)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    (tmp_path / "videos" / "bee" / "bee_g0_0.mp4").write_bytes(b"no video")
    return folder_catalogue(tmp_path / "videos")


def test_parts_join_to_the_bytes_of_one_run(catalogue: Catalogue, tmp_path: Path) -> None:
    assert len(preprocess(catalogue, tmp_path / "one", SETTINGS)) == 1
    out = tmp_path / "parts"
    assert preprocess_part(catalogue, out, SETTINGS, Part(3, 3)) == []
    with pytest.raises(FsarError, match=r"of 3 parts 2 are still to be made \(not begun: 1-2; 2 shards"):
        join_parts(catalogue, out, SETTINGS)
    with pytest.raises(ConfigError, match="is being made in 3 parts, not in 2"):
        preprocess_part(catalogue, out, SETTINGS, Part(1, 2))
    with pytest.raises(ConfigError, match="run those that are missing with --part"):
        preprocess(catalogue, out, SETTINGS)
    assert [failure.name for failure in preprocess_part(catalogue, out, SETTINGS, Part(2, 3))] == ["bee/bee_g0_0.mp4"]
    assert preprocess_part(catalogue, out, SETTINGS, Part(1, 3)) == []
    lost = out / "diff1-000001.tar"
    kept = lost.read_bytes()
    lost.unlink()
    with pytest.raises(FsarError, match=r"1 are still to be made \(not whole: 2; 1 shards"):
        join_parts(catalogue, out, SETTINGS)
    (out / "diff1-000001.tar.99.tmp").write_bytes(b"left by a part that was killed")
    preprocess_part(catalogue, out, SETTINGS, Part(2, 3))
    assert lost.read_bytes() == kept
    assert not (out / "diff1-000001.tar.99.tmp").exists()
    assert len(join_parts(catalogue, out, SETTINGS)) == 1
    assert digests(out) == digests(tmp_path / "one")
    (tmp_path / "videos" / "bee" / "bee_g0_0.mp4").write_bytes(
        (tmp_path / "videos" / "bee" / "bee_g0_1.mp4").read_bytes()
    )
    assert preprocess_part(catalogue, out, replace(SETTINGS, retry_failed=True), Part(1, 1)) == []
    assert join_parts(catalogue, out, SETTINGS) == []


def test_a_part_is_made_once_at_a_time_and_beside_others(catalogue: Catalogue, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with holding(Part(1, 2).lock(out)), pytest.raises(FsarError, match=r"part-0001-of-0002 of .* is being made by"):
        preprocess_part(catalogue, out, SETTINGS, Part(1, 2))
    with only_writer(out, shared=True):  # as another part does
        preprocess_part(catalogue, out, SETTINGS, Part(2, 2))
        with pytest.raises(FsarError, match="being written by another process"):
            join_parts(catalogue, out, SETTINGS)


def test_a_network_file_system_without_locks_on_folders_is_written_all_the_same(tmp_path: Path, monkeypatch) -> None:
    def refuse(handle: int, kind: int) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with only_writer(tmp_path / "out"):
        assert (tmp_path / "out").is_dir()


def test_without_locks_on_files_parts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int, kind: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(FsarError, match=r"locks no files \(Function not implemented\)"), holding(tmp_path / "x.tmp"):
        pass


def test_parts_write_synthetic_videos_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(videos: Path, **_: object) -> None:
        with pytest.raises(FsarError, match="is being made by another process"), holding(videos / "synthetic.tmp"):
            pass
        raise FsarError("the lock is held")

    monkeypatch.setattr("preprocess.datasets.synthetic.write_videos", write)
    done = CliRunner().invoke(cli, ["synthetic", "--out", str(tmp_path / "out"), "--part", "1/2"])
    assert str(done.exception) == "the lock is held"


def test_a_part_that_is_being_made_is_not_joined(catalogue: Catalogue, tmp_path: Path) -> None:
    preprocess_part(catalogue, tmp_path / "out", SETTINGS, Part(1, 1))
    held = holding(Part(1, 1).lock(tmp_path / "out"))
    with held, pytest.raises(FsarError, match=r"part-0001-of-0001 of .* is being made by"):
        join_parts(catalogue, tmp_path / "out", SETTINGS)


@given(total=st.integers(0, 200), count=st.integers(1, 30))
def test_every_shard_is_of_one_part(total: int, count: int) -> None:
    numbers = [number for index in range(1, count + 1) for number in Part(index, count).numbers(total)]
    assert sorted(numbers) == list(range(total))


def test_the_command_makes_parts_and_joins_them(catalogue: Catalogue, tmp_path: Path) -> None:
    def run(*more: str) -> Result:
        words = ["folder", "--videos", str(tmp_path / "videos"), "--out", str(tmp_path / "out"), "--size", "32"]
        return CliRunner().invoke(cli, [*words, "--motion", "none", "--workers", "1", "--rows-per-shard", "5", *more])

    for wrong, said in [
        (["--part", "3/2"], "expected I/N with I from 1 to N"),
        (["--part", "1/2", "--join"], "give one of the two"),
        (["--join", "--retry-failed"], "--join makes nothing"),
        (["--part", "1/2", "--join", "--dry-run"], "give one of the two"),
        (["--part", f"1/{'9' * 5000}"], "expected I/N with I from 1 to N"),
        (["--join"], "has no parts to join"),
    ]:
        refused = run(*wrong).exception
        assert isinstance(refused, FsarError)
        assert said in str(refused)
    done = run("--part", "1/2")
    assert "part 1 of 2 is whole; when all are: the same command with --join" in done.output
    assert "not begun: 2" in str(run("--join").exception)
    assert run("--part", "2/2").exit_code == 3  # one of its videos failed
    joined = run("--join")
    assert joined.exit_code == 3
    assert "9 videos stored" in joined.output
