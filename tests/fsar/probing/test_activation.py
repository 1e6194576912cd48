"""Activation maps, and the pictures of pre-training and of probes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from fake_shards import FakeShards
from PIL import Image
from small_runs import small_config
from test_probe import probe

from fsar.checkpoints import save_state
from fsar.cli.pretrain import resolve
from fsar.evaluation.overlap import training_record
from fsar.pretraining.trainer import build_pretraining
from fsar.probing.activation import activation_maps, choose_by_class, overlay
from fsar.report.pretraining import draw_pictures, flow_sheet, pretrain_page, write_pretrain_report
from fsar.run.folder import begin_run, last_checkpoint
from fsar.trunks import Features, VideoTrunk, create_trunk
from shards_spec.errors import ConfigError

RESULT = {"method": "mscl", "trunk": "tiny3d", "training": "x: all videos", "videos": 1, "epochs": 1, "steps": 1}
RESULT |= {"batch": 2, "seconds": 1.0, "splits_sha256": {}, "coverage": {}}
RESULT |= dict.fromkeys(("fsar", "torch", "device", "precision", "weights_sha256", "shards_sha256"), "")


class Corner(VideoTrunk):
    """Two channels, whose mean is strongest in the last frames' top left corner."""

    def levels(self, clips):
        maps = torch.zeros(len(clips), 2, 2, 4, 4)
        maps[:, :, 1, 0, 0] = torch.tensor([1.0, 3.0])
        maps[:, 0, 0, 3, 3] = 1.0
        return [maps]


def test_a_map_shows_where_the_last_maps_are_strong():
    trunk = Corner(clip_frames=8).train()
    found = activation_maps(trunk, torch.rand(2, 8, 3, 32, 32))
    assert found.shape == (2, 8, 32, 32)
    assert trunk.training
    assert (found.amin(), found.amax()) == (0, 1)
    assert found[0, -1, 0, 0] == 1
    assert found[0, 0, -1, -1] == 0.25  # a channel of two, against a mean of two
    assert found[0, -1, 16:, 16:].max() == 0
    torch.manual_seed(0)  # with some weights two frames are nearly as hot, and resizing decides
    frames = torch.rand(1, 4, 3, 32, 32)
    image = create_trunk("tiny").eval()
    strength = image(frames).maps.mean(dim=2)[0]  # [T, h, w]
    hottest = activation_maps(image, frames)[0].flatten(1).max(dim=1).values
    assert hottest.argmax() == strength.flatten(1).max(dim=1).values.argmax()
    image.forward = lambda clips: Features(None, clips)
    with pytest.raises(ConfigError, match="TinyTrunk has no maps"):
        activation_maps(image, frames)


def test_an_overlay_is_blue_where_nothing_and_red_where_all_responds():
    strength = np.array([[0.0, 1.0]], dtype=np.float32)
    ((weak, strong),) = overlay(np.full((1, 2, 3), 128, np.uint8), strength).astype(int)
    assert weak[2] > weak[0]
    assert strong[0] > strong[2]


def test_videos_of_a_picture_are_of_as_many_classes_as_may_be():
    shards = FakeShards([6, 2, 1], classes=3)
    for seed in range(4):
        rows = choose_by_class(shards, np.arange(9), 5, seed=seed)
        assert sorted(shards.labels[rows[:3]]) == [0, 1, 2]
        assert len(set(rows)) == 5


def test_a_run_has_pictures_and_the_report_shows_them(tiny_shards, tmp_path):
    config = small_config("moco")
    model = build_pretraining(config, samples=1)
    draw_pictures(tmp_path, config, tiny_shards, np.arange(9), model, device=torch.device("cpu"))
    with Image.open(tmp_path / "activation.png") as sheet:
        assert sheet.size[1] > 3 * 3 * 128
    page = write_pretrain_report(tmp_path, RESULT, config.flat()).read_text()
    assert page.count("data:image/png;base64,") == 1  # no flow
    assert "Where the trunk responds" in page


@pytest.mark.parametrize(("weights", "count"), [("", 2), ("fetch", 2), ("gone.pth", 1)])
def test_the_trunk_before_training_is_drawn_unless_its_file_is_gone(weights, count, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("fsar.pretraining.trainer.start_from", lambda *_: None)

    def sheet(_title, _shards, _rows, trunks, _look, **_):
        drawn.extend(trunks)
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr("fsar.report.pretraining.activation_sheet", sheet)
    model = build_pretraining(small_config("moco"), samples=1)
    config = small_config("moco", weights=weights)
    draw_pictures(tmp_path, config, FakeShards([3]), np.arange(3), model, device=torch.device("cpu"))
    assert drawn == ["before training", "after training"][-count:]


def test_turned_flow_is_drawn_with_its_wheel(tiny_shards):
    given = {"clip_frames": 4, "crop": 32, "clip_stride": 1, "flow_series": "flow1", "motion_filter": False}
    config = resolve("synthetic", "mscl", None, given)
    sheet = np.asarray(flow_sheet(config, tiny_shards, tiny_shards.split_rows("train")[:2]))
    assert sheet.shape[0] > 2 * 3 * 128
    right, down = sheet[16 + 36, -16 - 2], sheet[16 + 72 - 3, -16 - 36]  # of the wheel
    assert (right.argmax(), right.argmin() > 0) == (0, True)  # red
    assert down[2] < 60 < 180 < min(down[:2])  # yellow


def test_every_term_of_mscl_has_a_curve_in_words():
    record = {"kind": "train", "n": 1, "epoch": 1.0, "loss": 2.0, "lr": 0.1, "samples_per_s": 3.0, "data_wait": 0.1}
    record |= {"loss_cls": 1.0, "loss_cls_mx_r_aug": 0.5, "loss_pos": 0.5}
    record |= {f"accuracy_top{k}_acc{term}": 0.2 for k in (1, 5) for term in ("", "_mx_r_aug", "_pos")}
    result = {"method": "mscl", "trunk": "tiny3d", "training": "x: all videos", "videos": 1, "epochs": 1, "steps": 1}
    result |= {"batch": 2, "seconds": 1.0, "splits_sha256": {}, "coverage": {}}
    result |= dict.fromkeys(("fsar", "torch", "device", "precision", "weights_sha256", "shards_sha256"), "")
    page = pretrain_page("run", result, {}, [record])
    for caption in (
        "loss_cls: pictures to pictures",
        "loss_cls_mx_r_aug: turned flow to pictures",
        "loss_pos: frame by",
    ):
        assert caption in page
    for term in ("loss_cls", "loss_cls_mx_r_aug", "loss_pos"):
        assert page.count(f'aria-label="accuracy of {term}"') == 1


def test_the_command_draws_where_a_trunk_responds(tiny_path, tiny_shards, tmp_path, capsys):
    """Of videos that training saw too, since nothing is measured."""
    out, run, config = tmp_path / "out", tmp_path / "run", small_config("moco")
    begin_run(run, config, {})
    seen = training_record(tiny_shards, np.arange(35))
    save_state(last_checkpoint(run), build_pretraining(config, samples=1), None, {"n": 1}, trained_on=seen)
    given = {"shards": tiny_path, "weights": run, "mode": "activation", "device": "cpu", "size": 32}
    assert "activation.png" in probe(capsys, "--untrained", **given, out=out)
    with Image.open(out / "activation.png") as sheet:
        assert sheet.size[1] > 4 * 3 * 128
    assert json.loads((out / "result.json").read_bytes())["probes"] == {}
    page = (out / "report.html").read_text()
    assert "data:image/png" in page
    assert f"tiny3d on {tiny_shards.dataset.name}: where it responds</h1>" in page
    assert "name=viewport" in page
    assert "give --out FOLDER" in probe(capsys, **given, code=2)
