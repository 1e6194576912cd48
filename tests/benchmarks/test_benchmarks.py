"""The benchmarks compare like with like: the usual way delivers the same frames as ours."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path

import click
import numpy as np
import pytest
import simplejpeg
import torch
from conftest import SPLITS

from benchmarks import episodes, frozen, methods, preprocess, step
from benchmarks.measure.bounds import CopyBound, DaliBound, PortableBound, payloads_of
from benchmarks.measure.timing import Contestant, cpu_seconds, on_cores, time_in_turn, warm_up
from benchmarks.sides import step_counts, step_side
from benchmarks.sides.usual import DecordEpisodes, clips_of_plan
from pipelines.decoding.dali import dali_is_installed
from pipelines.episodes.rules import EpisodeRules
from preprocess.datasets.folder import folder_catalogue
from preprocess.decode import Geometry
from preprocess.stage import Settings
from preprocess.stage import preprocess as preprocess_videos
from shards_spec import ShardSet
from shards_spec.errors import ConfigError

needs_decord = pytest.mark.skipif(importlib.util.find_spec("decord") is None, reason="decord is not installed")
RULES = EpisodeRules(way=2, queries=2, frames=4, random_frames=True, resize=64, crop=56, random_crop=True, groups="any")


@pytest.fixture
def setting(tiny_shards: ShardSet, tiny_videos: Path) -> episodes.Setting:
    return episodes.Setting(tiny_shards, tiny_videos, "train", RULES, 1, torch.device("cpu"))


def usual_episode(setting: episodes.Setting, n: int, output: str) -> torch.Tensor:
    clips = episodes.usual_clips(setting, n + 1)
    return DecordEpisodes(clips, output=output, resize=64, crop=56)[n]


def check_same_frames(usual: torch.Tensor, ours: torch.Tensor, *, close: float) -> None:
    """Both [V, T, ...] in grey levels: each frame is close to ours, and no other frame of the episode is closer."""
    assert usual.shape == ours.shape
    flat, other = usual.flatten(2).flatten(0, 1), ours.flatten(2).flatten(0, 1)  # [V T, pixels]
    distance = torch.cdist(flat.double(), other.double(), p=1) / flat.shape[1]  # [V T, V T] mean difference
    assert distance.diagonal().max() < close
    assert torch.equal(distance.argmin(1), torch.arange(len(flat)))


@needs_decord
@pytest.mark.parametrize("n", range(3))
def test_usual_float_equals_ours(setting: episodes.Setting, n: int) -> None:
    with episodes._ours(setting, "portable") as loader:
        (episode,) = loader.episodes(n, n + 1)
    ours = torch.cat([episode.support.flatten(0, 1), episode.query])  # [V, T, 3, 56, 56]
    usual = usual_episode(setting, n, "float32")
    assert usual.dtype == ours.dtype == torch.float32
    check_same_frames(usual * (0.225 * 255), ours * (0.225 * 255), close=6.0)


@needs_decord
def test_usual_bytes_equal_ours(setting: episodes.Setting) -> None:
    with episodes._ours(setting, "portable") as loader:
        ((plan, frames, _),) = loader.background.frames(loader.stream, 0, 1)
    views = plan.support + plan.query
    ours = torch.stack([frames[view.reads][list(view.indices)] for view in views])  # [V, T, 56, 56, 3]
    usual = usual_episode(setting, 0, "uint8")
    assert usual.dtype == ours.dtype == torch.uint8
    check_same_frames(usual, ours, close=6.0)


@needs_decord
def test_jitter_is_the_same_on_both_sides(setting: episodes.Setting) -> None:
    setting = setting.with_jitter()
    with episodes._ours(setting, "portable") as loader:
        (episode,) = loader.episodes(0, 1)
    usual = usual_episode(setting, 0, "float32")  # two support clips come first, which are not jittered
    check_same_frames(usual[:2] * (0.225 * 255), episode.support[:, 0] * (0.225 * 255), close=6.0)
    check_same_frames(usual[2:] * (0.225 * 255), episode.query * (0.225 * 255), close=12.0)  # colours amplified


def test_another_folder_of_videos_is_refused(setting: episodes.Setting, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="same data set"):
        clips_of_plan(setting.stream().plan(0), setting.shards, tmp_path)


def test_the_sequential_reader_makes_clips_of_all_videos_and_goes_round(setting: episodes.Setting) -> None:
    dataset = episodes._sequential(setting).loader.dataset  # what its worker processes go through
    count = setting.shards.num_videos
    clips = list(islice(dataset, count + 1))
    assert clips[0].shape == (4, 56, 56, 3)
    assert torch.equal(clips[count], clips[0])
    first = setting.shards.series("rgb").read(0, [0])[0]
    frame = simplejpeg.decode_jpeg(first, "RGB", fastdct=False, fastupsample=False)
    assert np.array_equal(clips[0][0], frame[4:60, 4:60])


@needs_decord
def test_episodes_benchmark_runs(setting: episodes.Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(episodes, "PLANNED", 2)
    with ExitStack() as stack:
        entries = episodes.contestants(setting, stack)
        usual = [entry for entry in entries if entry[1] == "usual"][:1]  # each starts a process of its own
        others = [entry for entry in entries if entry[1] != "usual"]
        every = [contestant for *_, contestant in others + usual]
        counts = warm_up(every, seconds=0.001, workers=1, least=1)
        timings = time_in_turn(every, rounds=1, counts=counts)
    assert {each.name for each in every} == set(timings)
    assert all(timing.rate > 0 for timing in timings.values())


def test_bounds_decode_every_payload(setting: episodes.Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = [setting.stream().plan(n) for n in range(2)]
    seen: list[bytes] = []
    monkeypatch.setattr(
        "benchmarks.measure.bounds.simplejpeg.decode_jpeg", lambda payload, *_, **__: seen.append(payload)
    )
    with PortableBound([plan.reads for plan in plans], setting.shards, threads=2) as bound:
        bound.run(3)
    expected = [payload for plan in (*plans, plans[0]) for payload in payloads_of(plan.reads, setting.shards)]
    assert sorted(seen) == sorted(expected)


@pytest.mark.skipif(not dali_is_installed(), reason="DALI is not installed")
def test_dali_bound_delivers_what_is_asked(setting: episodes.Setting) -> None:
    reads = [setting.stream().plan(n).reads for n in range(2)]
    bound = DaliBound(reads, setting.shards, threads=1, device=setting.device)
    runs = []
    original = bound._pipeline.run
    bound._pipeline.run = lambda: runs.append(original())
    bound.run(3)
    bound.run(2)
    assert len(runs) == 5
    assert np.asarray(runs[0][0].at(0)).shape == (56, 56, 3)


def test_raw_rows_run_and_copy_the_windows_that_the_loader_gives(
    setting: episodes.Setting, tiny_videos: Path, tmp_path: Path
) -> None:
    catalogue = folder_catalogue(tiny_videos, name="tiny", classes=SPLITS, group=r"_g(\d+)_")
    preprocess_videos(catalogue, tmp_path / "raw", Settings(Geometry(64, 64), motion=(), codec="raw"))
    with ExitStack() as stack:
        raw = episodes.open_raw(tmp_path / "raw", setting.shards, stack)
        with_raw = replace(setting, raw=raw)
        loader = stack.enter_context(episodes._ours(with_raw, "raw"))
        ((_, frames, _),) = loader.background.frames(loader.stream, 1, 2)
        episodes._run_episodes(loader)(2)
        bound = stack.enter_context(CopyBound([with_raw.stream().plan(1)], raw, threads=2))
        bound.run(2)
    expected = frames[0].numpy().ravel()
    for copied in bound._out:
        assert np.array_equal(copied[: len(expected)], expected)
    with ExitStack() as stack, pytest.raises(ConfigError, match="no raw shard set of the videos"):
        episodes.open_raw(setting.shards.path, setting.shards, stack)


def test_ratios_and_bounds() -> None:
    def row(name: str, output: str, side: str, rate: float) -> dict[str, object]:
        return {"name": name, "output": output, "side": side, "episodes_per_second": rate}

    rows = episodes._with_bounds(
        [
            row("ours, portable, uint8", "uint8", "ours", 20.0),
            row("ours, portable, float32", "float32", "ours", 10.0),
            row("usual, a", "float32", "usual", 1.0),
            row("usual, b", "float32", "usual", 2.0),
            row("usual, c", "uint8", "usual", 4.0),
            row("bound, portable, decoding alone", "uint8", "bound", 40.0),
            row("bound, writing float32 alone", "float32", "part", 40.0),
            row("ours, raw, uint8", "uint8", "ours", 60.0),
            row("ours, raw, float32", "float32", "ours", 30.0),
            row("bound, raw, copying windows alone", "uint8", "bound", 80.0),
        ]
    )
    found = {row["name"]: (row.get("ratio_to_usual"), row.get("part_of_bound")) for row in rows}
    assert found["ours, portable, uint8"] == (5.0, 0.5)
    assert found["ours, portable, float32"] == (5.0, 0.5)  # the fastest usual way; half of 1 / (1/40 + 1/40)
    assert found["ours, raw, uint8"] == (15.0, 0.75)
    assert found["ours, raw, float32"] == (15.0, 0.75)


def test_contestants_run_in_turn() -> None:
    calls: list[str] = []
    every = [Contestant(name, lambda _, name=name: calls.append(name)) for name in "abc"]
    timings = time_in_turn(every, rounds=2, counts=[1, 2, 4])
    assert "".join(calls) == "abccba"
    assert timings["c"].rates == [4 / seconds for seconds in timings["c"].wall]


def test_cpu_seconds_counts_this_process() -> None:
    before = cpu_seconds()
    while cpu_seconds() == before:
        sum(range(100_000))
    assert cpu_seconds() > before


def test_on_cores_holds_what_runs_and_what_starts() -> None:
    allowed = os.sched_getaffinity(0)
    sleeper = subprocess.Popen(["sleep", "60"])
    with on_cores(1):
        assert len(os.sched_getaffinity(0)) == len(os.sched_getaffinity(sleeper.pid)) == 1
    assert os.sched_getaffinity(0) == os.sched_getaffinity(sleeper.pid) == allowed
    sleeper.kill()
    sleeper.wait()


def test_preprocess_benchmark_runs(tiny_videos: Path, tmp_path: Path) -> None:
    for label in ("ant", "bee"):
        (tmp_path / "videos" / label).mkdir(parents=True)
        for path in sorted((tiny_videos / label).iterdir())[:2]:
            shutil.copy(path, tmp_path / "videos" / label)
    (tmp_path / "scratch").mkdir()
    with ExitStack() as stack:
        work = preprocess.prepare(tmp_path / "videos", tmp_path / "scratch", [1], stack)
        rows, context = preprocess.measure(work, [1], rounds=1)
    assert (context["videos"], context["video_frames"]) == (4, 2 * (12 + 15))
    assert {row["cores"] for row in rows} == {1, preprocess.CORES}
    files = {(row["side"], row["product"]): row.get("files") for row in rows}
    assert files["usual", preprocess.FRAMES] == 54
    assert files["usual", preprocess.USUAL_FLOW] == 54 + 2 * (54 - 4)
    ratios = {row["product"] for row in rows if "ratio_to_usual" in row}
    assert ratios == {preprocess.FRAMES, preprocess.FLOW}
    flow = [row for row in rows if row["side"] == "ours" and row["product"] == preprocess.FLOW]
    assert all(row["part_of_bound"] > 0 and row["part_of_dis"] > 0 for row in flow)
    assert flow[-1]["speed_up"] == 1


@pytest.mark.parametrize("case", methods.CASES, ids=lambda case: f"{case.method}-{case.scope}")
def test_both_orders_give_the_same_logits_and_gradients(case: methods.Case) -> None:
    sizes = methods.Sizes(way=3, shot=2, queries=4, frames=5, channels=64)
    methods.Work(case, sizes, torch.device("cpu")).check()


def test_methods_benchmark_runs() -> None:
    case = next(case for case in methods.CASES if (case.method, case.scope) == ("trx", "head"))
    sizes = methods.Sizes(way=2, shot=2, queries=4, frames=8, channels=256)
    rows = methods.measure(case, sizes, torch.device("cpu"), rounds=1, seconds=0.0)
    assert [row["name"] for row in rows] == ["trx, head, forward", "trx, head, forward+backward"]
    assert all(0 < row["ours_gflop"] < row["reference_gflop"] for row in rows)
    assert all(row["ours_kept_mib"] > 0 for row in rows)


def test_steps_are_counted_without_values():
    small = step_side.Sizes(way=2, queries=2, frames=4, size=160)
    recomputed, plain = (step_counts.peak_gib("fp32", recomputes, small) for recomputes in (5, 0))
    assert 0 < recomputed < plain
    twice, whole = (step_counts.step_gflop(recomputes, small) for recomputes in (5, 0))
    assert 1.2 * whole < twice < 1.4 * whole  # the forward pass again


def test_a_side_is_measured_in_a_process_of_its_own():
    sizes = step_side.Sizes(way=2, queries=2, frames=2, size=32)
    found = step_side.measure_apart(step_side.Job(step.ON_CPU[2], sizes, "cpu", 1, threads=1, profiled=True))
    (timed,) = found["rounds"]
    assert timed["wall"] > 0
    assert found["peak_mib"] > 100
    assert found["profile"]["convolutions"] > 0
    with pytest.raises(click.ClickException, match=r"usual: .*nowhere"):
        step_side.measure_apart(step_side.Job(step.USUAL, sizes, "nowhere", 1))
    counts = step_counts.Counts({False: 1.0}, {("fp32", False): 1.0}, [])
    row = step._row(step.USUAL, sizes, found, counts, rate=1.0) | {"ratio": 1.0}
    assert row["name"] in step.table([row])


def test_sides_are_chosen_by_name():
    assert [side.name for side in step.choose_sides("cpu", [step.OURS["cpu"]])] == ["usual", step.OURS["cpu"]]
    with pytest.raises(ConfigError, match="no side"):
        step.choose_sides("cpu", ["no such"])


def test_both_sides_of_a_frozen_trunk_are_stepped(tmp_path: Path) -> None:
    setting = frozen.Setting("tiny", step_side.Sizes(way=2, queries=2, frames=4, size=32), torch.device("cpu"))
    assert frozen.learning_methods(setting) == ["molo", "hyrsm", "hyrsm++", "trx", "ctx", "clip-fsar"]
    for method in ("molo", "hyrsm"):
        sides = [frozen.Usual(method, setting), frozen.Cached(method, setting, tmp_path / method)]
        for side in sides:
            side.run(2)
            assert side.step.read().counted == 2
        trunk = sides[1].step.model.trunk
        assert all(parameter.grad is None for parameter in trunk.parameters())
        assert any(parameter.grad is not None for parameter in sides[1].step.parameters)
