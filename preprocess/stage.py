"""Run the stage videos -> shards: what is missing is made, what is whole is kept, the index comes last."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import click
from tqdm import tqdm

from preprocess.datasets.catalogue import Catalogue
from preprocess.datasets.coverage import empty_classes
from preprocess.decode import USUAL_FRAMES, USUAL_PIXELS, Geometry
from preprocess.encode.flow import DIS, create_estimator
from preprocess.encode.series import series_plans
from preprocess.workers.job import Finished, Job
from preprocess.workers.on_ray import work_on_ray
from preprocess.workers.parts import WHOLE, Part, begun, check_whole, holding
from preprocess.workers.pool import work
from shards_spec import Dataset, ShardError
from shards_spec.cli.console import WITH_FAILURES
from shards_spec.files import json_bytes, only_writer, publish, sweep, write_whole
from shards_spec.index.build import INDEX, build_index, drop_index, shard_path
from shards_spec.schema import Failure, Plan, is_motion, motion_series
from shards_spec.summary import drop_sidecars, load_or_make, write_sidecars

LEAST_ROWS, MOST_ROWS, SHARDS = 8, 64, 32  # of `usual_rows`
SETTLING = "parts.tmp"  # held by a part while it compares plans and writes what all parts share
WITH_RECIPES = {"ucf101", "hmdb51", "kinetics100", "ssv2-full", "ssv2-small"}


@dataclass(frozen=True)
class Settings:
    """How videos are stored and how the work is done: no byte depends on the number of workers or the limits.

    `motion` holds names as in the command's --motion; `flow_estimator` is of the flow among them. `rows_per_shard` 0:
    as the folder has it, and `usual_rows` in a new one.
    """

    geometry: Geometry
    motion: tuple[str, ...] = ("diff", "flow")
    rows_per_shard: int = 0
    time_limit: float = 300.0
    max_frames: int = USUAL_FRAMES
    max_pixels: int = USUAL_PIXELS
    workers: int = 1
    retry_failed: bool = False
    codec: str = "jpeg"
    flow_estimator: str = DIS
    executor: str = "local"


def preprocess(catalogue: Catalogue, out: Path, settings: Settings) -> list[Failure]:
    """Make or complete the shard set `out`.

    Returns:
        The videos that could not be stored, as in `failures.jsonl`.

    Raises:
        FsarError: the folder holds another plan or catalogue, or is being written by another run; disk full.
    """
    with only_writer(out):
        WHOLE.check_alone(out)
        plan = _settle_plan(catalogue, out, settings)
        sweep(out)
        try:
            return _complete(_State(catalogue, out, plan, settings))
        finally:
            sweep(out)


def preprocess_part(catalogue: Catalogue, out: Path, settings: Settings, part: Part) -> list[Failure]:
    """Make the shards of one part of the shard set `out`; other parts may be made at the same time, anywhere.

    Returns:
        The videos of this part that could not be stored.

    Raises:
        FsarError: as `preprocess`; or this part is being made by another process, or there is another number of parts.
    """
    with only_writer(out, shared=True), holding(part.lock(out)):
        with holding(out / SETTLING, wait=True):
            part.check_alone(out)
            state = _State(catalogue, out, _settle_plan(catalogue, out, settings), settings, part)
            jobs = _begin(state)
        part.sweep(out)
        try:
            _work(jobs, state)
        finally:
            part.sweep(out)
    return sorted(state.failures.values())


def join_parts(catalogue: Catalogue, out: Path, settings: Settings) -> list[Failure]:
    """Make one shard set of the parts in `out`, which must all be whole; returns as `preprocess`.

    Raises:
        FsarError: as `preprocess`; or parts are missing, which are named.
    """
    with only_writer(out), holding(out / SETTLING, wait=True):  # where folders have no locks, parts wait for this one
        plan = _settle_plan(catalogue, out, settings)
        parts = begun(out)
        for part in parts:  # and one that is past it holds its own
            with holding(part.lock(out)):
                pass
        state = _State(catalogue, out, plan, settings)
        for part in parts:
            state.take(_State(catalogue, out, plan, settings, part))
        check_whole(out, [job.shard for job in state.jobs()])
        drop_index(out)
        failures = _complete(state)
        for part in parts:  # what they say is in failures.jsonl by now
            part.failures(out).unlink()
        sweep(out)
        return failures


def _begin(state: _State) -> list[Job]:
    """What is to be done; the index goes before anything that it describes changes."""
    jobs = state.jobs()
    for name in {name for job in jobs for name in job.estimators.values()}:
        create_estimator(name)  # one that cannot be imported is refused before anything changes
    if jobs or state.changed():
        drop_index(state.out)
    state.write()
    return jobs


def _complete(state: _State) -> list[Failure]:
    """Make what is missing; the index goes before anything that it describes, and comes back last."""
    _work(_begin(state), state)
    _refuse_nothing_stored(state)
    if not (state.out / INDEX).exists():
        build_index(state.out)
    return sorted(state.failures.values())


def usual_rows(videos: int) -> int:
    """Videos of a shard where nobody chose: 64, and fewer in a set of under 2,000, so that workers can share it.

    Not a function of the number of workers, on which no byte depends.
    """
    return min(max(-(-videos // SHARDS), LEAST_ROWS), MOST_ROWS)


def wanted_plan(catalogue: Catalogue, settings: Settings, held: Plan | None = None) -> Plan:
    """The plan that a catalogue and settings ask for, with the series of motion that the folder holds besides."""
    rows = len(catalogue.videos)
    asked = motion_series(settings.motion)
    besides = (
        {name: plan for name, plan in held.series.items() if is_motion(name) and name not in asked} if held else {}
    )
    estimators = dict.fromkeys(asked, settings.flow_estimator)
    estimators |= {name: plan["method"] for name, plan in besides.items() if "method" in plan}
    series = series_plans(settings.geometry, [*asked, *besides], codec=settings.codec, estimators=estimators)
    per_shard = settings.rows_per_shard or (held.rows_per_shard if held else usual_rows(rows))
    return Plan(catalogue.dataset.name, per_shard, rows, catalogue.sha256(rows), series)


def _settle_plan(catalogue: Catalogue, out: Path, settings: Settings) -> Plan:
    """The plan that the folder will have: the one asked for, and the series that it holds already."""
    if not (out / "plan.json").exists():
        return wanted_plan(catalogue, settings)
    held = Plan.load(out / "plan.json")
    plan = wanted_plan(catalogue, settings, held)
    held.check_same(plan, out)
    if catalogue.sha256(held.catalogue_rows) != held.catalogue_sha256 or plan.catalogue_rows < held.catalogue_rows:
        raise ShardError(
            f"{out} was made from other videos: the first {held.catalogue_rows} videos in order of class and name, "
            "or their groups (--group), changed (videos may only be added at the end); use another --out folder, or "
            "restore them"
        )
    return plan


class _State:
    """Which videos failed so far, and which shards are still to be made."""

    def __init__(self, catalogue: Catalogue, out: Path, plan: Plan, settings: Settings, part: Part = WHOLE) -> None:
        self.catalogue, self.out, self.plan, self.settings, self.part = catalogue, out, plan, settings, part
        self._failed = part.failures(out)  # the file of those that failed
        known = self._failed if self._failed.exists() else WHOLE.failures(out)
        ours = set(self.rows())
        self.failures = {row: failure for row, failure in Failure.load_all(known).items() if row in ours}

    def jobs(self) -> list[Job]:
        """What is to be done, shard by shard."""
        return [job for number in self._numbers() if (job := self._job(number))]

    def take(self, part: _State) -> None:
        """What a part knows of its videos, in place of what was known before."""
        ours = set(part.rows())
        self.failures = {row: failure for row, failure in self.failures.items() if row not in ours} | part.failures

    def rows(self) -> Iterator[int]:
        """The rows of its shards."""
        return (row for number in self._numbers() for row in self._rows(number))

    @property
    def total(self) -> int:
        """Videos of its shards."""
        return sum(len(self._rows(number)) for number in self._numbers())

    def changed(self) -> list[Path]:
        """The small files whose content is not as it should be."""
        return [path for path, data in self._small_files().items() if not path.exists() or path.read_bytes() != data]

    def write(self) -> None:
        """Write the small files that changed."""
        for path in self.changed():
            write_whole(path, self._small_files()[path])

    def publish(self, done: Finished) -> None:
        """Give a finished shard its final names.

        The failures go first: a shard counts as whole only when it holds all of its videos but those,
        so that a crash between any two of these steps leaves a shard that the next run makes again.
        """
        before = self.failures
        self.failures = {row: f for row, f in before.items() if row not in done.rows}
        self.failures |= {failure.row: failure for failure in done.failures}
        if self.failures != before:
            write_whole(self._failed, Failure.dump_all(self.failures.values()))
        for tar, (written, summary) in done.tars.items():
            drop_sidecars(tar)
            if summary.samples:
                publish(written, tar)
                write_sidecars(tar, summary)
            else:
                written.unlink()
                tar.unlink(missing_ok=True)

    def _small_files(self) -> dict[Path, bytes]:
        return {
            self.out / "plan.json": json_bytes(self.plan.to_json()),
            self.out / "dataset.json": json_bytes(self.catalogue.dataset.to_json()),
            self._failed: Failure.dump_all(self.failures.values()),
        }

    def _numbers(self) -> range:
        return self.part.numbers(-(-len(self.catalogue.videos) // self.plan.rows_per_shard))

    def _rows(self, number: int) -> range:
        size = self.plan.rows_per_shard
        return range(number * size, min((number + 1) * size, len(self.catalogue.videos)))

    def _job(self, number: int) -> Job | None:
        rows = self._rows(number)
        failed = {row for row in rows if row in self.failures}
        retry = bool(failed) and self.settings.retry_failed
        expected = set(rows) - failed
        missing = [name for name in self.plan.series if retry or self.held(name, number) != expected]
        if not missing:
            return None
        # A failed video is tried again only on request; a shard whose failures are not yet settled tries all.
        skipped = set() if retry or len(missing) == len(self.plan.series) else failed
        dataset = self.catalogue.dataset
        return Job(
            shard=number,
            videos={row: self.catalogue.videos[row] for row in rows if row not in skipped},
            classes={label: i for i, label in enumerate(dataset.classes)},
            series=tuple(missing),
            out=self.out,
            geometry=self.settings.geometry,
            time_limit=self.settings.time_limit,
            max_frames=self.settings.max_frames,
            max_pixels=self.settings.max_pixels,
            codec=self.settings.codec,
            estimators={name: plan["method"] for name in missing if "method" in (plan := self.plan.series[name])},
        )

    def held(self, series: str, number: int) -> set[int]:
        """The rows that a shard of a series holds; none where it is missing or damaged."""
        tar = shard_path(self.out, series, number)
        if tar.exists():
            with suppress(ShardError):  # one that was cut short or replaced since is made again
                return load_or_make(tar).rows
        return set()


def _work(jobs: list[Job], state: _State) -> None:
    total = state.total
    todo = sum(len(job.videos) for job in jobs)
    frames = failed = 0
    bar = tqdm(total=total, initial=total - todo, unit="video", desc="preprocess", smoothing=0.05)
    on_ray = state.settings.executor == "ray"
    working = work_on_ray(jobs) if on_ray and jobs else work(jobs, state.settings.workers)
    with bar, closing(working) as messages:  # closing: no worker outlives an error
        for message in messages:
            if isinstance(message, Finished):
                _refuse_new_failures(message, state)
                state.publish(message)
            else:
                frames, failed = frames + message.frames, failed + (message.frames == 0)
                elapsed = max(bar.format_dict["elapsed"], 1e-3)
                bar.set_postfix_str(f"{frames / elapsed:.0f} frames/s, {failed} failed", refresh=False)
                bar.update()


def _refuse_new_failures(done: Finished, state: _State) -> None:
    """A video that is stored must not fail when its shard is made again: what is whole would be lost."""
    new = [failure for failure in done.failures if failure.row not in state.failures]
    held = set().union(*(state.held(name, done.shard) for name in state.plan.series)) if new else set()
    for failure in new:
        if failure.row in held:
            raise ShardError(
                f"{failure.name} is stored but cannot be decoded now ({failure.reason}: {failure.detail}); "
                "restore the file and type the same command again"
            )


def _refuse_nothing_stored(state: _State) -> None:
    total = len(state.catalogue.videos)
    if len(state.failures) == total:
        first = min(state.failures.values(), key=lambda failure: failure.row)
        raise ShardError(
            f"none of the {total} videos could be stored (the first, {first.name}: {first.reason}, {first.detail}); "
            f"see {state.out / 'failures.jsonl'}, repair them and add --retry-failed"
        )


def report_part(failures: list[Failure], out: Path, part: Part) -> None:
    """Say that a part is whole, and which file has its videos that failed; click's Exit (3) where some did."""
    click.echo(f"{out}: part {part} is whole; when all are: the same command with --join in place of --part")
    if failures:
        click.echo(f"{len(failures)} of its videos failed; see {part.failures(out)}", err=True)
        raise click.exceptions.Exit(WITH_FAILURES)


def report_whole(catalogue: Catalogue, failures: list[Failure], out: Path, *, retried: bool) -> None:
    """Say what was stored, what failed and which command follows; click's Exit (3) where some videos failed."""
    stored = len(catalogue.videos) - len(failures)
    click.echo(f"{out}: {stored:,} videos stored; next: {_next_step(catalogue.dataset, out)}")
    if empty := empty_classes(catalogue):
        click.echo(f"  ({len(empty)} classes of its splits have no video: fsar-train needs --small-classes drop)")
    if not failures:
        return
    for failure in failures[:20]:
        click.echo(f"  failed: {failure.name}: {failure.reason}: {failure.detail}", err=True)
    reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(f.reason for f in failures).most_common())
    again = "they failed again" if retried else "repair them and add --retry-failed"
    click.echo(f"{len(failures)} videos failed ({reasons}); see {out / 'failures.jsonl'}; {again}", err=True)
    raise click.exceptions.Exit(WITH_FAILURES)


def _next_step(dataset: Dataset, out: Path) -> str:
    """The command that follows."""
    shards = shlex.quote(str(out))
    if "test" in dataset.splits and "train" not in dataset.splits:
        return f"fsar-eval --shards {shards} --weights RUN"
    if not {"train", "test"} <= set(dataset.splits):
        return (
            "choose classes with --train-classes and --test-classes, or lists with --splits (nothing is decoded again)"
        )
    train = f"fsar-train --shards {shards} --method molo"
    if dataset.name == "synthetic":
        return train
    if dataset.name in WITH_RECIPES:
        return f"{train} --trunk-weights FILE"
    if dataset.name == "epic":
        return f"fsar-train --shards {shards} --method hyrsm++ --trunk-weights FILE"
    return f"{train} --recipe molo-lite0 --trunk-weights fetch (on a CPU), or --recipe molo-ucf101-1shot (on a GPU)"
