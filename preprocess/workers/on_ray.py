"""Run jobs on a Ray cluster: each shard is one task, done by a worker process of some machine."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from preprocess.encode.series import series_plans
from preprocess.workers.job import Job, Messages, ShardDone, VideoDone
from preprocess.workers.pool import run_in_processes
from preprocess.workers.retries import AGAIN
from shards_spec.errors import ConfigError, FsarError
from shards_spec.files import TEMPORARY, disk_errors
from shards_spec.remote.store import RemotePath

LOST_MACHINES = 3  # at which a shard is begun again; Ray itself counts them
AHEAD = 2  # tasks that wait for each CPU of the cluster


def run_on_ray(jobs: Sequence[Job]) -> Messages:
    """Run jobs on the cluster that RAY_ADDRESS names or that runs here, else on this machine.

    Every machine must see the videos and the folder of the shards under the same paths. Each task
    writes to a folder of its own, and only we give files their final names. So a machine that was
    taken for lost and writes on does no harm.

    Raises:
        ConfigError: Ray is not installed, or its cluster does not answer.
        FsarError: a machine has other tools or does not see the folder, or a shard was lost again
            and again.
    """
    with _connected() as ray:
        task = ray.remote(num_cpus=1, max_retries=LOST_MACHINES)(make_shard)
        waiting = list(reversed(jobs))
        running: dict[Any, Job] = {}
        try:
            while waiting or running:
                most = AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))
                while waiting and len(running) < most:
                    job = waiting.pop()
                    running[task.remote(_absolute(job), _plans(job))] = job
                done, _ = ray.wait(list(running), num_returns=1)
                for reference in done:
                    yield from _receive(ray, reference, running.pop(reference))
        finally:
            for reference in running:
                ray.cancel(reference, force=True)


def make_shard(job: Job, plans: dict[str, Any]) -> list[VideoDone | ShardDone] | FsarError:
    """Make one shard on a machine of the cluster, under temporary names in a folder of this task.

    The pool does it with one worker: it retries a video and leaves it out by the same rules.
    """
    folder = job.out / f"attempt-{uuid4().hex}{TEMPORARY}"
    try:
        _check_machine(job, plans)
        with disk_errors(folder):
            folder.mkdir()
        return list(run_in_processes([replace(job, out=folder)], 1))
    except FsarError as error:
        shutil.rmtree(folder, ignore_errors=True)
        return error


def _receive(ray: Any, reference: Any, job: Job) -> Messages:  # noqa: ANN401
    """Yield the messages of a task, and remove its folder when its shard has its final name."""
    messages = _result(ray, reference, job)
    if isinstance(messages, FsarError):
        raise messages
    for message in messages:
        if isinstance(message, ShardDone):
            yield replace(message, tars={job.out / path.name: written for path, written in message.tars.items()})
            for folder in {path.parent for path in message.tars}:
                shutil.rmtree(folder, ignore_errors=True)
        else:
            yield message


def _result(ray: Any, reference: Any, job: Job) -> list[VideoDone | ShardDone] | FsarError:  # noqa: ANN401
    """Fetch what `make_shard` returned.

    Raises:
        FsarError: our code failed on the machine, or too many machines were lost.
    """
    try:
        result: list[VideoDone | ShardDone] | FsarError = ray.get(reference)
    except ray.exceptions.RayTaskError as error:  # our code failed there, whatever the machine
        said = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise FsarError(
            f"shard {job.shard} failed on a machine of the Ray cluster ({said}); "
            f"install the same fsar everywhere, then {AGAIN}"
        ) from error
    except ray.exceptions.RayError as error:
        said = str(error).strip().splitlines()[0]
        raise FsarError(
            f"shard {job.shard} was lost on {LOST_MACHINES + 1} machines of the Ray cluster ({said}); {AGAIN}"
        ) from error
    return result


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
    """Return settings and versions of this machine's tools, for the series of a job."""
    motion = [name for name in job.series if name != "rgb"]
    plans = series_plans(job.geometry, motion, codec=job.codec, estimators=job.estimators)
    return {name: plans[name] for name in job.series}


def _absolute(job: Job) -> Job:
    """Return the job with paths that mean the same in every working folder."""
    videos = {
        row: video if isinstance(video.path, RemotePath) else replace(video, path=Path(os.path.abspath(video.path)))  # noqa: PTH100 -- links stay
        for row, video in job.videos.items()
    }
    return replace(job, videos=videos, out=job.out.absolute())


@contextmanager
def _connected() -> Iterator[Any]:
    """Import Ray and connect it to its cluster; leave it as it was found."""
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
