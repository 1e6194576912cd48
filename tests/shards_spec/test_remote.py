"""Videos and shard sets at URLs: an S3 server of our own on this machine, and a store in memory."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import requests
import torch
from click.testing import CliRunner
from folders import command_line, digests, flip_bit
from moto.server import ThreadedMotoServer

from fsar import EpisodeLoader, EpisodeRules
from fsar.cli.train import cli as train_cli
from pipelines.decoding.jpeg import PortableExecutor
from pipelines.decoding.raw import RawExecutor
from pipelines.reads import Reads
from preprocess.datasets.catalogue import CatalogueError, Video
from preprocess.datasets.folder import folder_catalogue
from preprocess.decode import Geometry
from preprocess.stage import Settings, preprocess
from preprocess.workers.job import Job, run_job
from preprocess.workers.pool import _Worker
from preprocess.workers.retries import Retries
from shards_spec import ShardError, ShardSet
from shards_spec.cli.shards import cli as shards_cli
from shards_spec.errors import ConfigError, GoneError, RemoteError
from shards_spec.files import DiskError
from shards_spec.remote import store as remote_module
from shards_spec.remote.cache import Cache, parse_bytes
from shards_spec.remote.shards import RemoteShards
from shards_spec.remote.store import Remote, RemotePath, place_of

REFUSED = re.compile(r"^error: .*\n$")  # one sentence


@pytest.fixture(scope="module")
def s3(tiny_videos: Path, tiny_path: Path) -> Iterator[str]:
    """Start an S3 server with the tiny shards and videos of two classes; yield its address."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    words = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_ENDPOINT_URL": address}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (words | {"AWS_DEFAULT_REGION": "us-east-1"}).items():
            patch.setenv(name, value)
        store = fsspec.filesystem("s3")
        store.mkdir("bucket")
        for label in ("ant", "bee"):
            store.put(str(tiny_videos / label), f"bucket/videos/{label}", recursive=True)
        store.pipe("bucket/videos/ant/._ant.mp4", b"what some systems leave in archives")
        store.put(str(tiny_path), "bucket/shards", recursive=True)
        yield address
        type(store).clear_instance_cache()
    server.stop()


def reads_of(shards: ShardSet, series: str = "rgb") -> Reads:
    rows = np.arange(0, shards.num_videos, 2)
    zeros = np.zeros(len(rows), np.int64)
    return Reads(series, rows, zeros + 3, zeros + 8, zeros + 4, (32, 48))


def test_videos_at_a_url_give_the_bytes_of_videos_in_a_folder(s3: str, tiny_videos: Path, tmp_path: Path) -> None:
    here = tmp_path / "videos"
    here.mkdir()
    for label in ("ant", "bee"):
        (here / label).symlink_to(tiny_videos / label)
    settings = Settings(Geometry(32, 32), motion=(), rows_per_shard=6)
    assert preprocess(folder_catalogue(here, links=True), tmp_path / "here", settings) == []
    words = ["folder", "--videos", "s3://bucket/videos", "--out", tmp_path / "there", "--size", "32"]
    words += ["--motion", "none", "--rows-per-shard", "6", "--workers", "2"]
    with tempfile.TemporaryDirectory() as temporary:  # a short name: sockets lie there, too
        done = command_line(*words, TMPDIR=temporary)
        assert done.returncode == 0, done.stderr
        assert list(Path(temporary).rglob("*.mp4")) == []
    assert digests(tmp_path / "there") == digests(tmp_path / "here")


def test_a_video_that_is_gone_is_a_failure_and_a_place_that_refuses_stops_the_run(s3: str, tmp_path: Path) -> None:
    found = folder_catalogue(RemotePath("s3://bucket/videos")).videos
    gone = replace(found[1], path=RemotePath("s3://bucket/videos/ant/gone.mp4"))
    job = Job(0, dict(enumerate([found[0], gone, found[2]])), {"ant": 0}, ("rgb",), tmp_path, Geometry(32, 32), 60.0)
    frames: list[int] = []
    (failure,) = run_job(job, frames.append).failures
    assert (failure.row, failure.reason, failure.detail) == (1, "unreadable", "it was listed and is gone")
    assert [count > 0 for count in frames] == [True, False, True]
    requests.post(f"{s3}/moto-api/reset-auth", data="0", timeout=5)  # from now on keys are checked
    try:
        with pytest.raises(RemoteError, match=r"access refused .* check the credentials"):
            run_job(job, frames.append)
    finally:
        requests.post(f"{s3}/moto-api/reset-auth", data="inf", timeout=5)


def test_a_shard_set_at_a_url_is_read_as_one_in_a_folder(s3: str, tiny_path: Path, tmp_path: Path) -> None:
    place = RemoteShards("s3://bucket/shards", tmp_path / "cache", 10**9)
    with ShardSet.open(tiny_path) as here, ShardSet.open(place) as there:
        assert (here.sha256, here.dataset, here.series_names) == (there.sha256, there.dataset, there.series_names)
        assert str(there.path) == "s3://bucket/shards"
        for series in here.series_names:
            one, other = PortableExecutor(here, threads=2), PortableExecutor(there, threads=2)
            assert (one.decode(reads_of(here, series)) == other.decode(reads_of(there, series))).all()
            one.close()
            other.close()
        rules = EpisodeRules(way=2, queries=2, frames=4, resize=64, crop=48, groups="any", streams="both")
        loaders = (EpisodeLoader(shards, "train", rules, executor="portable", threads=1) for shards in (here, there))
        episodes = []
        for loader in loaders:
            with loader:
                episodes.append(next(loader.episodes()))
        assert episodes[0].query_motion.any()
        for name in ("support", "query", "support_motion", "query_motion"):
            assert torch.equal(*(getattr(episode, name) for episode in episodes))
        folder = there.files
    assert not folder.exists()
    words = ["--shards", "s3://bucket/shards", "--cache-dir", str(tmp_path / "cache"), "--cache-size", "1GB"]
    shown = CliRunner().invoke(train_cli, [*words, "--recipe", "demo", "--print-config"], catch_exceptions=False)
    assert shown.exit_code == 0
    assert "num_classes = 3" in shown.output


def test_what_is_damaged_in_the_cache_is_fetched_again_and_at_the_source_refused(
    tiny_path: Path, tmp_path: Path
) -> None:
    store = fsspec.filesystem("memory")
    store.put(str(tiny_path), "/damaged", recursive=True)
    place = RemoteShards("memory://damaged", tmp_path / "cache", 10**9)
    with ShardSet.open(place) as shards:
        whole = shards.series("rgb").read(5, range(4))
    for path in (path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.name != "bytes"):
        flip_bit(path, random.Random(path.name).randrange(8 * path.stat().st_size))
    with ShardSet.open(place) as shards:
        assert shards.series("rgb").read(5, range(4)) == whole
    name = "/damaged/rgb-000000.tar"
    content = store.cat_file(name)
    place = replace(place, cache=tmp_path / "other")
    with ShardSet.open(place) as shards:
        offset = int(shards.series("rgb").columns["offset"][5]) + 512
        store.pipe_file(name, content[:offset] + bytes([content[offset] ^ 4]) + content[offset + 1 :])
        with pytest.raises(ShardError, match=r"memory://damaged/rgb-000000.tar: damaged in the \d+ bytes from"):
            shards.series("rgb").read(5, [0])
    store.pipe_file(name, content[:-512])
    with pytest.raises(ShardError, match=f"has {len(content) - 512} bytes where the index has {len(content)}"):
        ShardSet.open(place)
    store.rm("/damaged/index.zarr", recursive=True)
    with pytest.raises(ShardError, match=r"memory://damaged has no index.zarr"):
        ShardSet.open(place)


def test_raw_frames_at_a_url_are_mapped_where_they_lie(tiny_videos: Path, tmp_path: Path) -> None:
    classes = {"train": ["ant"]}
    settings = Settings(Geometry(64, 64), motion=(), codec="raw", rows_per_shard=64)
    catalogue = folder_catalogue(tiny_videos, classes=classes)
    preprocess(replace(catalogue, videos=catalogue.videos[:6]), tmp_path / "raw", settings)
    fsspec.filesystem("memory").put(str(tmp_path / "raw"), "/raw", recursive=True)
    place = RemoteShards("memory://raw", tmp_path / "cache", 10**9)
    with ShardSet.open(tmp_path / "raw") as here, ShardSet.open(place) as there:
        one, other = RawExecutor(here), RawExecutor(there)
        assert (one.decode(reads_of(here)) == other.decode(reads_of(there))).all()
        one.close()
        other.close()


def test_the_cache_keeps_its_bound_while_several_use_it(tmp_path: Path) -> None:
    limit, most, stop = 100_000, 0, threading.Event()

    def use(seed: int) -> None:
        cache, rng = Cache(tmp_path, limit), random.Random(seed)
        for _ in range(150):
            number = rng.randrange(40)
            with cache.open(f"a/{number}") or cache.add(f"a/{number}", bytes([number]) * (1000 + 300 * number)) as file:
                content = file.read()
                assert content == bytes([number]) * (1000 + 300 * number)

    def watch() -> None:
        nonlocal most
        cache = Cache(tmp_path, limit)
        while not stop.wait(0.002):
            with cache._count():  # nothing is removed or begun while the files are added up
                most = max(most, sum(size for _, size, _ in cache._files()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(use, range(4)):
            pass
    stop.set()
    watcher.join()
    assert limit // 2 < most <= limit
    with pytest.raises(ConfigError, match="give a larger --cache-size"):
        Cache(tmp_path, limit).add("b", bytes(limit + 1))


def test_what_was_used_last_stays(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1000)
    for moment, name in enumerate("abcd"):
        cache.add(name, bytes(240)).close()
        os.utime(tmp_path / name, (moment, moment))
    cache.open("a").close()
    cache.add("e", bytes(240)).close()
    assert {path.name for path in tmp_path.iterdir()} == {"a", "d", "e", "bytes"}


@pytest.mark.parametrize(("text", "count"), [("50GB", 50e9), ("1.5 T", 1.5e12), ("800mb", 8e8), ("123", 123)])
def test_sizes_are_read(text: str, count: float) -> None:
    assert parse_bytes(text) == count
    for wrong in ("", "GB", "0", "-1", "5 apples"):
        with pytest.raises(ConfigError, match="expected one such as 50GB"):
            parse_bytes(wrong)


def test_places_that_cannot_be_read_are_said_in_one_sentence(s3: str, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(RemoteError, match=r"^s3://none/x does not exist; check the name of the bucket"):
        ShardSet.open("s3://none/x")
    with pytest.raises(ConfigError, match=r"to read gs:// install gcsfs"):
        Remote("gs://bucket/x").sizes()
    with pytest.raises(ConfigError, match="Protocol not known: nonsense"):
        Remote("nonsense://bucket/x").sizes()
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    with pytest.raises(ConfigError, match=r's3:// install "fsar\[remote\]" with pip'):
        Remote("s3://bucket/x").sizes()
    monkeypatch.undo()
    fsspec.filesystem("memory").pipe_file("/odd/a//b.mp4", b"")
    with pytest.raises(CatalogueError, match="has an empty part"):
        folder_catalogue(RemotePath("memory://odd"))
    refused = CliRunner().invoke(train_cli, ["--shards", str(tmp_path), "--cache-size", "1GB"]).exception
    assert str(refused) == "--cache-dir and --cache-size are of shards at a URL, such as s3://bucket/shards"


def test_a_connection_that_breaks_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    store = fsspec.filesystem("memory")
    store.pipe_file("/broken/file", b"content")
    tries = []

    def fail(times: int):
        def cat_file(path: str, **_: object) -> bytes:
            tries.append(path)
            if len(tries) <= times:
                raise ConnectionResetError("Connection reset by peer")
            return b"content"

        return cat_file

    monkeypatch.setattr(remote_module, "PAUSE", 0.001)
    monkeypatch.setattr(type(store), "cat_file", lambda _, path, **k: fail(2)(path, **k))
    assert Remote("memory://broken").read("file") == b"content"
    tries.clear()
    monkeypatch.setattr(type(store), "cat_file", lambda _, path, **k: fail(3)(path, **k))
    with pytest.raises(RemoteError, match=r"cannot be read \(Connection reset by peer\), tried 3 times"):
        Remote("memory://broken").read("file")


def test_the_command_ends_with_code_2_where_a_store_does_not_answer(s3: str, tmp_path: Path) -> None:
    words = ["folder", "--videos", "s3://bucket/videos", "--out", tmp_path / "out"]
    done = command_line(*words, AWS_ENDPOINT_URL="http://127.0.0.1:9", AWS_MAX_ATTEMPTS="1")
    assert done.returncode == 2
    assert REFUSED.match(done.stderr)
    assert not (tmp_path / "out").exists()


def test_a_url_is_a_path_with_a_name_of_its_own() -> None:
    path = place_of("s3://bucket/videos/a/b.c.mp4")
    assert isinstance(path, RemotePath)
    assert (str(path), path.stem, path.parent.name) == ("s3://bucket/videos/a/b.c.mp4", "b.c", "a")
    assert str(path.relative_to(place_of("s3://bucket/videos"))) == "a/b.c.mp4"
    assert place_of("file:///data/x") == Path("/data/x")
    assert type(place_of("a:/b")) is type(Path())


@pytest.fixture
def odd(tiny_path: Path, tmp_path: Path) -> RemoteShards:
    """Copy the tiny shard set to memory, to be spoilt."""
    store = fsspec.filesystem("memory")
    if store.exists("/spoilt"):
        store.rm("/spoilt", recursive=True)
    store.put(str(tiny_path), "/spoilt", recursive=True)
    return RemoteShards("memory://spoilt", tmp_path / "cache", 10**9)


def test_names_in_a_store_that_climb_are_never_fetched(odd: RemoteShards, monkeypatch: pytest.MonkeyPatch) -> None:
    found, fetched = Remote(odd.url).sizes(), []
    evil = {f"index.zarr/videos/label/{name}": 4 for name in ("../../../../evil", "c/../../evil", "c/0/../../../x")}
    fetch = Remote.fetch
    monkeypatch.setattr(Remote, "sizes", lambda _: found | evil)
    monkeypatch.setattr(Remote, "fetch", lambda self, name, target: fetched.append(name) or fetch(self, name, target))
    with ShardSet.open(odd) as shards:
        assert shards.num_videos
    assert "index.zarr/videos/label/c/0" in fetched
    assert not any(".." in name for name in fetched)


def test_an_index_at_a_url_that_lacks_columns_or_lies_of_their_length(odd: RemoteShards, tiny_path: Path) -> None:
    store = fsspec.filesystem("memory")
    name = "/spoilt/index.zarr/videos/fps/zarr.json"
    metadata = json.loads(store.cat_file(name))
    store.pipe_file(name, json.dumps(metadata | {"shape": [3], "chunk_grid": metadata["chunk_grid"]}).encode())
    with pytest.raises(ShardError, match=r"memory://spoilt/index.zarr/videos/fps announces float32 \[3\]"):
        ShardSet.open(odd)
    store.rm(name)
    with pytest.raises(ShardError, match=r"memory://spoilt/index.zarr/videos/fps/zarr.json is missing"):
        ShardSet.open(odd)


def test_a_full_disk_here_is_not_a_broken_connection(odd: RemoteShards, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def fill(_: object, path: str, *__: object, **___: object) -> None:
        tries.append(path)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "get_file", fill)
    monkeypatch.setattr(remote_module, "PAUSE", 0.001)
    with pytest.raises(DiskError, match="No space left"):
        ShardSet.open(odd)
    assert len(set(tries)) == len(tries)


def test_a_slow_copy_is_no_silent_worker(tmp_path: Path) -> None:
    here = Video("a/x.mp4", "a", None, tmp_path / "x.mp4")
    there = replace(here, path=RemotePath("s3://bucket/x.mp4"))
    jobs = [Job(0, {0: video}, {"a": 0}, ("rgb",), tmp_path, Geometry(32, 32), 5.0) for video in (here, there)]
    near, far = (_Worker(None, Retries(job), 0.0).silence_limit for job in jobs)
    assert far - near >= 600


def test_a_fatal_video_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []

    def fetch(_: Remote, name: str, target: Path) -> None:
        fetched.append(name)
        raise GoneError(f"{target} is gone")

    monkeypatch.setattr(Remote, "fetch", fetch)
    paths = [RemotePath(f"memory://nowhere/{name}.mp4") for name in "xy"]
    videos = {row: Video(f"a/{path.name}", "a", None, path) for row, path in enumerate(paths)}
    job = Job(0, videos, {"a": 0}, ("rgb",), tmp_path, Geometry(32, 32), 5.0, fatal={1: "2 workers were lost at it"})
    assert [failure.reason for failure in run_job(job, lambda _: time.sleep(0.05)).failures] == ["unreadable", "crash"]
    assert fetched == ["x.mp4"]


@pytest.mark.parametrize("words", [["info"], ["verify"], ["reindex"], ["peek", "--out", "x.png"]])
def test_commands_for_folders_refuse_urls(words: list[str]) -> None:
    done = CliRunner().invoke(shards_cli, [words[0], "s3://bucket/x", *words[1:]])
    assert done.exit_code == 2
    assert "s3://bucket/x is at a URL" in done.output
