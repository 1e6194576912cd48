"""Each call that writes shards or an index fails once: files are whole, and the bytes the same."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

import numpy as np
import pytest
from click.testing import CliRunner
from folders import digests
from injector import DEATHS, ERRORS, Injector, in_child, in_shares, injected

from preprocess import stage
from preprocess.datasets.catalogue import Catalogue, Video
from preprocess.decode import Geometry, Planes, VideoError
from preprocess.stage import Settings, preprocess
from preprocess.workers import job
from shards_spec import Dataset, ShardError, ShardSet
from shards_spec.cli.shards import cli
from shards_spec.errors import FsarError
from shards_spec.verify import verify

CATALOGUE = Catalogue(
    Dataset("tiny", ("a",), {}), [Video(f"a/{n}.avi", "a", None, Path(f"{n}.avi")) for n in range(5)]
)  # the last of them is damaged


class MadeUpVideo:
    """A made-up video, read without a decoder."""

    fps, source_size, damaged = 12.0, (32, 32), True

    def __init__(self, path: Path, *_: object, **__: object) -> None:
        self._number = int(path.stem)

    def __iter__(self) -> Iterator[Planes]:
        if self._number == 4 and self.damaged:
            raise VideoError("damaged", "made up")
        rng = np.random.default_rng(self._number)
        for _ in range(3):
            yield Planes(*(rng.integers(0, 256, (n, n), np.uint8) for n in (32, 16, 16)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run without decoders and workers, so that every call of a run is made in this process."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # the injector knows what it would keep
    monkeypatch.setattr(job, "VideoReader", MadeUpVideo)
    monkeypatch.setattr(stage, "run_jobs", lambda jobs, **_: (job.run_job(each, lambda _: None) for each in jobs))


def make(out: Path, **options: object) -> None:
    preprocess(CATALOGUE, out, Settings(Geometry(32, 32), ("diff",), **({"rows_per_shard": 3} | options)))


@contextmanager
def repaired() -> Generator[None]:
    """The damaged video is whole now."""
    MadeUpVideo.damaged = False
    try:
        yield
    finally:
        MadeUpVideo.damaged = True


def retry(out: Path) -> None:
    with repaired():
        make(out, retry_failed=True)


def reindex(out: Path) -> None:
    CliRunner().invoke(cli, ["reindex", str(out)], catch_exceptions=False)


class Scenario:
    """A change of a shard set, the set before it, and its content after it, faults or not."""

    def __init__(self, do: Callable[[Path], None], before: Path | None, scratch: Path) -> None:
        self.do, self.before = do, before
        self.start(scratch / "set")
        with injected(Injector(scratch / "set")) as injector:
            do(scratch / "set")
        self.paths = injector.paths
        assert verify(scratch / "set") == []
        self.expected = digests(scratch / "set")
        whole = [self.expected] + ([digests(before)] if before else [])
        self.whole = {(name, value) for each in whole for name, value in each.items() if "index.zarr" not in name}

    def start(self, out: Path) -> None:
        if self.before:
            shutil.copytree(self.before, out)

    def befall(self, out: Path, at: int, fault: str) -> None:
        """Make the change with a fault, check what is left, make the change again."""
        self.start(out)
        injector = Injector(out, at=at, fault=fault)
        if fault in DEATHS:
            assert in_child(lambda: self._injected(out, injector)) == -9
        else:
            with suppress(FsarError):  # a fault in tidying up stops nobody
                self._injected(out, injector)
        self.check_whole(out)
        self.do(out)
        assert digests(out) == self.expected

    def _injected(self, out: Path, injector: Injector) -> None:
        with injected(injector):
            self.do(out)

    def check_whole(self, out: Path) -> None:
        """Check that files with final names are those of a whole set; an indexed set verifies."""
        found = digests(out) if out.exists() else {}
        for name, value in found.items():
            if "-" in name and "/" not in name and not name.endswith(".tmp"):
                assert (name, value) in self.whole, name
        for tar in out.glob("*.tar"):
            described = tar.with_suffix(".json")
            if described.exists():  # it must describe this tar, not the one before
                assert json.loads(described.read_bytes())["sha256"] == found[tar.name]
        for path in out.glob("*.json"):
            json.loads(path.read_bytes())
        if (out / "index.zarr").exists():
            assert verify(out) == []
        else:
            with pytest.raises(ShardError, match=r"unfinished|no shard set|no folder"):
                ShardSet.open(out)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole set in which one video failed."""
    out = tmp_path_factory.mktemp("fresh") / "set"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "VideoReader", MadeUpVideo)
        patch.setattr(stage, "run_jobs", lambda jobs, **_: (job.run_job(each, lambda _: None) for each in jobs))
        make(out)
    return out


WORK = {"preprocess": (make, False), "retry": (retry, True), "reindex": (reindex, True)}
FAULTS = ERRORS + DEATHS


def some_of(calls: int, number: int, *, salt: str) -> list[int]:
    """Return numbers of calls: one at random in each of `number` stretches of equal length."""
    draw = random.Random(f"{calls} {salt}")
    return [draw.randrange(n * calls // number, (n + 1) * calls // number) for n in range(number)]


def every_case(scenario: Scenario, *, inside: int) -> list[tuple[int, str]]:
    """Return every call with every fault.

    Of the calls inside of the unfinished index, take one in `inside`, with one fault.
    """
    cases, calls = [], 0
    for at, path in enumerate(scenario.paths):
        if "index.zarr.tmp" in path or "/" not in path:  # no "/": a removal inside of a folder
            calls += 1
            cases += [(at, FAULTS[calls // inside % len(FAULTS)])] if calls % inside == 0 else []
        else:
            cases += [(at, fault) for fault in FAULTS]
    return cases


def befall(scenario: Scenario, case: tuple[int, str], tmp_path: Path) -> None:
    out = tmp_path / str(os.getpid()) / "set"
    scenario.befall(out, *case)
    shutil.rmtree(out.parent)


@pytest.mark.parametrize("name", WORK)
def test_some_calls_fail(name: str, fresh: Path, tmp_path: Path) -> None:
    do, later = WORK[name]
    scenario = Scenario(do, fresh if later else None, tmp_path)
    for fault in FAULTS:
        for at in some_of(len(scenario.paths), 1, salt=fault):
            befall(scenario, (at, fault), tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize("name", WORK)
def test_every_call_fails(name: str, fresh: Path, tmp_path: Path) -> None:
    do, later = WORK[name]
    scenario = Scenario(do, fresh if later else None, tmp_path)
    cases = every_case(scenario, inside=5 if later else 1)
    done = in_shares(cases, lambda case: befall(scenario, case, tmp_path))
    calls = f"{len({at for at, _ in cases})} of {len(scenario.paths)} calls"
    print(f"\n{name}: {done} of {len(cases)} faults at {calls}: nothing half there, the same bytes after", end="")
