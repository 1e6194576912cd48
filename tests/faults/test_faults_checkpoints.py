"""Each call that writes a checkpoint or the log fails once; the run goes on from what was saved."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from folders import digests
from injector import DEATHS, Injector, in_child, in_shares, injected
from test_faults_writes import FAULTS, some_of

from fsar.checkpoints import load_state, save_state
from fsar.run.folder import RunLog, last_checkpoint
from shards_spec.errors import FsarError

STEPS = 4


def train(run: Path) -> None:
    """Take, log and save four steps from the last checkpoint on; `saved` holds the last number."""
    model = torch.nn.Linear(40, 30)
    last = last_checkpoint(run)
    start = int(load_state(last, model)["n"]) if last.exists() else 0
    if not start:
        torch.nn.init.zeros_(model.weight), torch.nn.init.zeros_(model.bias)
    with RunLog(run, start) as log:
        for n in range(start + 1, STEPS + 1):
            with torch.no_grad():
                model.weight.add_(n)
            log.write("train", n, loss=float(n))
            log.make_durable()
            if n % 2 == 0:
                save_state(last.with_name("best.safetensors"), model, None, {"n": n})
            save_state(last, model, None, {"n": n})
            (run.parent / "saved").write_text(str(n))


def check_whole(run: Path) -> None:
    saved = int((run.parent / "saved").read_text()) if (run.parent / "saved").exists() else 0
    for path in (run / "checkpoints").glob("*.safetensors"):
        model = torch.nn.Linear(40, 30)
        n = int(load_state(path, model)["n"])
        assert torch.equal(model.weight, torch.full((30, 40), float(n * (n + 1) // 2)))
        if path.stem == "last":
            assert n >= saved
            lines = [line for line in (run / "log.jsonl").read_text().splitlines() if line.endswith("}")]
            assert [json.loads(line)["n"] for line in lines][:n] == list(range(1, n + 1))
    assert not saved or last_checkpoint(run).exists()


def count_calls(tmp_path: Path) -> tuple[int, dict[str, str]]:
    run = tmp_path / "expected" / "run"
    run.parent.mkdir()
    with injected(Injector(run)) as injector:
        train(run)
    return injector.count, digests(run)


def befall(case: tuple[int, str], expected: dict[str, str], tmp_path: Path) -> None:
    at, fault = case
    run = tmp_path / f"case {os.getpid()}" / "run"
    run.parent.mkdir()
    injector = Injector(run, at=at, fault=fault)

    def once() -> None:
        with injected(injector):
            train(run)

    if fault in DEATHS:
        assert in_child(once) == -9
    else:
        with suppress(FsarError):  # to make a folder that is there may fail
            once()
    check_whole(run)
    train(run)
    assert {name: value for name, value in digests(run).items() if not name.endswith(".tmp")} == expected
    shutil.rmtree(run.parent)


@pytest.fixture(autouse=True)
def no_board(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write no events of TensorBoard, which decide nothing."""
    monkeypatch.setattr("fsar.run.folder._open_board", lambda *_: None)


def test_some_calls_fail(tmp_path: Path) -> None:
    count, expected = count_calls(tmp_path)
    for fault in FAULTS:
        for at in some_of(count, 4, salt=fault):
            befall((at, fault), expected, tmp_path)


@pytest.mark.faults
def test_every_call_fails(tmp_path: Path) -> None:
    count, expected = count_calls(tmp_path)
    cases = [(at, fault) for at in range(count) for fault in FAULTS]
    done = in_shares(cases, lambda case: befall(case, expected, tmp_path))
    print(f"\ncheckpoints: {done} of {len(cases)} faults at all {count} calls ({', '.join(FAULTS)})", end="")
