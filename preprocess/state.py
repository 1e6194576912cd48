"""Keep the state of a shard set that is made: which shards are whole, and which videos failed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from preprocess.datasets.catalogue import Catalogue
from preprocess.plan import Settings
from preprocess.workers.job import Job, ShardDone
from preprocess.workers.parts import WHOLE, Part
from shards_spec import ShardError
from shards_spec.files import json_bytes, publish, write_whole
from shards_spec.index.layout import shard_path
from shards_spec.schema import Failure, Plan
from shards_spec.summary import drop_sidecars, load_or_make, write_sidecars


class SetState:
    """The shards of a set, or of one part of it: what is stored, what failed, what is missing."""

    def __init__(self, catalogue: Catalogue, out: Path, plan: Plan, settings: Settings, part: Part = WHOLE) -> None:
        self.catalogue, self.out, self.plan, self.settings, self.part = catalogue, out, plan, settings, part
        self._failed = part.failures(out)  # the file of the videos that failed
        known = self._failed if self._failed.exists() else WHOLE.failures(out)
        ours = set(self.rows())
        self.failures = {row: failure for row, failure in Failure.load_all(known).items() if row in ours}

    def jobs(self) -> list[Job]:
        """Return the work to do, one job for each shard that lacks something."""
        return [job for number in self._numbers() if (job := self._job(number))]

    def merge(self, part: SetState) -> None:
        """Take over what a part knows of its videos, in place of what was known before."""
        theirs = set(part.rows())
        self.failures = {row: failure for row, failure in self.failures.items() if row not in theirs} | part.failures

    def rows(self) -> Iterator[int]:
        """Yield the rows of its shards."""
        return (row for number in self._numbers() for row in self._rows(number))

    @property
    def total(self) -> int:
        """Number of videos of its shards."""
        return sum(len(self._rows(number)) for number in self._numbers())

    def changed(self) -> list[Path]:
        """Return the small files whose content is not as it should be."""
        return [path for path, data in self._small_files().items() if not path.exists() or path.read_bytes() != data]

    def write(self) -> None:
        """Write the small files that changed."""
        for path in self.changed():
            write_whole(path, self._small_files()[path])

    def publish(self, done: ShardDone) -> None:
        """Give a finished shard its final names.

        The list of failures is written first: a shard counts as whole only if it holds all of its
        videos but the failed ones. So after a crash between any two of these steps, the next run
        makes the shard again. A tar loses its old summary before it is replaced, so that no
        summary ever describes another tar.

        `publish` syncs a file and then renames it. A rename is all or nothing, so a crash leaves
        the old file or the new one. Without the sync before it, a power cut could leave the new
        name with no bytes behind it.
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

    def held(self, series: str, number: int) -> set[int]:
        """Return the rows that a shard of a series holds; none where it is missing or damaged."""
        tar = shard_path(self.out, series, number)
        if tar.exists():
            with suppress(ShardError):  # a tar that was cut short or replaced is made again
                return load_or_make(tar).rows
        return set()

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
        """Return the job that completes a shard; None if it is whole."""
        rows = self._rows(number)
        failed = {row for row in rows if row in self.failures}
        retry = bool(failed) and self.settings.retry_failed
        expected = set(rows) - failed
        missing = [name for name in self.plan.series if retry or self.held(name, number) != expected]
        if not missing:
            return None
        # A failed video is tried again only on request; a shard without any series tries all.
        skipped = set() if retry or len(missing) == len(self.plan.series) else failed
        return Job(
            shard=number,
            videos={row: self.catalogue.videos[row] for row in rows if row not in skipped},
            classes={label: i for i, label in enumerate(self.catalogue.dataset.classes)},
            series=tuple(missing),
            out=self.out,
            geometry=self.settings.geometry,
            time_limit=self.settings.time_limit,
            max_frames=self.settings.max_frames,
            max_pixels=self.settings.max_pixels,
            codec=self.settings.codec,
            estimators={name: plan["method"] for name in missing if "method" in (plan := self.plan.series[name])},
        )
