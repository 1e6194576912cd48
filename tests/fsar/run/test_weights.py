"""The meaning of a text given as weights, and the record of a configuration in a result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fsar.run.config import build_config
from fsar.run.keys import recorded
from fsar.run.weights import find_weights
from shards_spec.errors import ConfigError


def make_run(folder: Path, method: str, *checkpoints: str) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.toml").write_text(f'method = "{method}"\n')
    for name in checkpoints:
        (folder / "checkpoints" / f"{name}.safetensors").write_bytes(b"")
    return folder


def test_a_text_is_a_run_a_file_fetch_or_random(tmp_path: Path) -> None:
    trained = make_run(tmp_path / "trained", "otam", "last", "best")
    pretrained, own = make_run(tmp_path / "pre", "moco", "last"), make_run(tmp_path / "own", "my.module:Mine", "last")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "others.pth")
    for source in ("", "random", "fetch"):
        weights = find_weights(source)
        assert (weights.path, weights.run, weights.pretrained, weights.training_record()) == (None, None, False, None)
    weights = find_weights(str(tmp_path / "others.pth"))
    assert (weights.path, weights.run, weights.pretrained) == (tmp_path / "others.pth", None, False)
    weights = find_weights(str(trained))
    assert (weights.path, weights.pretrained) == (trained / "checkpoints" / "best.safetensors", False)
    assert find_weights(str(trained), checkpoint="last").path == trained / "checkpoints" / "last.safetensors"
    assert find_weights(str(pretrained)).pretrained
    assert not find_weights(str(own)).pretrained


def test_what_is_no_weights_is_refused_with_the_name_of_the_option(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "otam", "last")
    with pytest.raises(ConfigError, match=r"--trunk-weights nowhere: there is no such file or folder"):
        find_weights("nowhere", option="--trunk-weights")
    with pytest.raises(ConfigError, match=r"is a checkpoint of the run .*; give that folder"):
        find_weights(str(run / "checkpoints" / "last.safetensors"))


def test_a_result_records_the_keys_that_say_so() -> None:
    config = build_config({"method": "otam", "trunk": "tiny", "test_way": 3, "test_shot": 2, "shot": 4})
    assert recorded(config) == {
        "method": "otam",
        "streams": "frames",
        "motion_series": "flow1",
        "fields": 4,
        "camera": "median",
        "stream_weight": "train",
        "way": 3,
        "shot": 2,
        "queries": 1,
        "unlabelled_per_class": 0,
        "distractor_classes": 0,
        "distractors_per_class": 0,
        "labelled_fraction": 1.0,
        "views": 0,
        "freeze_trunk": False,
        "recipe_style": "fixed",
    }
