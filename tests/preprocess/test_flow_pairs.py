"""Flow of pairs of frames further apart, with motion scores: `flow8g2` and its like."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from folders import command_line, decode, digests, shown, stamps
from test_encode import planes, rms
from videos import moving_frames, texture, write_video

from pipelines.clips.flow import chosen_offsets
from preprocess.cli import cli
from preprocess.datasets.folder import folder_catalogue
from preprocess.decode import Geometry
from preprocess.encode.flow_estimators import DIS, create_estimator
from preprocess.encode.motion_scores import frame_scores
from preprocess.encode.series import create_encoder, quantise
from preprocess.stage import Settings, preprocess
from shards_spec import ShardError, ShardSet
from shards_spec.cli.shards import cli as shards_cli
from shards_spec.errors import ConfigError, FsarError
from shards_spec.pictures import decode_picture, flow_field
from shards_spec.schema import adding_command, flow_pairs, is_motion
from shards_spec.verify import verify

MOTION = ("diff", "flow", "flow4g3")
OWN = """
import numpy as np

def half(before, after):
    assert before.shape == after.shape == (64, 64, 3) and before.dtype == np.uint8
    return (after.astype(np.float32) - before)[::2, ::2, :2]

def small(before, after):
    return half(before, after)[:20]

def wrong(before, after):
    return half(before, after)[0]

def broken(before, after):
    raise RuntimeError("no more memory")
"""


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four videos of 16, 13, 7 and 3 frames that turn round half-way, and a file without video."""
    folder = tmp_path_factory.mktemp("turning")
    for n, count in enumerate((16, 13, 7, 3)):
        there = moving_frames(n, count - count // 2, size=(48, 64), step=3)
        write_video(folder / "ab"[n % 2] / f"{n}.mp4", np.concatenate([there, there[::-1][: count // 2]]))
    (folder / "b" / "broken.avi").write_text("no video")
    return folder


@pytest.fixture(scope="module")
def whole(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set with all series, made at once by one worker."""
    out = tmp_path_factory.mktemp("whole") / "set"
    run(videos, out, MOTION, workers=1)
    return out


def run(videos: Path, out: Path, motion: tuple[str, ...], **options: object) -> None:
    settings = {"rows_per_shard": 2, "workers": 2} | options
    preprocess(folder_catalogue(videos), out, Settings(Geometry(64, 64), motion, **settings))


def command(videos: Path, out: Path, *args: object) -> list[str]:
    return [str(a) for a in ["folder", "--videos", videos, "--out", out, "--size", 64, "--rows-per-shard", 2, *args]]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of estimators."""
    (tmp_path / "own_flow.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_flow", raising=False)
    return "own_flow"


@pytest.mark.parametrize(("displacement", "grid"), [(8, 2), (1, 1), (2, 5), (3, 1)])
def test_fields_go_from_each_frame_of_the_grid(displacement: int, grid: int) -> None:
    rng = np.random.default_rng(3)
    frames = [planes(texture(rng, 64, 96)) for _ in range(13)]
    encoder, dis = create_encoder(f"flow{displacement}g{grid}"), create_estimator(DIS)
    for frame in frames:
        encoder.add(frame)
    firsts = list(range(0, 13 - displacement, grid))
    fields = [dis.flow(frames[i].y, frames[i + displacement].y) for i in firsts]
    stored, info = encoder.members(), encoder.info()
    assert list(stored) == [f"{i:05d}.jpg" for i in firsts]
    assert info["size"] == [128, 96]
    for field, payload, scale in zip(fields, stored.values(), info["scale"], strict=True):
        code, expected = quantise(np.concatenate([field[..., 0], field[..., 1]]))
        assert scale == expected
        assert rms(decode(payload).astype(int) - code) < 3
    np.testing.assert_allclose(info["motion_score"], frame_scores(fields), atol=1e-4)
    assert info["motion_score"][-1] == 0 < min(info["motion_score"][:-1])


def test_flow1_is_the_pair_of_neighbours_without_scores() -> None:
    both = [create_encoder("flow1"), create_encoder("flow1g1")]
    for frame in moving_frames(1, 4, size=(64, 64)):
        for encoder in both:
            encoder.add(planes(frame))
    assert both[0].members() == both[1].members()
    assert both[1].info().keys() - both[0].info().keys() == {"motion_score"}


def test_a_series_added_later_touches_nothing_else(videos: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    run(videos, out, ("diff", "flow"))
    before, held = digests(out), stamps(out, "*-*") | stamps(out, "[df]a*")
    with ShardSet.open(out) as shards, pytest.raises(ShardError, match="again with --motion flow4g3"):
        shards.series("flow4g3")
    run(videos, out, ("flow4g3",))
    after = digests(out)
    assert (stamps(out, "*-*") | stamps(out, "[df]a*")).items() >= held.items()
    changed = {name for name in before if after.get(name) != before[name]}
    assert changed <= {"plan.json", "index.zarr/zarr.json"}  # its attributes name the new columns
    assert after == digests(whole)


def test_workers_and_cpu_do_not_matter(videos: Path, whole: Path, tmp_path: Path) -> None:
    slow = {"NPY_DISABLE_CPU_FEATURES": "AVX512F AVX512_SKX X86_V4 X86_V3", "OPENCV_CPU_DISABLE": "AVX2"}
    args = command(videos, tmp_path / "set", "--motion", ",".join(MOTION), "--workers", 3)
    assert command_line(*args, **slow).returncode == 3
    assert digests(tmp_path / "set") == digests(whole)


def test_scores_are_read_from_the_index(whole: Path) -> None:
    with ShardSet.open(whole) as shards:
        series = shards.series("flow4g3")
        assert [series.kept(row).tolist() for row in range(5)] == [[0, 3, 6, 9], [0], [0, 3, 6], [], []]
        for row in range(5):
            scores = series.scores(row)
            assert scores.dtype == np.float32
            assert scores.shape == series.kept(row).shape
            assert (scores[:-1] > 0).all()
            assert (scores[-1:] == 0).all()
        assert "motion_score" not in shards.columns("flow1")
        with pytest.raises(ShardError, match=r"flow1 has no motion scores; .*typed again with --motion flow8g2"):
            shards.series("flow1").scores(0)
        payload = decode_picture(series.read(0, [0])[0], series.name, 0)
        field = flow_field(payload, float(series.scale(0)[0]))
        assert np.median(field[..., 0]) == pytest.approx(-4 * 3, abs=1.5)  # the picture slides to the left


def test_reindexed_from_the_tars_it_is_the_same(videos: Path, tmp_path: Path) -> None:
    run(videos, tmp_path / "set", ("flow4g3",))
    before = digests(tmp_path / "set")
    (tmp_path / "set" / "flow4g3-000000.json").unlink()
    assert verify(tmp_path / "set")
    result = CliRunner().invoke(shards_cli, ["reindex", str(tmp_path / "set")])
    assert result.exit_code == 0, result.output
    assert digests(tmp_path / "set") == before
    assert verify(tmp_path / "set") == []
    column = next((tmp_path / "set" / "index.zarr/series/flow4g3/motion_score").rglob("c/0"))
    column.write_bytes(column.read_bytes()[:-1] + b"?")
    assert any("motion_score" in line for line in verify(tmp_path / "set"))


def test_sheets_show_the_field_at_or_before_a_frame(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = shown(whole, "a/0.mp4", "flow4g3", monkeypatch)  # 12 of its 16 frames
    assert row.numbers[1:4] == ["0 to 4", "3 to 7", "3 to 7"]
    assert [picture is None for picture in row.pictures] == ["to" not in number for number in row.numbers]
    assert row.numbers[-1] == "15"  # which no field starts at or covers


def test_an_estimator_of_ones_own(videos: Path, tmp_path: Path, own: str) -> None:
    """Its name is in the plan; other series keep theirs."""
    out, args = tmp_path / "set", {"flow_estimator": f"{own}:half"}
    run(videos, out, ("flow",))
    run(videos, out, ("flow4g3",), **args)
    with pytest.raises(ShardError, match=r"flow4g3.method is 'own_flow:half', asked for 'DIS medium'"):
        run(videos, out, ("flow4g3",))
    with pytest.raises(ShardError, match=r"flow1.method is 'DIS medium', asked for 'own_flow:half'"):
        run(videos, out, ("flow",), **args)
    before = digests(out)
    (out / "flow4g3-000000.tar").unlink()
    run(videos, out, ())  # its name comes from the plan
    assert digests(out) == before
    with ShardSet.open(out) as shards:
        assert shards.series("flow4g3").sizes[0].tolist() == [64, 32]
        assert shards.series("flow1").sizes[0].tolist() == [128, 64]
        assert np.isfinite(shards.series("flow4g3").scores(0)).all()


def test_fields_too_small_for_scores_are_still_flow(videos: Path, tmp_path: Path, own: str) -> None:
    run(videos, tmp_path / "set", ("flow4g3",), flow_estimator=f"{own}:small")
    with ShardSet.open(tmp_path / "set") as shards:
        series = shards.series("flow4g3")
        assert np.isnan(series.scores(0)).all()
        assert len(series.scores(0)) == len(series.scale(0)) == 4
        assert chosen_offsets(series.scores(0), stride=1, length=2).size == 0  # any clip will do
    assert verify(tmp_path / "set") == []


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("wrong", r'"own_flow:wrong" gave float32 \[32, 2\]; it must give finite float32'),
        ("broken", r"\"own_flow:broken\" failed: RuntimeError\('no more memory'\)"),
        ("absent", r'"own_flow:absent" cannot be imported'),
    ],
)
def test_estimators_that_do_not_fit_are_refused(
    videos: Path, tmp_path: Path, own: str, name: str, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        run(videos, tmp_path / "set", ("flow4g3",), flow_estimator=f"{own}:{name}")
    assert not list((tmp_path / "set").glob("*.tmp"))
    assert not (tmp_path / "set" / "index.zarr").exists()


def test_names_of_motion(videos: Path, tmp_path: Path) -> None:
    assert [flow_pairs(name) for name in ("flow8g2", "flow1", "diff1", "flow8", "flow0g1", "flow8g0")] == [
        (8, 2), (1, 1), None, None, None, None,
    ]  # fmt: skip
    assert all(map(is_motion, ("diff", "flow", "diff1", "flow1", "flow16g4")))
    assert not any(map(is_motion, ("rgb", "diff8g2", "flow2", "none")))
    assert adding_command("flow1", "out").endswith("made out, typed again with --motion flow")
    assert adding_command("flow8g2", "out").endswith("--motion flow8g2")
    assert adding_command("flwo1", "out").endswith("--motion diff, flow or flow8g2")
    for args, sentence in (
        (["--motion", "flow8"], "known: diff, flow, flow8g2, none); flow8g2 stands for any flowDgG"),
        (["--motion", "diff", "--flow-estimator", "a:b"], "--motion names none"),
        (["--flow-estimator", "raft"], "give module:function"),
    ):
        with pytest.raises(FsarError) as refused:
            CliRunner().invoke(cli, command(videos, tmp_path / "set", *args), catch_exceptions=False)
        assert sentence in str(refused.value)
