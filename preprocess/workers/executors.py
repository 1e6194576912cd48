"""Run jobs by the executor that the user chose; all executors yield the same messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from preprocess.workers.job import Job, Messages
from preprocess.workers.on_ray import run_on_ray
from preprocess.workers.pool import run_in_processes

EXECUTORS: dict[str, Callable[[Sequence[Job], int], Messages]] = {
    "local": run_in_processes,
    "ray": lambda jobs, _workers: run_on_ray(jobs),  # every CPU of the cluster is a worker
}


def run_jobs(jobs: Sequence[Job], *, executor: str, workers: int) -> Messages:
    """Run jobs; yield `VideoDone` after each video and `ShardDone` after each shard, in any order.

    Args:
        jobs: One job a shard.
        executor: A key of `EXECUTORS`.
        workers: Processes of this machine, for "local".

    Raises:
        ConfigError: Ray is not installed, or its cluster does not answer.
        FsarError: a worker ran out of disk, or workers die whatever the video.
    """
    if jobs:  # a complete shard set asks nothing of a cluster
        yield from EXECUTORS[executor](jobs, workers)
