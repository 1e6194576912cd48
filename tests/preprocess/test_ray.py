"""Shards of a Ray cluster have the bytes of one machine, also when one of two nodes is killed."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from folders import ROOT, digests
from ray.cluster_utils import Cluster

from preprocess.datasets.folder import folder_catalogue
from preprocess.decode import Geometry
from preprocess.encode.series import series_plans
from preprocess.stage import Settings, preprocess
from preprocess.workers.job import Job
from preprocess.workers.on_ray import _receive, make_shard, run_on_ray
from shards_spec.errors import ConfigError, FsarError

NODE = {"num_cpus": 1, "object_store_memory": 80_000_000, "node_ip_address": "127.0.0.1"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes of one CPU each; we are connected to them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(ROOT))
        cluster = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
        cluster.add_node(**NODE)
        patch.setenv("RAY_ADDRESS", cluster.address)
        patch.setattr("ray._private.ray_constants.ENABLE_RAY_CLUSTER", False)  # else 127.0.0.1 is replaced
        yield cluster
        ray.shutdown()
        cluster.shutdown()


def test_a_node_that_dies_costs_no_byte(cluster: Cluster, tiny_videos: Path, tmp_path: Path) -> None:
    catalogue = folder_catalogue(tiny_videos)
    settings = Settings(Geometry(32, 32), motion=("diff",), rows_per_shard=3)
    assert preprocess(catalogue, tmp_path / "one", settings) == []
    killed = threading.Event()

    def kill() -> None:
        (node,) = cluster.worker_nodes
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not list((tmp_path / "ray").glob("rgb-*.tar")):
            time.sleep(0.01)
        cluster.remove_node(node, allow_graceful=False)
        killed.set()

    killer = threading.Thread(target=kill)
    killer.start()
    assert preprocess(catalogue, tmp_path / "ray", replace(settings, executor="ray")) == []
    killer.join()
    assert killed.is_set()
    assert digests(tmp_path / "ray") == digests(tmp_path / "one")


def test_a_machine_that_would_write_other_bytes_is_refused(tiny_videos: Path, tmp_path: Path) -> None:
    video = folder_catalogue(tiny_videos).videos[0]
    job = Job(0, {0: video}, {video.label: 0}, ("rgb",), tmp_path / "out", Geometry(32, 32), 60.0)
    plans = series_plans(job.geometry, [])
    assert "does not see" in str(make_shard(job, plans))
    job.out.mkdir()
    other = {"rgb": plans["rgb"] | {"decoder": "ffmpeg 1.0"}}
    assert "where this one has ffmpeg 1.0; install the same versions" in str(make_shard(job, other))
    assert list(job.out.iterdir()) == []


def test_without_ray_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r'pip install "fsar\[ray\]"'):
        list(run_on_ray([]))


def test_a_fault_of_our_code_on_a_machine_is_no_lost_machine(tmp_path: Path) -> None:
    def get(_: object) -> None:
        raise ray.exceptions.RayTaskError("make_shard", "Traceback:\nImportError: no fsar", ImportError("no fsar"))

    job = Job(3, {}, {}, ("rgb",), tmp_path, Geometry(32, 32), 60.0)
    with pytest.raises(FsarError, match=r"shard 3 failed on .* \(ImportError: no fsar\); install the same fsar"):
        list(_receive(SimpleNamespace(get=get, exceptions=ray.exceptions), None, job))
