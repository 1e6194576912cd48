"""Videos of a pre-training, its starting weights, and the facts that go with its checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import small_config
from test_pretrain import NOTHING, call, words

from fsar.checkpoints import load_training_record, save_state
from fsar.cli.pretrain import cli
from fsar.cli.weights import model_of_run
from fsar.evaluation.overlap import find_overlap, training_record
from fsar.pretraining.config import build_pretrain_config
from fsar.pretraining.trainer import build_pretraining
from fsar.probing.weights import open_probed
from fsar.run.build import build_model
from fsar.run.config import build_config
from fsar.run.folder import begin_run, last_checkpoint
from fsar.training.trainer import Trainer
from fsar.trunks import create_trunk
from fsar.trunks.video import SlowOnly50
from shards_spec import ShardSet
from shards_spec.errors import ConfigError


@pytest.fixture
def begun(tiny_path: Path, tmp_path: Path) -> Path:
    """A run of MoCo that has seen the training videos, its weights as they were made."""
    config, run = small_config("moco"), tmp_path / "begun"
    begin_run(run, config, {})
    with ShardSet.open(tiny_path) as shards:
        seen = training_record(shards, shards.split_rows("train"), source="tiny: split train")
    save_state(last_checkpoint(run), build_pretraining(config, samples=1), None, {"n": 1}, trained_on=seen)
    return run


def test_the_listed_training_videos_alone_are_read_and_later_results_say_so(tiny_path, tmp_path, capsys) -> None:
    with ShardSet.open(tiny_path) as shards:
        names = list(shards.names(np.flatnonzero(shards.frames > 0)))
    lists = tmp_path / "own.json"
    lists.write_text(json.dumps({"train": [*names[:12], "gone.mp4"], "test": names[12:24]}))
    run = tmp_path / "run"
    assert call(cli, *words(tiny_path, run, lists=lists, epochs=1, clip_stride=1, executor="portable")) == 0
    said = "tiny: training videos of own.json"
    result = json.loads((run / "result.json").read_text())
    assert (result["training"], result["videos"], result["listed_but_not_stored"]) == (said, 12, 1)
    seen = load_training_record(run / "checkpoints/last.safetensors")
    with ShardSet.open(tiny_path) as shards:
        assert find_overlap(seen, shards, np.arange(12)).videos == 12
        overlap = find_overlap(seen, shards, np.arange(12, 24))
        assert overlap.videos == 0
        assert overlap.to_json()["training"] == [said]
    with pytest.raises(ConfigError, match="both choose videos"):
        build_pretrain_config({"method": "moco", "trunk": "tiny3d", "lists": "x", "split": "all"})
    lists.write_text(json.dumps({"train": names[1:13], "test": names[13:24]}))
    assert call(cli, "--shards", str(tiny_path), "--out", str(run), "--resume") == 2
    assert "other shards, splits or labels" in capsys.readouterr().err


def test_training_starts_from_given_weights(begun: Path, tiny_path: Path, tmp_path: Path, capsys) -> None:
    """Both encoders get them, with the videos behind them; another trunk's weights are refused."""
    model = build_pretraining(small_config("fima", weights=str(begun), seed=7), samples=1)
    trained = build_pretraining(small_config("moco"), samples=1)
    for part in (model.encoder_q, model.encoder_k):
        assert all(torch.equal(value, trained.encoder.state_dict()[name]) for name, value in part.state_dict().items())
    run = tmp_path / "run"
    assert (
        call(cli, *words(tiny_path, run, weights=begun, split="test", epochs=1, clip_stride=1, executor="portable"))
        == 0
    )
    seen = load_training_record(run / "checkpoints/last.safetensors")
    assert seen.sources == ("tiny: split test", "tiny: split train")
    torch.save(create_trunk("r2d18").state_dict(), tmp_path / "weights.pt")
    assert call(cli, *words(tiny_path, tmp_path / "other", weights=tmp_path / "weights.pt")) == 2
    assert "holds weights of the trunk r2d18, not of tiny3d" in capsys.readouterr().err
    assert call(cli, *words(tiny_path, tmp_path / "other", weights="nowhere")) == 2
    assert "--weights nowhere: there is no such file" in capsys.readouterr().err


def test_constants_of_colour_travel_with_the_weights(tmp_path: Path, tiny_path: Path) -> None:
    """MSCL trains r3d18 with ImageNet's colours; probes, training and evaluation take them."""
    imagenet = (SlowOnly50.mean, SlowOnly50.std)
    config = small_config("mscl")
    model = build_pretraining(config, samples=1)
    model.encoder.mean, model.encoder.std = imagenet  # as `encoders` does with r3d18
    begin_run(tmp_path / "mscl", config, {})
    save_state(last_checkpoint(tmp_path / "mscl"), model, None, {"n": 1}, trained_on=NOTHING)
    given = open_probed(str(tmp_path / "mscl"), None).trunk
    assert (given.mean, given.std) == imagenet
    (tmp_path / "mscl" / "config.toml").write_text(config.to_toml().replace('"flow1"', '"flow8g2"'))
    assert (
        open_probed(str(tmp_path / "mscl"), None).clips["stride"] == 2 * config.clip_stride
    )  # positions every 2 frames
    assert (create_trunk("tiny3d").mean, create_trunk("tiny3d").std) != imagenet
    few = {"frame_rule": "segment_clips", "clip_frames": 4, "frames": 1, "resize": 40, "crop": 32, "way": 2}
    few |= {"test_way": 2, "queries": 1, "select_on": "last", "threads": 1, "executor": "portable", "device": "cpu"}
    tuned = build_config({"method": "prototype", "trunk": "tiny3d", "trunk_weights": str(tmp_path / "mscl")} | few)
    begun = build_model(tuned)
    assert begun.trunk.mean == imagenet[0]
    run = tmp_path / "few"
    begin_run(run, tuned, {})
    save_state(last_checkpoint(run), begun, None, {"n": 0}, trained_on=NOTHING)
    assert model_of_run(run).load().trunk.std == imagenet[1]
    cpu = torch.device("cpu")
    with ShardSet.open(tiny_path) as shards, Trainer(tuned, shards, run, device=cpu, resume=True) as resumed:
        (again,) = resumed.train_episodes.episodes(0, 1)
    with ShardSet.open(tiny_path) as shards, Trainer(tuned, shards, tmp_path / "new", device=cpu) as fresh:
        (first,) = fresh.train_episodes.episodes(0, 1)
    assert torch.equal(again.support, first.support)
