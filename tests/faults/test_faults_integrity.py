"""Flipped bits and cut files: all found, and no wrong or half sample is delivered."""

from __future__ import annotations

import os
import random
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_shards import encode_frame
from folders import flip_bit, write_set
from injector import in_shares, resident
from small_runs import call, words

from fsar.cli.train import cli as train_cli
from fsar.loader import EpisodeDataset, EpisodeLoader
from pipelines.decoding.dali import dali_is_installed
from pipelines.episodes.rules import EpisodeRules
from pipelines.loader import create_executor
from pipelines.reads import Reads
from preprocess.datasets.folder import folder_catalogue
from preprocess.decode import Geometry
from preprocess.stage import Settings, preprocess
from shards_spec import ShardError, ShardSet
from shards_spec.schema import BLOCK, padded, picture_name
from shards_spec.summary import Sample, from_tar
from shards_spec.verify import verify

needs_dali = pytest.mark.skipif(not dali_is_installed(), reason="NVIDIA DALI is not installed")
EXECUTORS = ["portable", pytest.param("dali", marks=needs_dali)]
VIDEOS, FRAMES = 12, 4


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve videos of four pictures of 64x48, in three shards."""
    videos = {row: [encode_frame(10 * row + n, 48, 64) for n in range(FRAMES)] for row in range(VIDEOS)}
    return write_set(tmp_path_factory.mktemp("pictures") / "set", videos)


def spans(sample: Sample) -> list[tuple[int, int]]:
    """Return first and last byte of each member, header and padding included."""
    sizes = [BLOCK + padded(size) for size in sample.sizes]
    ends = (sample.offset + np.cumsum(sizes)).tolist()
    return [(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def member_at(samples: list[Sample], byte: int) -> tuple[str, bool]:
    """Return the name of the member at a byte of a shard; tell whether the byte is of a picture."""
    for sample in samples:
        names = [picture_name(frame, sample.codec) for frame in sample.frames] + ["cls", "json"]
        for name, size, (start, stop) in zip(names, sample.sizes, spans(sample), strict=True):
            if start <= byte < stop:
                picture = name not in {"cls", "json"}
                return f"c{sample.row:08d}.{name}", picture and start + BLOCK <= byte < start + BLOCK + size
    return "end of the archive", False


def flip_and_verify(folder: Path, case: int) -> None:
    """Flip one bit in a copy; `verify` names shard, member, and an offset at it or before."""
    copy = folder.with_name(f"copy {os.getpid()}")
    if not copy.exists():
        shutil.copytree(folder, copy)
    draw = random.Random(case)
    tar = draw.choice(sorted(copy.glob("*.tar")))
    bit = draw.randrange(8 * tar.stat().st_size)
    samples = from_tar(tar).samples
    flip_bit(tar, bit)
    faults = verify(copy)
    flip_bit(tar, bit)
    assert len(faults) == 1
    assert faults[0].startswith(f"{tar}: ")
    assert member_at(samples, bit // 8)[0] in faults[0]
    numbers = [int(number) for number in re.findall(r"byte (\d+)|bytes (\d+) and (\d+)", faults[0])[0] if number]
    assert numbers[0] <= bit // 8 <= max(numbers[-1], numbers[0] + tar.stat().st_size)


def cut_and_open(folder: Path, case: int) -> None:
    """Cut one shard of a copy of this process; the set is refused when it is opened."""
    copy = folder.with_name(f"copy {os.getpid()}")
    if not copy.exists():
        shutil.copytree(folder, copy)
    draw = random.Random(case)
    tar = draw.choice(sorted(copy.glob("*.tar")))
    data = tar.read_bytes()
    os.truncate(tar, draw.choice([draw.randrange(len(data)), BLOCK * draw.randrange(len(data) // BLOCK)]))
    with pytest.raises(ShardError, match=f"{tar.name} has .* it was cut short"):
        ShardSet.open(copy)
    tar.write_bytes(data)


def test_some_flips_and_cuts_are_found(pictures: Path) -> None:
    for case in range(15):
        flip_and_verify(pictures, case)
        cut_and_open(pictures, case)


@pytest.mark.faults
def test_1000_flipped_bits_are_found(pictures: Path) -> None:
    done = in_shares(range(1000), lambda case: flip_and_verify(pictures, case))
    print(f"\nflipped bits: {done} of 1000 found by verify, with shard, member and offset", end="")


@pytest.mark.faults
def test_1000_cut_shards_are_refused(pictures: Path) -> None:
    done = in_shares(range(1000), lambda case: cut_and_open(pictures, case))
    print(f"\ncut shards: {done} of 1000 refused when opened", end="")


def all_reads(rows: range, frames: int, size: tuple[int, int]) -> Reads:
    """Read whole frames of these videos."""
    count = len(rows) * frames
    return Reads(
        "rgb", np.repeat(rows, frames), np.tile(np.arange(frames), len(rows)), *np.zeros((2, count), np.int64), size
    )


class Reading:
    """A set that is open, with an executor; what it delivers while its files change."""

    def __init__(self, folder: Path, executor: str, *, size: tuple[int, int]) -> None:
        self.shards = ShardSet.open(folder, check=True)
        self.executor = create_executor(executor, self.shards, threads=1)
        self.size, self.tars = size, sorted(folder.glob("rgb-*.tar"))
        self.rows = [sorted(from_tar(tar).rows) for tar in self.tars]
        self.frames = len(self.shards.series("rgb").kept(0))
        self.expected = [self.read(shard) for shard in range(len(self.tars))]

    def read(self, shard: int) -> torch.Tensor:
        rows = self.rows[shard]
        return self.executor.decode(all_reads(range(rows[0], rows[-1] + 1), self.frames, self.size)).clone()

    def delivers_nothing_wrong(self, shard: int) -> str | None:
        """Return the error with which a shard is refused; else check its pixels."""
        try:
            found = self.read(shard)
        except ShardError as error:
            return str(error)
        assert torch.equal(found, self.expected[shard])
        return None

    def close(self) -> None:
        self.executor.close()
        self.shards.close()


def flip_while_read(reading: Reading, draw: random.Random) -> bool:
    """Flip a bit of an open shard; tell whether it was refused.

    A flip in a picture must be refused, and the picture named.
    """
    shard = draw.randrange(len(reading.tars))
    tar, bit = reading.tars[shard], 8 * draw.randrange(reading.tars[shard].stat().st_size) + draw.randrange(8)
    name, in_picture = member_at(from_tar(tar).samples, bit // 8)
    is_read = in_picture and int(name.split(".")[1]) < reading.frames
    flip_bit(tar, bit)
    error = reading.delivers_nothing_wrong(shard)
    flip_bit(tar, bit)
    assert (error is not None) == is_read
    assert error is None or f"{tar}: {name}: content damaged" in error
    return error is not None


def cut_while_read(reading: Reading, draw: random.Random) -> bool:
    """Cut an open shard; tell whether it was refused."""
    shard = draw.randrange(len(reading.tars))
    tar = reading.tars[shard]
    data = tar.read_bytes()
    os.truncate(tar, draw.randrange(len(data)))
    error = reading.delivers_nothing_wrong(shard)
    with tar.open("r+b") as file:
        file.write(data)
    assert error is None or "cut short" in error
    return error is not None


def damage_while_read(folder: Path, executor: str, *, number: int, size: tuple[int, int] = (48, 64)) -> list[int]:
    """Count flips and cuts that are refused, of `number` each; others lie where nothing is read."""
    reading, draw = Reading(folder, executor, size=size), random.Random(5)
    try:
        return [sum(damage(reading, draw) for _ in range(number)) for damage in (flip_while_read, cut_while_read)]
    finally:
        reading.close()


@pytest.mark.parametrize("executor", EXECUTORS)
def test_nothing_wrong_is_delivered(pictures: Path, tmp_path: Path, executor: str) -> None:
    flips, cuts = damage_while_read(Path(shutil.copytree(pictures, tmp_path / "set")), executor, number=20)
    assert flips
    assert cuts


@pytest.mark.faults
@pytest.mark.parametrize("executor", EXECUTORS)
def test_nothing_wrong_is_delivered_1000_times(pictures: Path, tmp_path: Path, executor: str) -> None:
    flips, cuts = damage_while_read(Path(shutil.copytree(pictures, tmp_path / "set")), executor, number=1000)
    print(
        f"\n{executor}, while reading: {flips} of 1000 flips and {cuts} of 1000 cuts refused, the others where nothing "
        "is read; wrong or half samples delivered: 0 of 2000",
        end="",
    )


def test_nothing_wrong_is_delivered_of_raw_frames(tiny_videos: Path, tmp_path: Path) -> None:
    settings = Settings(Geometry(32, 32), (), rows_per_shard=3, codec="raw")
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "ant").symlink_to(tiny_videos / "ant")
    assert preprocess(folder_catalogue(tmp_path / "videos", links=True), tmp_path / "set", settings) == []
    flips, cuts = damage_while_read(tmp_path / "set", "portable", number=10, size=(32, 32))
    assert flips
    assert cuts


def test_loaders_and_commands_check(pictures: Path, tiny_path: Path, tmp_path: Path, capsys) -> None:
    damaged = Path(shutil.copytree(tiny_path, tmp_path / "set"))
    for tar in damaged.glob("rgb-*.tar"):
        for sample in from_tar(tar).samples:
            for start, _ in spans(sample)[:-2]:
                flip_bit(tar, 8 * (start + BLOCK + 900))  # in the middle of a picture's scan: other pixels, no error
    rules = EpisodeRules(way=2, shot=1, queries=1, frames=2, resize=64, crop=64)
    with pytest.raises(ShardError, match="content damaged"):
        list(EpisodeDataset(damaged, "train", rules, stop=1, check=True))
    assert call(train_cli, *words(damaged, tmp_path / "run"), "--check") == 2
    assert "content damaged" in capsys.readouterr().err


@pytest.mark.faults
def test_checking_costs_little(tmp_path: Path) -> None:
    """Compare processor seconds of 5-way 1-shot episodes of 8 frames, 256x256 at quality 90."""
    videos = {row: [encode_frame(100 * row + n, 256, 256) for n in range(8)] for row in range(30)}
    folder = write_set(tmp_path / "set", videos, rows=30, size=(256, 256))
    reads = all_reads(range(30), 8, (224, 224))
    seconds = {}
    for check in (False, True):
        with ShardSet.open(folder, check=check) as shards:
            series = shards.series("rgb")
            executor = create_executor("portable", shards, threads=1)
            payload = sum(len(data) for row in range(30) for data in series.read(row, range(8)))
            seconds[check] = (
                least_seconds(lambda executor=executor: executor.decode(reads), 5),
                least_seconds(lambda series=series: [series.read(row, range(8)) for row in range(30)], 20),
            )
            executor.close()
    share = (seconds[True][1] - seconds[False][1]) / seconds[False][0]
    print(f"\n--check: {share:.2%} of an episode of {payload / 1e6:.1f} MB JPEG in {seconds[False][0]:.3f} s", end="")
    assert share < 0.02


def least_seconds(work, rounds: int) -> float:
    """Return processor seconds of the fastest of some rounds."""
    found = []
    for _ in range(rounds):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return min(found)


@pytest.mark.faults
@pytest.mark.parametrize("executor", EXECUTORS)
def test_memory_is_flat_over_10000_episodes(tiny_path: Path, executor: str) -> None:
    rules = EpisodeRules(way=2, shot=1, queries=1, frames=2, resize=64, crop=64)
    held = []
    with (
        ShardSet.open(tiny_path, check=True) as shards,
        EpisodeLoader(shards, "train", rules, executor=executor, threads=1) as loader,
    ):
        for n, _ in enumerate(loader.episodes(0, 10_000), 1):
            if n % 500 == 0:
                held.append(resident())
    after = f"{held[2]:.1f} MB after 1,500 episodes, {held[-1]:.1f} MB after 10,000"
    print(f"\nmemory, {executor}: {after}", end="")
    assert held[-1] - held[2] < 10
