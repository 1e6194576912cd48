"""The one loop of all trainings: what is due after which step, the log, the end of a bad run."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

from fsar.run.folder import RunLog
from fsar.training.loop import Batch, Loop, Progress
from fsar.training.step import Reading
from shards_spec.errors import FsarError


class Counting:
    """A trainer that notes the calls of the loop; from batch `bad` on no loss is finite."""

    def __init__(self, run: Path | None, *, total: int, n: int = 0, stride: int = 1, bad: int = 99) -> None:
        self.model, self.run, self.progress = torch.nn.Linear(1, 1).eval(), run, Progress(n=n)
        self.total, self.stride, self.bad = total, stride, bad
        self.calls: list[str] = []
        self.waiting = self.longest = 0

    def batches(self) -> Generator[Batch]:
        for number in range(self.progress.n, self.total, self.stride):
            yield Batch(number, None, 2, 0.0)
        self.calls.append("closed")

    def train_step(self, n: int, _: None) -> None:
        assert self.model.training
        self.waiting += 1
        self.longest += n >= self.bad

    def read(self) -> Reading:
        reading = Reading({"loss": 3.0 * self.waiting}, self.waiting, longest=self.longest)
        self.waiting = 0
        return reading

    def log_values(self, n: int) -> dict[str, float]:
        return {"lr": n / 10}

    def validate(self, _: RunLog) -> None:
        self.calls.append(f"validate {self.progress.n}")

    def save(self) -> None:
        self.calls.append(f"save {self.progress.n}")


def loop_of(trainer: Counting, **options) -> Loop:
    every = {"log_every": 2, "save_every": 4} | options
    return Loop(trainer, total=trainer.total, unit="step", items="clips", stride=trainer.stride, **every)


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_log_validation_and_checkpoint_come_when_due_and_at_the_end(tmp_path: Path) -> None:
    trainer = Counting(tmp_path, total=9)
    loop_of(trainer, validate=trainer.validate, validate_every=3).train()
    assert trainer.calls == [
        *("validate 3", "save 3", "save 4", "validate 6", "save 6", "save 8"),
        *("validate 9", "save 9", "closed"),
    ]
    log = records(tmp_path)
    assert [record["n"] for record in log] == [2, 4, 6, 8, 9]
    assert {(record["loss"], record["lr"]) for record in log} == {(3.0, n / 10) for n in (2, 4, 6, 8, 9)}
    assert set(log[0]) == {"kind", "n", "loss", "lr", "clips_per_s", "data_wait", "memory_mb"}


def test_a_step_of_several_processes_may_pass_an_interval(tmp_path: Path) -> None:
    trainer = Counting(tmp_path, total=12, stride=3)
    loop_of(trainer).train()
    assert trainer.calls == ["save 6", "save 9", "save 12", "closed"]
    assert [record["n"] for record in records(tmp_path)] == [3, 6, 9, 12]


def test_a_resumed_loop_drops_what_the_log_has_of_later_steps(tmp_path: Path) -> None:
    loop_of(Counting(tmp_path, total=8)).train()
    loop_of(Counting(tmp_path, total=8, n=4)).train()
    assert [record["n"] for record in records(tmp_path)] == [2, 4, 6, 8]


def test_the_log_may_count_epochs(tmp_path: Path) -> None:
    loop_of(Counting(tmp_path, total=6), log_every=3, save_every=3, log_unit=3).train()
    assert [record["n"] for record in records(tmp_path)] == [1, 2]


def test_without_a_folder_nothing_is_written() -> None:
    trainer = Counting(None, total=4)
    loop_of(trainer).train()
    assert trainer.calls == ["closed"]
    assert trainer.progress.n == 4


def test_a_loss_that_stays_not_finite_ends_the_run_before_its_next_checkpoint(tmp_path: Path) -> None:
    trainer = Counting(tmp_path, total=40, bad=6)
    with pytest.raises(FsarError, match="the loss of 4 steps in a row is not finite; lower --lr"):
        loop_of(trainer, most_skipped=3).train()
    assert trainer.calls[-1] == "save 8"
    assert trainer.progress.n == 10
