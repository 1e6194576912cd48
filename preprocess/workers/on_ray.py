"""Shards on a Ray cluster: each is one task, done by a worker process of the machine that takes it."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from preprocess.encode.series import series_plans
from preprocess.workers.job import Finished, Job
from preprocess.workers.pool import Progress, work
from shards_spec.errors import ConfigError, FsarError
from shards_spec.files import TEMPORARY, disk_errors
from shards_spec.remote.store import RemotePath

TRIES = 3  # times that a shard is begun again when its machine is lost
AHEAD = 2  # tasks that wait for each CPU of the cluster


def work_on_ray(jobs: Sequence[Job]) -> Generator[Progress | Finished]:
    """Run jobs on the cluster that RAY_ADDRESS names or that was started here, else on this machine.

    Every machine must see the videos and the folder of the shards under the same paths; each attempt at a shard writes
    to a folder of its own, and only we give files their final names. So a machine that was taken for lost and writes on
    does no harm.

    Raises:
        ConfigError: Ray is not installed, or its cluster does not answer.
        FsarError: a machine has other tools or does not see the folder, or a shard was lost again and again.
    """
    with _connected() as ray:
        make = ray.remote(num_cpus=1, max_retries=TRIES)(make_shard)
        waiting = list(reversed(jobs))
        running: dict[Any, Job] = {}
        try:
            while waiting or running:
                most = AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))
                while waiting and len(running) < most:
                    job = waiting.pop()
                    running[make.remote(_absolute(job), _plans(job))] = job
                done, _ = ray.wait(list(running), num_returns=1)
                for reference in done:
                    yield from _messages(ray, reference, running.pop(reference))
        finally:
            for reference in running:
                ray.cancel(reference, force=True)


def make_shard(job: Job, plans: dict[str, Any]) -> tuple[list[Progress], Finished] | FsarError:
    """On a machine of the cluster: one shard, under temporary names in a folder of this attempt."""
    attempt = job.out / f"attempt-{uuid4().hex}{TEMPORARY}"
    try:
        _check_machine(job, plans)
        with disk_errors(attempt):
            attempt.mkdir()
        messages = list(work([replace(job, out=attempt)], 1))
        finished = next(message for message in messages if isinstance(message, Finished))
        return [message for message in messages if isinstance(message, Progress)], finished
    except FsarError as error:
        shutil.rmtree(attempt, ignore_errors=True)
        return error


def _messages(ray: Any, reference: Any, job: Job) -> Iterator[Progress | Finished]:  # noqa: ANN401
    """What the pool of one machine would say of a shard; its folder goes when the shard has its final name."""
    try:
        answer = ray.get(reference)
    except ray.exceptions.RayTaskError as error:  # our code failed there, whatever the machine
        said = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise FsarError(
            f"shard {job.shard} failed on a machine of the Ray cluster ({said}); "
            "install the same fsar everywhere, then type the same command again: finished shards are kept"
        ) from error
    except ray.exceptions.RayError as error:
        said = str(error).strip().splitlines()[0]
        raise FsarError(
            f"shard {job.shard} was lost on {TRIES + 1} machines of the Ray cluster ({said}); "
            "type the same command again: finished shards are kept"
        ) from error
    if isinstance(answer, FsarError):
        raise answer
    progress, finished = answer
    yield from progress
    yield replace(finished, tars={job.out / path.name: written for path, written in finished.tars.items()})
    for folder in {path.parent for path in finished.tars}:
        shutil.rmtree(folder, ignore_errors=True)


def _check_machine(job: Job, plans: dict[str, Any]) -> None:
    """Refuse a machine that would write other bytes, or to another disk."""
    here = platform.node()
    if not job.out.is_dir():
        raise FsarError(f"the machine {here} of the Ray cluster does not see {job.out}; choose a folder that all share")
    ours = _plans(job)
    for name, plan in plans.items():
        for key, value in plan.items():
            if ours[name].get(key) != value:
                raise FsarError(
                    f"the machine {here} of the Ray cluster has {key} {ours[name].get(key)} where this one has "
                    f"{value}; install the same versions everywhere"
                )


def _plans(job: Job) -> dict[str, Any]:
    """Settings and versions of the tools of this machine, for the series of a job."""
    motion = [name for name in job.series if name != "rgb"]
    plans = series_plans(job.geometry, motion, codec=job.codec, estimators=job.estimators)
    return {name: plans[name] for name in job.series}


def _absolute(job: Job) -> Job:
    """The job with paths that mean the same in every working folder."""
    videos = {
        row: video if isinstance(video.path, RemotePath) else replace(video, path=Path(os.path.abspath(video.path)))  # noqa: PTH100 -- links stay
        for row, video in job.videos.items()
    }
    return replace(job, videos=videos, out=job.out.absolute())


@contextmanager
def _connected() -> Iterator[Any]:
    """Ray, connected to its cluster; left as it was found."""
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError('--executor ray needs Ray: pip install "fsar[ray]", on every machine') from error
    if ray.is_initialized():
        yield ray
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    try:
        ray.init(log_to_driver=False, include_dashboard=False, logging_level="error")
    except (ConnectionError, RuntimeError, ValueError) as error:
        said = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"the Ray cluster does not answer ({said}); see RAY_ADDRESS, or start one: ray start"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()
