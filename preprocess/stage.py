"""Make a shard set of videos: make what is missing, keep what is whole, write the index last."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from tqdm import tqdm

from preprocess.datasets.catalogue import Catalogue
from preprocess.encode.flow_estimators import create_estimator
from preprocess.plan import Settings, settle_plan
from preprocess.state import SetState
from preprocess.workers.executors import run_jobs
from preprocess.workers.job import Job, ShardDone
from preprocess.workers.parts import WHOLE, Part, begun, check_whole, holding
from shards_spec import ShardError
from shards_spec.files import only_writer, sweep
from shards_spec.index.build import build_index, drop_index
from shards_spec.index.layout import INDEX
from shards_spec.schema import Failure

__all__ = ["Settings", "join_parts", "preprocess", "preprocess_part"]

# A part holds this lock while it compares plans and writes the files that all parts share.
SETTLING = "parts.tmp"


def preprocess(catalogue: Catalogue, out: Path, settings: Settings) -> list[Failure]:
    """Make or complete the shard set `out`.

    Returns:
        The videos that could not be stored, as in `failures.jsonl`.

    Raises:
        FsarError: the folder holds another plan or catalogue, or is being written by another run;
            or the disk is full.
    """
    with only_writer(out):
        WHOLE.check_alone(out)
        plan = settle_plan(catalogue, out, settings)
        sweep(out)
        try:
            return _complete(SetState(catalogue, out, plan, settings))
        finally:
            sweep(out)


def preprocess_part(catalogue: Catalogue, out: Path, settings: Settings, part: Part) -> list[Failure]:
    """Make the shards of one part of the shard set `out`.

    Other parts may be made at the same time, by other processes and machines.

    Returns:
        The videos of this part that could not be stored.

    Raises:
        FsarError: as `preprocess`; or another process makes this part, or the folder has parts of
            another number.
    """
    with only_writer(out, shared=True), holding(part.lock(out)):
        with holding(out / SETTLING, wait=True):
            part.check_alone(out)
            state = SetState(catalogue, out, settle_plan(catalogue, out, settings), settings, part)
            jobs = _begin(state)
        part.sweep(out)
        try:
            _run(jobs, state)
        finally:
            part.sweep(out)
    return sorted(state.failures.values())


def join_parts(catalogue: Catalogue, out: Path, settings: Settings) -> list[Failure]:
    """Make one shard set of the parts in `out`, which must all be whole; return as `preprocess`.

    Raises:
        FsarError: as `preprocess`; or parts are missing, which the message names.
    """
    # Where a file system locks no folders, `only_writer` holds nothing: then the lock SETTLING
    # keeps parts from beginning, and a part that has begun holds its own lock, which is tried.
    with only_writer(out), holding(out / SETTLING, wait=True):
        plan = settle_plan(catalogue, out, settings)
        parts = begun(out)
        for part in parts:
            with holding(part.lock(out)):
                pass
        state = SetState(catalogue, out, plan, settings)
        for part in parts:
            state.merge(SetState(catalogue, out, plan, settings, part))
        check_whole(out, [job.shard for job in state.jobs()])
        drop_index(out)
        failures = _complete(state)
        for part in parts:  # their content is in failures.jsonl by now
            part.failures(out).unlink()
        sweep(out)
        return failures


def _begin(state: SetState) -> list[Job]:
    """Return the work to do; remove the index before anything changes that it describes."""
    jobs = state.jobs()
    for name in {name for job in jobs for name in job.estimators.values()}:
        create_estimator(name)  # one that cannot be imported is refused before anything changes
    if jobs or state.changed():
        drop_index(state.out)
    state.write()
    return jobs


def _complete(state: SetState) -> list[Failure]:
    """Make what is missing, and the index after it: a set with an index is a whole set."""
    _run(_begin(state), state)
    _refuse_nothing_stored(state)
    if not (state.out / INDEX).exists():
        build_index(state.out)
    return sorted(state.failures.values())


def _run(jobs: list[Job], state: SetState) -> None:
    """Run jobs, show how far they are, and give each finished shard its final names."""
    total = state.total
    todo = sum(len(job.videos) for job in jobs)
    frames = failed = 0
    bar = tqdm(total=total, initial=total - todo, unit="video", desc="preprocess", smoothing=0.05)
    running = run_jobs(jobs, executor=state.settings.executor, workers=state.settings.workers)
    with bar, closing(running) as messages:  # closing: no worker outlives an error
        for message in messages:
            if isinstance(message, ShardDone):
                _refuse_new_failures(message, state)
                state.publish(message)
            else:
                frames, failed = frames + message.frames, failed + (message.frames == 0)
                elapsed = max(bar.format_dict["elapsed"], 1e-3)
                bar.set_postfix_str(f"{frames / elapsed:.0f} frames/s, {failed} failed", refresh=False)
                bar.update()


def _refuse_new_failures(done: ShardDone, state: SetState) -> None:
    """Refuse a shard in which a video failed that is stored: the stored video would be lost.

    Raises:
        ShardError: there is such a video.
    """
    new = [failure for failure in done.failures if failure.row not in state.failures]
    held = set().union(*(state.held(name, done.shard) for name in state.plan.series)) if new else set()
    for failure in new:
        if failure.row in held:
            raise ShardError(
                f"{failure.name} is stored but cannot be decoded now ({failure.reason}: {failure.detail}); "
                "restore the file and type the same command again"
            )


def _refuse_nothing_stored(state: SetState) -> None:
    """Refuse a set of which every video failed.

    Raises:
        ShardError: no video could be stored.
    """
    total = len(state.catalogue.videos)
    if len(state.failures) == total:
        first = min(state.failures.values(), key=lambda failure: failure.row)
        raise ShardError(
            f"none of the {total} videos could be stored (the first, {first.name}: {first.reason}, {first.detail}); "
            f"see {state.out / 'failures.jsonl'}, repair them and add --retry-failed"
        )
