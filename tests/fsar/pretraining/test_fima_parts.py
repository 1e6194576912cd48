"""Parts of FIMA against outputs of the reference code (ZMHH-H/FIMA), and rules for any input."""

from __future__ import annotations

import random

import pytest
import torch
from fima_case import FimaCase
from golden_case import fill
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fsar.pretraining.fima import cell_distances, correspondence, dense_loss, foreground_mask, log_sum_exp
from fsar.pretraining.motion_decoder import MotionDecoder, PositionTable, ProjectionHead, sine_table
from fsar.pretraining.motion_views import frame_difference, without_extra_frame
from fsar.training.optim import epoch_learning_rate
from pipelines.augment.clips import crop_resize
from pipelines.clips.stream import Box, crop_coordinates, random_resized_box
from shards_spec.errors import ConfigError


def test_frame_difference():
    case = FimaCase("frame_difference")
    clip = case.uniform("clip", 2, 3, 5, 4, 6)
    case.check("diff", frame_difference(clip, dim=2))


def test_the_first_difference_of_each_wrap():
    clips = torch.rand(2, 6, 3, 4, 4)
    inner = frame_difference(clips)[:, 1:]
    repeated = frame_difference(clips, wrap="repeat")
    torch.testing.assert_close(repeated[:, 1:], inner)
    assert (repeated[:, 0] == 0.5).all()
    torch.testing.assert_close(frame_difference(clips, wrap="extra_frame"), inner)
    assert torch.equal(without_extra_frame(clips, wrap="extra_frame"), clips[:, 1:])
    with pytest.raises(ConfigError, match='diff_wrap="mirror"'):
        frame_difference(clips, wrap="mirror")


def test_crop_coordinates():
    case = FimaCase("crop_coordinates")
    rows = case.settings["params_i_j_h_w_H_W_flip"]
    case.check("coord", torch.tensor([crop_coordinates(Box(*r[:4]), tuple(r[4:6]), flip=bool(r[6])) for r in rows]))


def test_crop_pixels():
    case = FimaCase("crop_pixels")
    pixels = case.uniform("pixels", 3, 2, 20, 28).transpose(0, 1)  # [T, 3, H, W]
    crops = [
        crop_resize(pixels, Box(*row[:4]), size=12, flip=bool(row[6])).transpose(0, 1)
        for row in case.settings["params_i_j_h_w_H_W_flip"]
    ]
    case.check("cropped", torch.stack(crops))


class TorchDraw(random.Random):
    """The draws of the reference, from torch's generator."""

    def uniform(self, a, b):
        return torch.empty(1).uniform_(a, b).item()

    def randint(self, a, b):
        return torch.randint(a, b + 1, (1,)).item()


def test_the_stream_of_boxes():
    case = FimaCase("crop_sampler_rng")
    height, width = case.settings["image_H_W"]
    boxes = []
    for seed in case.settings["torch_manual_seeds"]:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            boxes.append([*random_resized_box(TorchDraw(), (height, width)), height, width])
    case.check("i_j_h_w_H_W", torch.tensor(boxes))


@given(st.integers(0, 2**32), st.integers(1, 400), st.integers(1, 400))
@settings(max_examples=100, deadline=None)
def test_boxes_lie_in_the_frame(seed, height, width):
    box = random_resized_box(random.Random(seed), (height, width))
    assert box.top >= 0 <= box.left
    assert 0 < box.height <= height - box.top
    assert 0 < box.width <= width - box.left
    corners = crop_coordinates(box, (height, width), flip=bool(seed % 2))
    assert all(0 <= corner <= 1 for corner in corners)


def test_a_long_frame_takes_its_central_box():
    assert random_resized_box(random.Random(0), (10, 1000), area=(0.9, 1)) == Box(0, 493, 10, 13)
    with pytest.raises(ConfigError, match="area"):
        random_resized_box(random.Random(0), (10, 10), area=(0.5, 0.2))


@pytest.mark.parametrize("grid", [7, 3])
def test_correspondence(grid):
    case = FimaCase("correspondence")
    query, key = (torch.tensor(case.settings[f"coord_{side}"]) for side in "qk")
    distances = cell_distances(query, key, (grid, grid))
    case.check(f"distance_{grid}x{grid}", distances[: 3 if grid == 7 else None])
    case.check(f"margin_{grid}x{grid}", (distances - 0.7).abs().amin(dim=(1, 2)))
    case.check(f"positive_{grid}x{grid}", correspondence(query, key, (grid, grid), ratio=case.settings["pos_ratio"]))


@pytest.mark.parametrize("grid", [7, 4, 3])
def test_foreground_mask(grid):
    case = FimaCase("foreground_mask")
    rgb, difference = (F.relu(case.normal(f"{name}{grid}", 3, 6, 2, grid, grid)) for name in ("rgb", "diff"))
    case.check(f"mask_{grid}x{grid}", foreground_mask(rgb, difference))


class DenseCase(FimaCase):
    """Inputs of the dense loss: places of one feature frame."""

    def __init__(self) -> None:
        super().__init__("dense_loss")
        maps = (F.normalize(self.normal(name, 3, 16, 4, 4), dim=1) for name in ("q", "k", "k_neg"))
        self.queries, self.keys, self.others = (each.flatten(2).mT for each in maps)  # [B, P, D]
        self.queue = F.normalize(self.normal("queue", 16, 20), dim=0)
        self.masks = [self.uniform(f"mask_{side}", 3, 4, 4) > 0.5 for side in "qk"]
        self.pairs = [torch.tensor(self.settings[f"coord_{side}"]) for side in "qk"]

    def loss(self, queries, *, masked=False, queue=False, temperature=0.1, ratio=0.7, pairs=None):
        positive = correspondence(*(pairs or self.pairs), (4, 4), ratio=ratio)
        if masked:
            positive &= self.masks[0].flatten(1)[:, :, None] & self.masks[1].flatten(1)[:, None]
        everything = torch.cat([self.keys.flatten(0, 1), self.others.flatten(0, 1), *([self.queue.T] if queue else [])])
        return dense_loss(queries, self.keys, positive, all_keys=everything, temperature=temperature)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("all_foreground", {}),
        ("masked", {"masked": True}),
        ("with_queue", {"masked": True, "queue": True}),
        ("temperature_0p3_ratio_0p5", {"temperature": 0.3, "ratio": 0.5}),
    ],
)
def test_dense_loss(name, options):
    case = DenseCase()
    queries = case.queries.clone().requires_grad_()
    loss = case.loss(queries, **options)
    case.check(f"loss_{name}", loss)
    loss.backward()
    case.check(f"grad_q_{name}", queries.grad.mT.unflatten(2, (4, 4)))


def test_dense_loss_without_a_positive_pair():
    case = DenseCase()
    first, second = (torch.tensor(corners) for corners in case.settings["coord_no_positive"])
    queries = case.queries.clone().requires_grad_()
    loss = case.loss(queries, queue=True, pairs=[first.expand(3, 4), second.expand(3, 4)])
    case.check("loss_no_positive", loss)
    loss.backward()
    assert (queries.grad == 0).all()


@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 200))
@settings(max_examples=30, deadline=None)
def test_log_sum_exp_in_portions(rows, keys, entries):
    generator = torch.Generator().manual_seed(rows * 100 + keys)
    queries = torch.randn(rows, 5, generator=generator, dtype=torch.float64).requires_grad_()
    table, weights = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((keys, 5), (rows,)))
    whole = (queries @ table.T / 0.1).logsumexp(dim=1)
    portions = log_sum_exp(queries, table, temperature=0.1, entries=entries)
    torch.testing.assert_close(portions, whole)
    expected, found = (torch.autograd.grad(sums @ weights, queries)[0] for sums in (whole, portions))
    torch.testing.assert_close(found, expected)


def test_position_table():
    case = FimaCase("position_table")
    case.check("table", sine_table(100, 512)[:16])
    positions = PositionTable(512)
    case.check("table", positions(torch.zeros(2, 150, 512))[1, :16])
    assert not positions.state_dict()


def test_motion_decoder():
    case = FimaCase("motion_decoder")
    decoder = MotionDecoder(dropout=0.0)
    fill.load_into(decoder, case.seed)
    queries, memory = (case.normal(name, rows, 2, 512).transpose(0, 1) for name, rows in (("tgt", 10), ("memory", 9)))
    case.check("out", decoder(queries, memory).transpose(0, 1))


def test_projection_head():
    case = FimaCase("projection_head")
    head = ProjectionHead(1024)
    fill.load_into(head, case.seed)
    for name, shape in (
        ("dense", (2, 1024, 1, 10, 1)),
        ("pooled", (2, 1024, 1, 1, 1)),
        ("temporal", (1, 1024, 2, 2, 3)),
    ):
        case.check(name, head(case.normal(f"x_{name}", *shape)))


SCHEDULES = {
    "cosine_100": {"base_lr": 0.01, "epochs": 100},
    "cosine_200_lr0p00375": {"base_lr": 0.00375, "epochs": 200},
    "step_60_120_of_150": {"base_lr": 0.01, "epochs": 150, "schedule": "step", "milestones": (60, 120)},
    "warmup_10_60_120_of_150": {
        "base_lr": 0.01,
        "epochs": 150,
        "schedule": "warmup_step",
        "milestones": (10, 60, 120),
    },
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rates(name):
    options = SCHEDULES[name]
    FimaCase("lr_schedule").check(
        name, torch.tensor([epoch_learning_rate(epoch, **options) for epoch in range(options["epochs"])])
    )


@pytest.mark.parametrize(
    "options", [{"schedule": "linear"}, {"schedule": "step"}, {"schedule": "step", "milestones": (9, 3)}]
)
def test_schedules_that_do_not_fit(options):
    with pytest.raises(ConfigError, match="schedule="):
        epoch_learning_rate(0, base_lr=1, epochs=10, **options)
