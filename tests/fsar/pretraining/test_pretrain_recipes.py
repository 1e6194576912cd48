"""Recipes of pre-training: the published runs, which one is taken, a clip's stride."""

from __future__ import annotations

import pytest
from small_runs import small_config

from fsar.cli.pretrain import resolve
from fsar.pretraining.config import build_pretrain_config, frame_stride, pretrain_recipe_names, read_pretrain_recipe
from shards_spec.errors import ConfigError

# Method, trunk, frames, stride, crop, batch, epochs, learning rate, queue: the published runs.
PUBLISHED = {
    "fima-ucf101": ("fima", "i3d", 16, 2, 224, 24, 200, 0.00375, 2240),
    "fima-readme": ("fima", "i3d", 16, 2, 224, 64, 100, 0.01, 2240),
    "fima-kinetics400": ("fima", "i3d", 16, 2, 224, 64, 100, 0.01, 65536),
    "mscl-r18": ("mscl", "r3d18", 8, 8, 112, 128, 400, 0.02, 65536),
    "mscl-r50": ("mscl", "slowonly50", 8, 8, 224, 32, 200, 0.0075, 65536),
    "moco-r18": ("moco", "r3d18", 8, 8, 112, 128, 120, 0.015, 65536),
    "moco-r50": ("moco", "slowonly50", 8, 8, 224, 32, 120, 0.0075, 65536),
}


def test_recipes_are_the_published_runs() -> None:
    assert set(pretrain_recipe_names()) == {*PUBLISHED, "fima-tiny", "mscl-tiny", "moco-tiny"}
    for name, published in PUBLISHED.items():
        config = build_pretrain_config(read_pretrain_recipe(name))
        keys = ("method", "trunk", "clip_frames", "clip_stride", "crop", "batch", "epochs", "lr")
        assert (*(getattr(config, key) for key in keys), config.value("queue")) == published
        assert (config.schedule, config.weight_decay, config.sgd_momentum) == ("cosine", 1e-4, 0.9)
        assert config.clip_norm == (0 if config.method == "fima" else 40)
    kinetics = build_pretrain_config(read_pretrain_recipe("fima-kinetics400"))
    assert kinetics.value("dense_queue") == 31360


def test_the_recipe_follows_data_set_and_method() -> None:
    assert resolve("ucf101", "fima", None, {}).epochs == 200
    assert resolve("kinetics400", "mscl", None, {}).trunk == "r3d18"
    assert resolve("synthetic", "moco", None, {"lr": 0.5}).lr == 0.5
    config = resolve("synthetic", "fima", None, {})
    assert build_pretrain_config(config.flat()) == config
    with pytest.raises(ConfigError, match='did you mean "fima"'):
        resolve("synthetic", "fimma", None, {})


def test_the_stride_of_a_clip_is_told_in_frames() -> None:
    """MSCL counts positions of its flow, one every second frame by default."""
    grids = {"flow8g2": 2, "flow2g2": 2, "flow1": 1}
    for series, grid in grids.items():
        assert frame_stride(small_config("mscl", flow_series=series, clip_stride=3)) == 3 * grid
    assert frame_stride(small_config("moco", clip_stride=3)) == 3
