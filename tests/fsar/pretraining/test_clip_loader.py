from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from fake_shards import FakeShards

from fsar.pretraining.batches import ColourRules, FIMABatches, MoCoBatches, MSCLBatches
from fsar.pretraining.flow_rotation import FlowViews
from fsar.pretraining.loader import ClipLoader
from pipelines.augment import crops
from pipelines.augment.clips import crop_resize, normalise
from pipelines.augment.crops import crop_views
from pipelines.augment.photometric import Photometric
from pipelines.clips.flow import FlowPairRules
from pipelines.clips.stream import Box, CropView
from pipelines.clips.windows import PairRules, WindowRules
from pipelines.decoding.dali import dali_is_installed
from preprocess.datasets.folder import folder_catalogue
from preprocess.decode import Geometry
from preprocess.stage import Settings, preprocess
from shards_spec import ShardSet
from shards_spec.errors import ConfigError, ShardError
from shards_spec.pictures import decode_picture, flow_field

WINDOWS = WindowRules(frames=4, crop=24)
PAIRS = PairRules(frames=4, stride=2, crop=24)
FLOW = FlowPairRules(frames=4, stride=1, crop=24, flow_series="flow1", motion_filter=False, flow_crops="both")
LOOK = {"mean": (0.5, 0.45, 0.4), "std": (0.225, 0.25, 0.225)}


def loaded(shards, rules, start=0, stop=1, *, batch=4, videos=None, **options):
    options = {"executor": "portable", "threads": 1, "seed": 5} | options
    with ClipLoader(shards, np.arange(videos or shards.num_videos), rules, batch=batch, **options) as loader:
        return [(plan, views) for plan, views, _ in loader.batches(start, stop)]


def same(one, other) -> bool:
    """Tell whether all tensors of two batches are equal."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if one is None:
        return other is None
    if isinstance(one, tuple):
        return all(same(a, b) for a, b in zip(one, other, strict=True))
    return all(same(value, vars(other)[name]) for name, value in vars(one).items())


@pytest.mark.parametrize("together", [1 << 27, 3000])  # all views of some reads at a time, or one or two
def test_crops_of_a_gpu_are_those_of_a_cpu(together, monkeypatch):
    monkeypatch.setattr(crops, "TOGETHER", together)
    frames = [torch.randint(0, 256, (9, *size, 3), dtype=torch.uint8) for size in ((40, 52), (33, 64))]
    boxes = [Box(0, 0, 40, 52), Box(3, 7, 11, 9), Box(22, 40, 11, 12), Box(5, 5, 1, 1)]
    views = [
        CropView(reads, (8, 0, 3), box, flip) for reads in (0, 1) for box in boxes[reads:] for flip in (False, True)
    ]
    views = views[::2] + views[1::2]  # those of one size do not lie together
    clips = crop_views(frames, views, size=16)
    for number, view in enumerate(views):
        images = frames[view.reads][[8, 0, 3]].permute(0, 3, 1, 2)
        assert torch.equal(clips[number], crop_resize(images.float(), view.box, size=16, flip=view.flip))
    on_gpu = torch.empty_like(clips)
    crops.crops_together(frames, views, out=on_gpu)
    torch.testing.assert_close(on_gpu, clips, rtol=0, atol=1e-3)


def test_clips_show_the_frames_and_boxes_of_the_plan():
    shards = FakeShards(6, classes=1, size=(48, 64), frames=np.full(6, 12))
    shards.rgb.sizes[3:] = (64, 48)
    ((plan, views),) = loaded(shards, WINDOWS, batch=6)
    assert views.clips.shape == (6, 6, 4, 3, 24, 24)
    assert views.coordinates.shape == (6, 6, 4)
    for number, view in enumerate(plan.views):
        reads = plan.reads[view.reads]
        first = view.indices[0]
        payload = shards.rgb.read(int(reads.rows[first]), [int(reads.frames[first])])[0]
        picture = torch.from_numpy(np.array(decode_picture(payload, "rgb", 0))).permute(2, 0, 1).float()
        expected = crop_resize(picture, view.box, size=24, flip=view.flip) / 255
        video, place = divmod(number, 6)
        torch.testing.assert_close(views.clips[video, place, 0], expected)
        assert reads.rows[first] == plan.rows[video]
        assert views.flips[video, place] == view.flip


def test_a_later_step_is_the_same_when_the_run_begins_there():
    shards = FakeShards(6, classes=1, size=(32, 40), frames=np.full(6, 12))
    run, resumed = loaded(shards, PAIRS, 0, 4), loaded(shards, PAIRS, 3, 4)
    assert same(run[3][1], resumed[0][1])
    assert not same(run[2][1], run[3][1])


def test_shards_with_frames_left_out_are_refused():
    shards = FakeShards(2, classes=1, frames=np.full(2, 12))
    shards.rgb.kept = lambda _: np.arange(0, 18, 2)
    with pytest.raises(ShardError, match="pre-training needs every frame of a video"):
        loaded(shards, WINDOWS, batch=2)


@pytest.mark.skipif(not dali_is_installed(), reason="DALI is not installed")
def test_dali_gives_the_same_clips_and_flow(tiny_shards):
    assert same(loaded(tiny_shards, FLOW)[0][1], loaded(tiny_shards, FLOW, executor="dali")[0][1])


def test_flow_is_in_units_of_the_whole_fields_largest_radius(tiny_shards):
    ((plan, views),) = loaded(tiny_shards, FLOW)
    series = tiny_shards.series("flow1")
    assert views.flow.shape == (4, 4, 4, 2, 24, 24)
    for number, view in enumerate(plan.flow_views):
        reads = plan.reads[view.reads]
        row, frame = (int(column[view.indices[2]]) for column in (reads.rows, reads.frames))
        picture = decode_picture(series.read(row, [frame])[0], "flow1", row)
        field = torch.from_numpy(flow_field(picture, series.scale(row)[frame])).permute(2, 0, 1)
        expected = crop_resize(field / field.square().sum(0).sqrt().max(), view.box, size=24, flip=view.flip)
        torch.testing.assert_close(views.flow[number // 4, number % 4, 2].double(), expected, rtol=0, atol=1e-3)


def test_flow_of_a_raw_set_is_decoded_beside_its_frames(tiny_videos, tiny_path, tmp_path):
    shutil.copytree(tiny_videos / "ant", tmp_path / "videos" / "ant")  # the first five videos
    catalogue, out = folder_catalogue(tmp_path / "videos", name="tiny"), tmp_path / "shards"
    preprocess(catalogue, out, Settings(Geometry(64, 64), motion=("flow",), codec="raw"))
    with ShardSet.open(out) as raw, ShardSet.open(tiny_path) as jpeg:
        of_raw, of_jpeg = (loaded(shards, FLOW, videos=5)[0][1] for shards in (raw, jpeg))
    assert torch.equal(of_raw.flow, of_jpeg.flow)
    assert (of_raw.clips - of_jpeg.clips).abs().mean() < 0.02


METHODS = {
    "fima": (WINDOWS, FIMABatches(Photometric(**LOOK), seed=2)),
    "moco": (PAIRS, MoCoBatches(ColourRules(**LOOK), seed=2)),
    "mscl": (FLOW, MSCLBatches(ColourRules(**LOOK), FlowViews(layout="released"), seed=2)),
}


@pytest.mark.parametrize("name", METHODS)
def test_processes_get_their_parts_of_the_same_batch(name, tiny_shards):
    rules, make = METHODS[name]
    whole = make(*loaded(tiny_shards, rules, 2, 3)[0])
    first, second = (make(*loaded(tiny_shards, rules, 2, 3, rank=rank, ranks=2)[0]) for rank in (0, 1))

    def joined(one, other):
        if isinstance(one, torch.Tensor):
            return torch.cat([one, other])
        return tuple(joined(a, b) for a, b in zip(one, other, strict=True))

    for part, value in vars(whole).items():
        both = joined(vars(first)[part], vars(second)[part])
        flat = [(both, value)] if isinstance(value, torch.Tensor) else zip(both, value, strict=True)
        for a, b in flat:
            assert same(a, b)


@pytest.mark.parametrize("name", METHODS)
def test_a_steps_colours_are_drawn_from_its_number(name, tiny_shards):
    rules, make = METHODS[name]
    ((plan, views),) = loaded(tiny_shards, rules)
    assert same(make(plan, views), make(plan, views))
    assert not same(make(plan, views), make(replace(plan, n=plan.n + 1), views))
    assert not same(make(plan, views), replace(make, seed=3)(plan, views))


def test_fima_gets_windows_as_pictures_and_differences(tiny_shards):
    plain = Photometric(**LOOK, grey=0, jitter=0, blur=0)
    ((plan, views),) = loaded(tiny_shards, replace(WINDOWS, extra_frame=True))
    batch = FIMABatches(plain, wrap="extra_frame")(plan, views)
    assert [len(parts) for parts in batch.differences] == [3, 3]
    assert batch.rgb[1].shape == (4, 3, 4, 24, 24)
    expected = normalise(views.clips[:, 3, 1:], **LOOK).transpose(1, 2)  # n whole, after m and its two parts
    torch.testing.assert_close(batch.rgb[1], expected)
    assert torch.equal(batch.coordinates[1], views.coordinates[:, 3])


def test_mscl_flow_is_in_the_order_of_its_layout(tiny_shards):
    ((plan, views),) = loaded(tiny_shards, FLOW, seed=6)
    own = replace(views, flow=views.flow[:, [0, 3]])
    colours = ColourRules(**LOOK)
    intended = MSCLBatches(colours)(plan, own)
    released = MSCLBatches(colours, FlowViews(layout="released"))(plan, views)
    assert intended.flow_query.shape == (4, 3, 8, 24, 24)
    assert torch.equal(intended.flow_query[:, :, :4], released.flow_query[:, :, :4])
    assert torch.equal(intended.flow_key[:, :, 4:], released.flow_key[:, :, 4:])
    assert not torch.equal(intended.flow_query[:, :, 4:], released.flow_query[:, :, 4:])
    negated = MSCLBatches(colours, negate_u=True)(plan, own)
    changed = (negated.flow_query != intended.flow_query).flatten(1).any(1)
    assert changed.tolist() == views.flips[:, 0].tolist()
    assert 0 < views.flips[:, 0].sum() < 4
    with pytest.raises(ConfigError, match=r'clip "k" in view "q"; set flow_crops = "both"'):
        MSCLBatches(colours, FlowViews(layout="released"))(plan, own)
    with pytest.raises(ConfigError, match="FlowPairRules"):
        MSCLBatches(colours)(plan, replace(views, flow=None))


def test_colours_are_jittered_blurred_and_normalised_a_clip():
    clips = torch.rand(2, 2, 3, 3, 32, 32)
    shards = FakeShards(2, classes=1, size=(32, 32), frames=np.full(2, 12))
    ((plan, _),) = loaded(shards, PAIRS, batch=2)
    still = ColourRules(**LOOK, jitter=replace(ColourRules(**LOOK).jitter, jitter=0.0, grey=0.0), blur=0.0)
    made = still(clips, plan, torch.Generator())
    torch.testing.assert_close(made, normalise(clips, **LOOK).transpose(2, 3))
    blurred = replace(still, blur=0.5, sigma=(2.0, 2.0))(clips, plan, torch.Generator().manual_seed(1))
    spread = (blurred.std((3, 4, 5)) < 0.7 * made.std((3, 4, 5))).all(2)  # [B, V]
    assert 0 < spread.sum() < 4
