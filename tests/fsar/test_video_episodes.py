"""Video trunks in few-shot use: the frames of their clips, episodes of clips, methods that read them."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from fake_shards import FakeShards
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import call, words

from fsar import EpisodeLoader, EpisodeRules, create_method
from fsar.cli.cluster import cli as cluster_cli
from fsar.cli.compare import frames_text
from fsar.cli.train import cli as train_cli
from fsar.evaluation.embeddings import embed_rows, shuffle_clips
from fsar.run.build import build_model
from fsar.run.config import build_config
from fsar.trunks.video import ThinResNet18
from pipelines.draw import PhiloxDraw
from pipelines.episodes.stream import EpisodeStream
from pipelines.sampling import frame_rule, segment_clips
from shards_spec.errors import ConfigError, ShardError

RULES = EpisodeRules(
    way=2, shot=2, queries=1, frames=3, frame_rule="segment_clips", clip_frames=4, clip_stride=2, resize=64, crop=32
)
CLIPS = {"frame_rule": "segment_clips", "clip_frames": 4, "clip_stride": 2}


def chosen(length, *, steps, clip, stride, seed=None) -> np.ndarray:
    """[steps, clip] frame numbers, at the centres without a seed."""
    rule = frame_rule("segment_clips", clip=clip, stride=stride)
    frames = rule(PhiloxDraw(seed or 0, 0), length, steps=steps, random_frames=seed is not None)
    return np.array(frames).reshape(steps, clip)


@settings(max_examples=300)
@given(
    st.integers(1, 400),
    st.integers(1, 9),
    st.integers(1, 16),
    st.integers(1, 8),
    st.one_of(st.none(), st.integers(0, 2**32)),
)
def test_a_clip_lies_in_its_segment_or_covers_it(length, steps, clip, stride, seed) -> None:
    frames, span = chosen(length, steps=steps, clip=clip, stride=stride, seed=seed), (clip - 1) * stride + 1
    assert ((frames >= 0) & (frames < length)).all()
    if length < span:  # from the beginning, and the last frame repeated
        assert (frames == np.minimum(np.arange(clip) * stride, length - 1)).all()
        return
    assert (np.diff(frames, axis=1) == stride).all()
    for number, (start, end) in enumerate(frames[:, [0, -1]].tolist()):
        first, after = number * length // steps, (number + 1) * length // steps
        if span <= after - first:
            assert first <= start
            assert end < after
        elif after > first:
            assert start <= first
            assert end >= after - 1


def test_centres_and_starts_of_clips() -> None:
    assert chosen(30, steps=3, clip=4, stride=2).tolist() == [[1, 3, 5, 7], [11, 13, 15, 17], [21, 23, 25, 27]]
    assert chosen(12, steps=2, clip=5, stride=2).tolist() == [[0, 2, 4, 6, 8], [3, 5, 7, 9, 11]]  # kept in the video
    starts = {int(chosen(30, steps=3, clip=4, stride=2, seed=seed)[1, 0]) for seed in range(1, 100)}
    assert starts == {10, 11, 12, 13}
    assert segment_clips(PhiloxDraw(0, 0), 9, steps=3, random_frames=False) == [1, 4, 7]  # clips of one frame


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"clip_frames": 0}, "clip_frames 0 and clip_stride 2: give at least 1 of both"),
        ({"clip_stride": 0}, "clip_frames 4 and clip_stride 0: give at least 1 of both"),
        ({"frame_rule": "segment"}, 'takes no clips of 4 frames: use frame rule "segment_clips"'),
    ],
)
def test_a_rule_and_clips_that_do_not_go_together(change, says) -> None:
    with pytest.raises(ConfigError, match=says):
        dataclasses.replace(RULES, **change)


def test_shards_that_leave_frames_out_are_refused(monkeypatch) -> None:
    shards = FakeShards()
    assert EpisodeStream(shards, "all", RULES, seed=0).short_videos == 0  # 12 frames at least, and 7 are needed
    longer = dataclasses.replace(RULES, clip_stride=5)
    assert EpisodeStream(shards, "all", longer, seed=0).short_videos == int((shards.frames < 16).sum()) > 0
    monkeypatch.setattr(shards.rgb, "kept", lambda row: np.arange(0, 2 * shards.frames[row], 2))
    with pytest.raises(ShardError, match=r"needs every frame .* 12 of at least 23 .* with fsar-preprocess"):
        EpisodeStream(shards, "all", RULES, seed=0)
    EpisodeStream(shards, "all", EpisodeRules(frames=3), seed=0)


@pytest.mark.parametrize("random_views", [False, True])
def test_an_episode_of_clips_holds_the_frames_of_its_plan(random_views) -> None:
    rules = dataclasses.replace(RULES, random_frames=random_views, query_flip=random_views)
    single = dataclasses.replace(rules, frames=1, frame_rule="segment", clip_frames=0, clip_stride=1)
    with EpisodeLoader(FakeShards(), "all", rules, executor="portable", threads=1) as loader:
        ((plan, episode, _),) = loader.planned(4, 5)
    assert episode.support.shape == (2, 2, 3, 4, 3, 32, 32)  # [way, shot, S, clip, 3, H, W]
    assert episode.query.shape == (2, 3, 4, 3, 32, 32)
    with EpisodeLoader(FakeShards(), "all", single, executor="portable", threads=1) as loader:
        view = plan.support[2]
        pixels = loader.executor.decode(plan.reads[view.reads])
        frame = loader._rendered(dataclasses.replace(plan, support=(view,), query=()), [pixels])[0]
    assert torch.equal(episode.support[1, 0, 1, 2], frame[1 * 4 + 2])


@pytest.mark.parametrize("shuffled", [False, True])
def test_evaluation_embeds_the_clips_of_its_episodes(shuffled) -> None:
    torch.manual_seed(0)
    model = create_method("otam", trunk=ThinResNet18(), frames=3).eval()
    look = {"mean": model.trunk.mean, "std": model.trunk.std}
    with EpisodeLoader(FakeShards(), "all", RULES, executor="portable", threads=1, **look) as loader:
        ((plan, episode, _),) = loader.planned(0, 1)
        embedded = embed_rows(loader, model, plan.query_rows, shuffled=shuffled)
    clips = shuffle_clips(episode.query, plan.query_rows.tolist()) if shuffled else episode.query
    with torch.no_grad():
        direct = model.embed(model.trunk(clips))
    assert torch.allclose(embedded.tokens, direct.tokens, rtol=1e-4, atol=1e-5)


def test_shuffled_frames_are_mixed_throughout_the_video() -> None:
    clips = torch.arange(24.0).reshape(2, 3, 4, 1, 1, 1)  # [V, S, clip, 3, H, W] but for the sizes
    mixed = shuffle_clips(clips, [5, 6])
    assert mixed.shape == clips.shape
    assert mixed[0].flatten().sort().values.tolist() == list(range(12))
    assert not any(set(part.flatten().tolist()) == set(range(4 * n, 4 * n + 4)) for n, part in enumerate(mixed[0]))


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("molo", {"trunk": "r2d18"}, "MoLo needs maps of each frame, and ThinResNet18 has none"),
        ("molo", {"trunk": "tiny", "frames": 1}, "MoLo needs at least 2 frames or clips of a video, not 1"),
        ("trx", {"trunk": "r2d18", "frames": 2}, "TRX needs at least 3 frames or clips of a video, not 2"),
        ("prototype", {"trunk": "r2d18", "frames": 0}, "at least 1"),
    ],
)
def test_methods_refuse_what_they_cannot_read(method, options, says) -> None:
    with pytest.raises(ConfigError, match=says):
        create_method(method, **options)


def test_the_trunk_decides_what_a_run_reads() -> None:
    table = {"method": "otam", "trunk": "r2d18", "trunk_weights": "random", "frames": 2}
    with pytest.raises(
        ConfigError, match=r'trunk r2d18 reads clips: set frame_rule = "segment_clips", clip_frames = 8'
    ):
        build_model(build_config(table))
    with pytest.raises(ConfigError, match="trunk tiny reads single frames"):
        build_model(build_config(table | CLIPS | {"trunk": "tiny"}))
    assert build_model(build_config(table | CLIPS)).trunk.clip_frames == 4


def test_a_run_with_a_video_trunk(tiny_path, tmp_path) -> None:
    run = tmp_path / "run"
    changes = {"method": "otam", "trunk": "r2d18", "trunk_weights": "random", "frames": 3, "episodes": 4} | CLIPS
    command = words(tiny_path, run, **changes, val_every=4)  # a later word counts
    command[command.index("--recipe") + 1] = "demo-otam"
    assert call(train_cli, *command, "--shuffle-control") == 0
    result = json.loads((run / "result.json").read_text())
    assert result["test"]["queries"] == result["shuffled_frames"]["queries"] == 8


def test_clusters_of_a_video_trunk(tiny_path, tmp_path, capsys) -> None:
    video = ["--trunk", "r2d18", "--trunk-weights", "random", "--resize", "64", "--crop", "32", "--frames", "2"]
    given = ["--shards", str(tiny_path), *video, "--clusters", "4", "--least", "2", "--out", str(tmp_path / "x.csv")]
    assert call(cluster_cli, *given) == 2
    assert "trunk r2d18 reads clips" in capsys.readouterr().err
    assert call(cluster_cli, *given, "--clip-frames", "4", "--clip-stride", "2") == 0
    assert len((tmp_path / "x.csv").read_text().splitlines()) > 4


def test_a_table_says_what_was_read() -> None:
    table = {"method": "otam", "trunk": "r2d18", "frames": 3}
    assert frames_text(build_config(table | CLIPS)) == "3 clips of 4/2 centre"
    assert frames_text(build_config(table)) == "3 centre"
