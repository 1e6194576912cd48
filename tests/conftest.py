"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest
from videos import moving_frames, write_video

from preprocess.datasets.folder import folder_catalogue
from preprocess.decode import Geometry
from preprocess.stage import Settings, preprocess
from shards_spec import ShardSet

SPLITS = {"train": ["ant", "bee", "cat"], "val": ["dog", "eel"], "test": ["fox", "gnu"]}
REAL = Path(__file__).parents[2] / "shared" / "data"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where FSAR_REQUIRE_GPU is set, a test that is marked gpu fails instead of being skipped."""
    report = yield
    if report.skipped and item.get_closest_marker("gpu") and os.environ.get("FSAR_REQUIRE_GPU"):
        report.outcome, report.longrepr = "failed", f"FSAR_REQUIRE_GPU is set, but it was skipped: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real clips, where it lies beside the checkout."""
    if not REAL.is_dir():
        pytest.skip("real clips are not beside this checkout")
    return REAL


@pytest.fixture(scope="session")
def tiny_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven classes of five short videos; the number after g is the group."""
    folder = tmp_path_factory.mktemp("videos")
    for c, label in enumerate(sorted(label for labels in SPLITS.values() for label in labels)):
        for n in range(5):
            frames = moving_frames(10 * c + n, 12 + 3 * n, step=1 + c)
            write_video(folder / label / f"{label}_g{n // 2}_{n}.mp4", frames)
    return folder


@pytest.fixture(scope="session")
def tiny_path(tiny_videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real shard set of the tiny videos, 64x64, with difference and flow, in three shards a series."""
    out = tmp_path_factory.mktemp("tiny") / "shards"
    catalogue = folder_catalogue(tiny_videos, name="tiny", classes=SPLITS, group=r"_g(\d+)_")
    settings = Settings(Geometry(64, 64), rows_per_shard=13, workers=2)
    assert preprocess(catalogue, out, settings) == []
    return out


@pytest.fixture
def tiny_shards(tiny_path: Path) -> ShardSet:
    """The tiny shard set, opened."""
    with ShardSet.open(tiny_path) as shards:
        yield shards
