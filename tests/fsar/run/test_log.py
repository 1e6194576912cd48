"""Logs of runs that somebody or a crash has damaged: what is no record is passed over, or dropped."""

from __future__ import annotations

from pathlib import Path

from fsar.run.folder import RunLog, read_log


def test_a_line_without_a_kind_is_no_record(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"kind": "val", "n": 1}\n{"n": 2}\n3\n')
    assert read_log(tmp_path) == [{"kind": "val", "n": 1}]


def test_a_last_line_that_is_no_text_is_dropped_when_the_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"kind": "val", "n": 1}\n{"n": 2, "\xff')
    with RunLog(tmp_path, 5):
        pass
    assert path.read_bytes() == b'{"kind": "val", "n": 1}\n'
