"""Training without labels: k-means, label files, single videos as classes, the commands."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from fake_shards import FakeShards
from small_runs import call, words

from fsar import EpisodeLoader
from fsar.cli.cluster import _config, _model, embed
from fsar.cli.cluster import cli as cluster_cli
from fsar.cli.train import cli as train_cli
from fsar.methods.class_text import ClassText
from fsar.run.build import evaluation_rules
from fsar.run.config import build_config
from fsar.training.clusters import agreement, k_means, keep_large
from pipelines.episodes.labels import read_labels, write_labels
from pipelines.episodes.pools import Labels
from pipelines.episodes.rules import EpisodeRules
from pipelines.episodes.stream import EpisodeStream
from shards_spec.errors import ConfigError

RULES = EpisodeRules(way=2, queries=2, frames=4, resize=64, crop=56, random_frames=True, random_crop=True)


def test_k_means_finds_what_is_apart_and_repeats_itself():
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(80) % 4
    vectors = 10 * torch.eye(4)[truth] + torch.randn(80, 4, generator=generator)
    place = k_means(vectors, 4, seed=1)
    assert agreement(place, truth.numpy()).nmi == pytest.approx(1)
    assert np.array_equal(place, k_means(vectors, 4, seed=1))
    assert set(k_means(torch.ones(6, 2), 3)) <= {0, 1, 2}  # all alike
    with pytest.raises(ConfigError, match="81 clusters of 80 videos"):
        k_means(vectors, 81)
    with pytest.raises(ConfigError, match="not finite"):
        k_means(vectors.log(), 4)


def test_small_clusters_are_dropped_and_the_others_numbered_by_size():
    place = np.array([5, 5, 2, 2, 2, 0, 7, 7])
    assert keep_large(place, 2).tolist() == [1, 1, 0, 0, 0, -1, 2, 2]
    with pytest.raises(ConfigError, match="of 4 clusters 1 have 3 videos or more"):
        keep_large(place, 3)


def test_agreement_by_hand():
    same = agreement(np.array([0, 0, 1, 1]), np.array([3, 3, 0, 0]))
    assert (same.purity, same.nmi) == (1, pytest.approx(1))
    apart = agreement(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]))
    assert (apart.purity, apart.nmi) == (0.5, pytest.approx(0))


def test_a_label_file_is_read_as_it_was_written(tmp_path):
    shards, path = FakeShards(), tmp_path / "clusters.csv"
    shards.name = lambda row: f'odd, "name" {row}.avi'
    rows = shards.split_rows("train").tolist()
    write_labels(path, {shards.name(row): row % 2 for row in rows[:-1]})
    labels = read_labels(path, shards, "train")
    assert labels.names == ("0", "1")
    assert dict(zip(labels.rows.tolist(), labels.of_rows.tolist(), strict=True)) == {row: row % 2 for row in rows[:-1]}


def test_names_that_are_no_utf_8(tmp_path):
    shards, path = FakeShards(), tmp_path / "clusters.csv"
    shards.name = lambda row: f"caf\udce9/{row}.avi"  # the byte E9 of a file's name
    rows = shards.split_rows("train").tolist()
    write_labels(path, {shards.name(row): row % 2 for row in rows})
    assert b"caf\xe9/" in path.read_bytes()
    assert read_labels(path, shards, "train").rows.tolist() == rows
    labels = Labels(("caf\udce9", "b", "c"), (0, 1, 2), np.array(rows), np.array(rows) % 3)
    half = dataclasses.replace(RULES, labelled_fraction=0.5, queries=1)
    assert len(EpisodeStream(shards, "train", half, seed=0, labels=labels).plan(0).class_ids) == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a,b\n", "does not begin with the line video,cluster"),
        ("video,cluster\n", "names no video"),
        ("video,cluster\nvideos/0.avi\n", "line 2: expected a video and its label"),
        ("video,label\nvideos/0.avi,1\nvideos/0.avi,2\n", 'line 3: "videos/0.avi" is there twice'),
        ("video,label\nvideos/0.avi,1\nvideos/30.avi,2\n", '"videos/30.avi" is no stored video of split "train"'),
    ],
)
def test_label_files_that_are_refused(tmp_path, text, says):
    path = tmp_path / "clusters.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_labels(path, FakeShards(), "train")
    with pytest.raises(ConfigError, match="make them with fsar-cluster"):
        read_labels(tmp_path / "none.csv", FakeShards(), "train")


def test_episodes_of_clusters():
    shards = FakeShards()
    rows = shards.split_rows("train")
    labels = Labels(("x", "y", "z"), (0, 1, 2), rows, rows % 3)
    with EpisodeLoader(shards, "train", dataclasses.replace(RULES, crop=48), labels=labels) as loader:
        for plan, episode, _ in loader.planned(0, 5):
            assert episode.class_ids.tolist() == [-1, -1]
            assert episode.base_ids.tolist() == plan.class_ids.tolist()
            assert (plan.support_rows % 3).tolist() == plan.class_ids.tolist()
            assert (plan.query_rows % 3).tolist() == plan.class_ids[plan.query_labels].tolist()


def test_a_single_video_as_a_class(tiny_shards):
    labels = Labels.of_single_videos(tiny_shards, "train")
    with EpisodeLoader(tiny_shards, "train", RULES, labels=labels) as loader:
        for plan, episode, _ in loader.planned(0, 5):
            assert len(set(plan.support_rows.tolist())) == 2
            assert plan.query_rows.tolist() == plan.support_rows[plan.query_labels].tolist()
            assert episode.base_ids.tolist() == episode.class_ids.tolist() == [-1, -1]
            assert not torch.equal(episode.query[0], episode.support[episode.query_labels[0], 0])
    with pytest.raises(ConfigError, match=r"has no unlabelled ones.*and distractor_classes to 0"):
        EpisodeStream(tiny_shards, "train", dataclasses.replace(RULES, unlabelled_per_class=1), seed=0, labels=labels)
    texts = ClassText(("ant",), torch.zeros(1, 2), "{}", "")
    with pytest.raises(ConfigError, match="labels replace these"):
        EpisodeLoader(tiny_shards, "train", RULES, labels=labels, class_text=texts)


@pytest.fixture(scope="module")
def clusters(tiny_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("clusters") / "clusters.csv"
    assert call(cluster_cli, *cluster_words(tiny_path, path)) == 0
    return path


def cluster_words(shards, path) -> list[str]:
    trunk = ["--trunk", "tiny", "--trunk-weights", "random", "--resize", "64", "--crop", "56", "--frames", "4"]
    return ["--shards", str(shards), *trunk, "--clusters", "4", "--least", "2", "--out", str(path)]


def test_clusters_of_the_command(clusters, tiny_path, tiny_shards, tmp_path, capsys):
    labels = read_labels(clusters, tiny_shards, "train")
    assert 2 <= len(labels.names) <= 4
    assert np.bincount(labels.of_rows).min() >= 2
    assert call(cluster_cli, *cluster_words(tiny_path, tmp_path / "again.csv")) == 0
    assert (tmp_path / "again.csv").read_bytes() == clusters.read_bytes()
    assert "labels used for this line alone" in capsys.readouterr().out
    assert call(cluster_cli, "--shards", str(tiny_path), "--out", str(tmp_path / "x.csv")) == 2
    assert "give --trunk NAME with --trunk-weights, --weights RUN, or --features flow" in capsys.readouterr().err


def test_clusters_are_counted_before_anything_is_computed(tiny_path, tmp_path, capsys):
    given = cluster_words(tiny_path, tmp_path / "x.csv")
    given[given.index("random")] = "no-such-file"  # which is not looked for
    given[given.index("4", given.index("--clusters"))] = "16"
    assert call(cluster_cli, *given) == 2
    assert "16 clusters of 15 videos" in capsys.readouterr().err


def test_one_number_resizes_both_sides(tmp_path):
    saved = build_config({"method": "otam", "trunk": "tiny", "resize": 64, "resize_width": 80, "crop": 48})
    (tmp_path / "config.toml").write_text(saved.to_toml())
    none = {"frames": None, "resize": None, "crop": None, "device": None}
    assert evaluation_rules(_config(None, None, tmp_path, none)).resized == (64, 80)
    assert evaluation_rules(_config(None, None, tmp_path, none | {"resize": 72})).resized == (72, 72)


FEW = {"episodes": 4, "episodes_per_step": 2, "val_every": 4, "groups": "any"}


def test_training_on_clusters(clusters, tiny_path, tmp_path, capsys):
    path, run = tmp_path / "clusters.csv", tmp_path / "run"
    path.write_bytes(clusters.read_bytes())
    given = [*words(tiny_path, run, **FEW, labels="file", select_on="last"), "--method", "hyrsm++"]
    given[given.index("file")] = str(path)
    assert call(train_cli, *given) == 0
    numbers = {line.split(",")[-1] for line in path.read_text().splitlines()[1:]}
    assert f"num_classes = {len(numbers)}\n" in (run / "config.toml").read_text()
    assert set(json.loads((run / "result.json").read_text())["test"]["per_class"]) == {"fox", "gnu"}
    path.write_text(path.read_text().replace("video,cluster", "video,label"))
    capsys.readouterr()
    assert call(train_cli, *given, "--resume") == 2
    assert "other shards, splits or labels" in capsys.readouterr().err
    again = ["--weights", str(run), "--clusters", "3", "--least", "1", "--out", str(tmp_path / "next.csv")]
    assert call(cluster_cli, "--shards", str(tiny_path), *again) == 0


def test_training_on_single_videos(tiny_path, tmp_path, capsys):
    given = [*words(tiny_path, tmp_path / "run", **FEW, tasks="augment"), "--method", "hyrsm++"]
    assert call(train_cli, *given) == 0
    assert "every training video is a class of its own" in capsys.readouterr().out
    assert call(train_cli, *given, "--unlabelled-per-class", "1") == 2
    assert 'tasks = "augment" needs no labels and no unlabelled' in capsys.readouterr().err


def test_clusters_of_flow_read_what_the_method_motion_reads(tiny_path, tiny_shards, tmp_path, capsys):
    rows = tiny_shards.split_rows("train")
    config = _config(None, None, None, {"frames": 4}, flow=True)
    vectors = embed(_model(config, None), tiny_shards, rows.tolist(), config)
    assert vectors.shape == (len(rows), 4 * 4 * 4 * 2)
    whole = EpisodeRules(way=3, shot=3, frames=4, resize=64, crop=64, groups="any", streams="motion")
    with EpisodeLoader(tiny_shards, "train", whole, executor="portable") as loader:
        ((plan, episode, _),) = loader.planned(0, 1)
    means = torch.nn.functional.adaptive_avg_pool2d(episode.support_motion.flatten(0, 2), 4)  # [S * T, 2, 4, 4]
    found = vectors[np.searchsorted(rows, plan.support_rows)]
    assert torch.allclose(found, means.view(len(found), -1), atol=1e-4)
    path = tmp_path / "clusters.csv"
    flow = ["--shards", str(tiny_path), "--features", "flow", "--out", str(path), "--least", "1", "--clusters", "3"]
    assert call(cluster_cli, *flow) == 0
    assert set(read_labels(path, tiny_shards, "train").rows.tolist()) <= set(rows.tolist())
    assert call(cluster_cli, *flow, "--motion-series", "flow3") == 2
    assert 'holds no "flow3"' in capsys.readouterr().err
    assert call(cluster_cli, *flow, "--trunk", "tiny", "--crop", "56") == 2
    assert "--features flow reads no weights and no pictures: leave out --trunk, --crop" in capsys.readouterr().err
