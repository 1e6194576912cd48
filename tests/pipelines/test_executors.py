from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import simplejpeg
import torch
from fake_shards import FakeShards

from pipelines import loader as executors
from pipelines.decoding.dali import DaliExecutor, dali_is_installed
from pipelines.decoding.jpeg import PortableExecutor
from pipelines.loader import create_executor
from pipelines.reads import Reads
from shards_spec.errors import ConfigError, ShardError

needs_dali = pytest.mark.skipif(not dali_is_installed(), reason="NVIDIA DALI is not installed")
NAMES = ["portable", pytest.param("dali", marks=needs_dali)]


def some_reads(shards: FakeShards, count: int, size: tuple[int, int], seed: int = 0) -> Reads:
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.integers(0, shards.num_videos, count))
    height, width = shards.rgb.sizes.min(0)
    return Reads(
        "rgb",
        rows,
        rng.integers(0, shards.frames[rows]),
        rng.integers(0, height - size[0] + 1, count),
        rng.integers(0, width - size[1] + 1, count),
        size,
    )


def expected_pixels(shards: FakeShards, reads: Reads) -> torch.Tensor:
    height, width = reads.size
    frames = []
    for row, frame, top, left in zip(reads.rows, reads.frames, reads.tops, reads.lefts, strict=True):
        whole = simplejpeg.decode_jpeg(shards.rgb.read(row, [frame])[0], "RGB", fastdct=False, fastupsample=False)
        frames.append(whole[top : top + height, left : left + width])
    return torch.from_numpy(np.stack(frames))


@pytest.mark.parametrize("name", NAMES)
def test_windows_are_those_of_the_whole_frames_bit_for_bit(name):
    shards = FakeShards(4, size=(72, 90))
    executor = create_executor(name, shards, threads=2)
    # growing, shrinking, and sizes that end inside a JPEG block
    for count, size in ((5, (48, 48)), (17, (33, 50)), (3, (72, 90)), (40, (1, 7))):
        reads = some_reads(shards, count, size, seed=count)
        frames = executor.decode(reads)
        assert frames.dtype == torch.uint8
        assert torch.equal(frames, expected_pixels(shards, reads))
    executor.close()


@needs_dali
def test_executors_agree_bit_for_bit_on_large_frames():
    shards = FakeShards(3, classes=2, size=(256, 341))
    reads = some_reads(shards, 24, (224, 224))
    portable, dali = PortableExecutor(shards, threads=2), DaliExecutor(shards, threads=2)
    assert torch.equal(portable.decode(reads), dali.decode(reads))
    portable.close()
    dali.close()


@pytest.mark.parametrize("name", NAMES)
def test_frames_stay_as_they_are_while_others_are_decoded(name):
    shards = FakeShards(4)
    executor = create_executor(name, shards, threads=2)
    reads = [some_reads(shards, 12, (48, 48), seed=seed) for seed in range(12)]
    held = [executor.decode(each) for each in reads]
    executor.close()
    for frames, each in zip(held, reads, strict=True):
        assert torch.equal(frames, expected_pixels(shards, each))


@pytest.mark.parametrize("name", NAMES)
def test_calls_from_several_threads(name):
    shards = FakeShards(4)
    executor = create_executor(name, shards, threads=2)
    reads = [some_reads(shards, 4 + seed % 5, (40 + seed % 2, 48), seed=seed) for seed in range(16)]
    with ThreadPoolExecutor(4) as pool:
        decoded = list(pool.map(executor.decode, reads))
    executor.close()
    for frames, each in zip(decoded, reads, strict=True):
        assert torch.equal(frames, expected_pixels(shards, each))


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_frame_is_named_and_the_next_call_works(name):
    shards = FakeShards(4)
    executor = create_executor(name, shards, threads=2)
    reads = some_reads(shards, 12, (48, 48))
    shards.rgb.damaged.add(int(reads.rows[5]))
    with pytest.raises(ShardError, match=f'video "videos/{reads.rows[5]}.avi" in fake is not a whole JPEG'):
        executor.decode(reads)
    shards.rgb.damaged.clear()
    assert torch.equal(executor.decode(reads), expected_pixels(shards, reads))
    executor.close()


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_frame_is_a_shard_error(name):
    shards = FakeShards(4)
    executor = create_executor(name, shards, threads=2)
    one = np.zeros(1, dtype=np.int64)
    with pytest.raises(ShardError, match="not 1000"):
        executor.decode(Reads("rgb", one, one + 1000, one, one, (8, 8)))
    executor.close()


def test_close_ends_the_threads():
    before = threading.active_count()
    executor = PortableExecutor(FakeShards(2), threads=3)
    executor.decode(some_reads(FakeShards(2), 8, (8, 8)))
    executor.close()
    assert threading.active_count() == before


def test_names_and_devices_are_checked():
    with pytest.raises(ConfigError, match='did you mean "portable"'):
        create_executor("portabel", FakeShards(2))
    with pytest.raises(ConfigError, match="known: cpu, gpu"):
        create_executor("portable", FakeShards(2), device="cuda")
    with pytest.raises(ConfigError, match="needs DALI"):
        create_executor("portable", FakeShards(2), device="gpu")


def test_without_dali_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"fsar\[dali\]"):
        create_executor("dali", FakeShards(2))
    executor = executors.create_executor("auto", FakeShards(2), threads=1)
    assert isinstance(executor, PortableExecutor)
    executor.close()


@needs_dali
def test_auto_takes_dali_where_it_is_installed():
    executor = create_executor("auto", FakeShards(2))
    assert isinstance(executor, DaliExecutor)
    executor.close()


@pytest.mark.parametrize(
    ("device", "name", "installed", "expected"),
    [
        ("cpu", "auto", True, ("cpu", False)),
        ("cuda", "auto", True, ("gpu", True)),
        ("cuda", "auto", False, ("cpu", True)),
        ("cuda", "dali", False, ("gpu", True)),  # refused then, not replaced
        ("cuda", "portable", True, ("cpu", True)),
    ],
)
def test_where_frames_for_a_device_are_decoded(monkeypatch, device, name, installed, expected):
    monkeypatch.setattr(executors, "dali_is_installed", lambda: installed)
    monkeypatch.setattr(executors, "create_executor", lambda *_, device, pin_memory, **__: (device, pin_memory))
    assert executors.executor_for(FakeShards(2), torch.device(device), name=name) == expected


@needs_dali
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpu_decoding_without_a_gpu_is_refused():
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        create_executor("dali", FakeShards(2), device="gpu")


@needs_dali
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_decoding_differs_by_a_few_levels():
    shards = FakeShards(4, size=(256, 256))
    executor = create_executor("dali", shards, device="gpu")
    reads = some_reads(shards, 24, (224, 224))
    frames = executor.decode(reads)
    assert frames.is_cuda
    difference = frames.cpu().short() - expected_pixels(shards, reads).short()
    assert difference.abs().float().mean() < 2
    executor.close()
