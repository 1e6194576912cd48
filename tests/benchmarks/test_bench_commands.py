"""The commands around the benchmarks: charts, the run of all, the rehearsal of the GPU's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as every
from benchmarks import chart, gpu, pretrain_speed, step
from benchmarks.measure import environment
from benchmarks.sides import gpu_checks
from shards_spec import ShardSet
from shards_spec.errors import ConfigError, FsarError

STORED = sorted(path.stem for path in chart.RESULTS.glob("*.json"))


def bars_of(name: str) -> list[chart.Bar]:
    content = json.loads((chart.RESULTS / f"{name}.json").read_text())
    return [bar for panel in chart.panels_of(name, content["rows"]) for bar in panel.bars]


@pytest.mark.parametrize("name", [name for name in STORED if name.partition("-")[0] in chart.CHARTS])
def test_stored_results_become_bars_with_ratio_and_share(name: str) -> None:
    bars = bars_of(name)
    assert {"ours", "usual", "bound"} & {bar.side for bar in bars} >= {"ours"}
    assert all(bar.value > 0 for bar in bars)
    assert any("bound" in bar.note or "usual" in bar.note for bar in bars if bar.side == "ours")


def test_bars_of_both_kinds_of_rows() -> None:
    tall = chart.Tall("rate", "1/s", group="output", bound="most")
    rows = [
        {"name": "a", "side": "ours", "output": 1, "rate": 8.0, "most": 10.0}
        | {"ratio_to_usual": 4.0, "part_of_bound": 0.8},
        {"name": "b", "side": "usual", "output": 2, "rate": 2.0},
    ]
    first, second = tall.panels(rows)
    assert [(bar.side, bar.value, bar.note) for bar in first.bars] == [
        ("ours", 8.0, "4 x usual, 80% of bound"), ("bound", 10.0, ""),
    ]  # fmt: skip
    assert [bar.label for bar in second.bars] == ["b"]
    wide = chart.Wide("", "ms", ("n",), {"usual": "u", "ours": "o", "bound": "b"})
    (panel,) = wide.panels([{"n": 1000, "u": 8.0, "o": 4.0, "b": 1.0}])
    assert [bar.note for bar in panel.bars] == ["", "2 x usual, 25% of bound", ""]
    assert panel.bars[0].label == "1,000 n: usual"
    guessed = chart.panels_of("new", [{"side": "ours", "what": "x", "steps_per_second": 1.0, "ratio": 3.0}])
    assert guessed == [chart.Panel("", "steps/s", [chart.Bar("ours, x", "ours", 1.0, "3 x usual")])]
    assert chart.panels_of("new", [{"accuracy": 0.5}]) == []


def test_a_chart_is_drawn_or_refused_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "episodes.json"
    path.write_text((chart.RESULTS / "episodes.json").read_text())
    if chart.is_available():
        drawn = chart.draw(path)
        assert drawn == tmp_path / "episodes.png"
        assert drawn.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(chart, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"pip install .fsar\[bench\]"):
        chart.draw(path)


@pytest.mark.parametrize("name", [name for name in every.BENCHMARKS if find_spec(f"benchmarks.{name}")])
def test_settings_of_make_bench_are_options_of_the_benchmark(name: str) -> None:
    module = import_module(f"benchmarks.{name}")
    module.main.make_context(name, list(every.BENCHMARKS[name]))


def test_a_benchmark_that_fails_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(every, "run", lambda module, *_: ran.append(module) or module != "benchmarks.index")
    assert every.main.main(["index", "step"], standalone_mode=False) == 1
    assert ran == ["benchmarks.index", "benchmarks.step"]
    with pytest.raises(ConfigError, match="no benchmark"):
        every.main.main(["indes"], standalone_mode=False)


@pytest.fixture
def setting(tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> gpu.Setting:
    monkeypatch.setattr(environment, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(gpu, "STEP_CLIPS", (3,))
    monkeypatch.setattr(gpu, "step_gflop", lambda *_: 1.0)  # that and the side's process have tests of their own
    monkeypatch.setattr(step, "matmul_rates", lambda _: dict.fromkeys(step.DTYPES, 100.0))
    timed = {"wall": 1.0, "cpu": 2.0, "system": 0.5, "faults": 3}
    monkeypatch.setattr(step, "measure_apart", lambda _job: {"rounds": [timed], "peak_mib": 1.0, "kept": False})
    return gpu.Setting(
        tmp_path, "cpu", tiny_path, trunk="tiny", size=32, way=2, queries=1, seconds=0.2, sides=("usual",)
    )


@pytest.mark.parametrize("part", ["waiting", "step", "loader", "training"])
def test_parts_for_a_gpu_run_on_a_cpu(setting: gpu.Setting, part: str) -> None:
    gpu.PARTS[part](setting)
    (result,) = (setting.out / "results").glob("*.json")
    rows = json.loads(result.read_text())["rows"]
    assert rows
    if part == "training":
        assert 0 < rows[0]["busy_share"] <= 1


def test_parts_run_apart_and_a_failure_is_told(setting: gpu.Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(gpu, "run", lambda *words: ran.append(words) or "step" not in words)
    words = gpu._words(setting)
    assert gpu.main.main(words, standalone_mode=False) == 1
    assert [each[2] for each in ran] == list(gpu.PARTS)
    gpu.main.make_context("gpu", [*ran[0][1:]])  # what a part is called with is understood


def test_new_results_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "RESULTS", tmp_path / "results")
    environment.RESULTS.mkdir()
    for name, age in (("old.json", 100.0), ("new.json", 300.0)):
        (environment.RESULTS / name).write_text("{}")
        os.utime(environment.RESULTS / name, (age, age))
    gpu.copy_new(tmp_path, 200.0)
    assert [path.name for path in tmp_path.glob("*.json")] == ["new.json"]


def test_a_step_that_waits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def waits() -> None:
        raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(FsarError, match="waits for the device: called"):
        gpu_checks.refuse_waiting(waits)
    assert modes == ["error", "default"]


def test_tests_of_a_gpu_cannot_be_skipped_where_one_is_required(tmp_path: Path) -> None:
    marked = "import pytest\n\n@pytest.mark.gpu\n@pytest.mark.skipif(True, reason='no CUDA')\ndef test(): pass\n"
    (tmp_path / "test_gpu.py").write_text(marked)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a CUDA device\n")
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", str(tmp_path)]
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests), str(tests / "helpers"), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"FSAR_REQUIRE_GPU": "1", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "FSAR_REQUIRE_GPU is set" in done.stdout


def test_ours_of_each_device_is_one_of_its_sides() -> None:
    assert step.OURS["cpu"] in [side.name for side in step.ON_CPU]
    assert step.OURS["cuda"] in [side.name for side in step.ON_GPU]


def test_the_speed_of_pretraining_is_set_against_its_parts(tiny_path: Path) -> None:
    config = pretrain_speed.settings("moco", "tiny3d", 32, 2, "cpu")
    config = replace(config, clip_frames=2, clip_stride=1, executor="portable", threads=1)
    with ShardSet.open(tiny_path) as shards:
        loop = pretrain_speed.Loop(config, shards, torch.device("cpu"))
        rows = pretrain_speed.measure(loop, rounds=1, seconds=0.001)
        loop.loader.close()
    ours, _, decode, compute = rows
    assert [row["side"] for row in rows] == ["ours", "between", "bound", "bound"]
    bound = 1 / (1 / decode["samples_per_second"] + 1 / compute["samples_per_second"])
    assert ours["bound_per_second"] == pytest.approx(bound, rel=0.01)
    assert ours["wait_ms"] + ours["views_ms"] + ours["compute_ms"] == pytest.approx(
        2000 / ours["samples_per_second"], rel=0.3
    )
    (panel,) = chart.panels_of("pretrain-speed", rows)
    assert [bar.side for bar in panel.bars] == ["ours", "bound", "between", "bound", "bound"]
    assert pretrain_speed.table(rows).count("moco: ") == 4
