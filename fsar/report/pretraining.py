"""`report.html` of a pre-training run: curves, pictures of its trunk and its flow, provenance."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor

from fsar.pretraining import PretrainingMethod
from fsar.pretraining.batches import clip_rules
from fsar.pretraining.config import PretrainConfig, frame_stride
from fsar.pretraining.flow_rotation import FlowColours, draw_angles, rotate_flow
from fsar.pretraining.loader import ClipLoader, CroppedClips
from fsar.pretraining.trainer import build_pretraining
from fsar.probing.activation import activation_sheet
from fsar.report.drawings import Chart, chart
from fsar.report.html import render
from fsar.report.pictures import png_uri
from fsar.report.run import config_rows, provenance_rows
from fsar.run.folder import read_log
from fsar.trunks import Trunk
from pipelines.clips.labelled import ProbeRules
from pipelines.clips.stream import ClipPlan, CropView
from shards_spec import ShardSet
from shards_spec.files import write_whole
from shards_spec.peek.html import write_html
from shards_spec.peek.sheet import Block, Legend, Row, draw_sheet, png_bytes
from shards_spec.schema import flow_pairs

Ints = NDArray[np.int64]

VIDEOS = 3  # of each picture
WHEEL = 72  # pixels of the legend
# Pictures in the run folder -> their headings in the report.
SHEETS = {
    "activation.png": "Where the trunk responds",
    "flow.png": "Flow as the model reads it, as it is and turned",
}


def draw_pictures(
    run: Path, config: PretrainConfig, shards: ShardSet, rows: Ints, model: PretrainingMethod, *, device: torch.device
) -> None:
    """Write the pictures of a finished run to its folder.

    Args:
        run: The run folder.
        config: Its configuration.
        shards: The shards that it read.
        rows: Catalogue rows of its videos.
        model: The trained method.
        device: The device of the method.

    Raises:
        ShardError: a frame cannot be read; DiskError: the disk is full.
    """
    chosen = np.random.default_rng(config.seed).permutation(rows)[:VIDEOS].tolist()
    trunks: dict[str, Trunk] = {}
    # The seed draws the same weights as before training; a file of weights may be gone by now.
    if config.weights in {"", "fetch"} or Path(config.weights).exists():
        trunks["before training"] = build_pretraining(config, samples=1).encoder.to(device)
    trunks["after training"] = model.encoder
    rules = ProbeRules(frames=config.clip_frames, stride=frame_stride(config), size=config.crop)
    title = f"{config.method}, {config.trunk}: where the trunk responds"
    sheet = activation_sheet(title, shards, chosen, trunks, rules, device=device)
    write_whole(run / "activation.png", png_bytes(sheet))
    if config.method == "mscl":
        write_whole(run / "flow.png", png_bytes(flow_sheet(config, shards, np.array(chosen))))


def flow_sheet(config: PretrainConfig, shards: ShardSet, rows: Ints) -> Image:
    """Draw query clips of MSCL: frames, the flow of the same crop, and that flow turned."""
    rules, count = clip_rules(config), len(rows)
    with ClipLoader(shards, rows, rules, batch=count, seed=config.seed, device="cpu", executor="portable") as loader:
        ((plan, views, _),) = loader.batches(0, 1)
    angles = draw_angles(count, generator=torch.Generator().manual_seed(config.seed))
    series = config.value("flow_series")
    blocks = [_flow_block(shards, series, plan, views, place, angles[place]) for place in range(count)]
    title = f"{config.method}: flow {series} of query clips"
    lines = ("vectors in units of the longest one of their whole field, in the crop of the clip",)
    return draw_sheet(title, lines, blocks, legend=_legend())


def _flow_block(shards: ShardSet, series: str, plan: ClipPlan, views: CroppedClips, place: int, angle: Tensor) -> Block:
    """Draw the query clip of video `place` of a plan."""
    assert views.flow is not None
    row, count = int(plan.rows[place]), len(plan.rows)
    fields = _positions(plan, plan.flow_views[place * (len(plan.flow_views) // count)])
    step = (flow_pairs(series) or (1, 1))[0]
    starts = shards.series(series).kept(row)[fields].tolist()
    frames = _positions(plan, plan.views[2 * place])
    every = len(frames) // len(fields)
    flow = rearrange(views.flow[place, 0], "t c h w -> 1 c t h w")
    degrees = round(math.degrees(float(angle)))
    label = shards.dataset.classes[int(shards.labels[row])]
    mirrored = ", mirrored" if bool(views.flips[place, 0]) else ""
    return Block(
        shards.name(row),
        f"class {label}  |  flow turned by {degrees} degrees{mirrored}",
        (1, 1),
        [
            Row(("frames",), _pictures(views.clips[place, 0, ::every]), [str(n) for n in frames[::every].tolist()]),
            Row(("flow",), _coloured(flow), [f"{n} to {n + step}" for n in starts]),
            Row(("turned",), _coloured(rotate_flow(flow, angle[None])), [f"{n} to {n + step}" for n in starts]),
        ],
    )


def _positions(plan: ClipPlan, view: CropView) -> Ints:
    """List the stored members [T] that a view reads."""
    return plan.reads[view.reads].frames[list(view.indices)]


def _coloured(flow: Tensor) -> Sequence[NDArray[np.uint8]]:
    """Colour flow [1, 2, t, h, w] in units as the model does: t pictures [h, w, 3]."""
    return _pictures(rearrange(FlowColours()(flow), "1 c t h w -> t c h w"))


def _pictures(clip: Tensor) -> Sequence[NDArray[np.uint8]]:
    """Turn colours [T, 3, h, w] in [0, 1] into T pictures [h, w, 3]."""
    return list(rearrange(255 * clip, "t c h w -> t h w c").round().byte().numpy())


def _legend() -> Legend:
    """Draw the model's wheel: each place shows the colour of motion from the centre towards it."""
    axis = (torch.arange(WHEEL) + 0.5) * 2 / WHEEL - 1
    v, u = torch.meshgrid(axis, axis, indexing="ij")  # [h, w] each
    (wheel,) = _coloured(torch.stack([u, v])[None, :, None])
    wheel[(u.square() + v.square() > 1).numpy()] = 255
    return Legend(("colour = direction, as on the wheel;", "the stronger, the faster;", "white = no motion"), wheel)


ACCURACY = "accuracy_"
TOP = re.compile(r"top(\d)_acc(.*)")  # MSCL's names of accuracies
# MSCL's terms of the loss -> pairs that they bring together.
MEANINGS = {
    "loss_cls": "pictures to pictures",
    "loss_cls_flow": "flow to flow",
    "loss_cls_mx": "pictures to flow",
    "loss_cls_mx_r": "flow to pictures",
    "loss_cls_flow_aug": "turned flow to turned flow",
    "loss_cls_mx_aug": "pictures to turned flow",
    "loss_cls_mx_r_aug": "turned flow to pictures",
    "loss_pos": "frame by frame, pictures to flow",
}
# Keys of a record that are neither terms of the loss nor accuracies.
OTHERS = frozenset({"kind", "n", "epoch", "loss", "lr", "skipped", "samples_per_s", "data_wait", "memory_mb"})


def write_pretrain_report(run: Path, result: dict[str, Any], config: dict[str, Any]) -> Path:
    """Write the page of a finished run from its result, configuration, log and pictures.

    Raises:
        DiskError: the disk is full.
    """
    path = run / "report.html"
    sheets = {heading: png_uri(run / file) for file, heading in SHEETS.items() if (run / file).exists()}
    write_html(path, pretrain_page(run.name, result, config, read_log(run), sheets=sheets))
    return path


def pretrain_page(
    title: str,
    result: dict[str, Any],
    config: dict[str, Any],
    log: list[dict[str, Any]],
    *,
    sheets: Mapping[str, str] | None = None,
) -> str:
    """Write the whole page; `sheets` are headings and addresses of pictures."""
    counts = f"{result['videos']:,} videos, {result['epochs']} epochs, {result['steps']:,} steps of {result['batch']}"
    return render(
        "pretraining.html",
        heading=f"{result['method']} pre-training of {result['trunk']} on {result['training']}",
        title=title,
        counts=counts,
        hours=result["seconds"] / 3600,
        charts=list(_charts(log)),
        sheets=list((sheets or {}).items()),
        provenance=list(provenance_rows(result)),
        config=config_rows(config),
    )


def _charts(log: list[dict[str, Any]]) -> Iterator[Chart]:
    """Draw the loss, each of its terms, the accuracies, the rate, and where the time goes."""
    records = [record for record in log if record["kind"] == "train" and "loss" in record]
    if not records:
        return
    names = [name for name in records[-1] if name not in OTHERS]
    accuracies = [name for name in names if name.startswith(ACCURACY)]
    terms = [name for name in names if name not in accuracies]
    for name in ["loss", *(terms if len(terms) > 1 else ())]:
        yield _curve(records, name, f"{name}: {MEANINGS[name]}" if name in MEANINGS else name)
    yield from _accuracies(records, accuracies)
    yield _curve(records, "lr", "learning rate", low=0.0)
    yield _curve(records, "samples_per_s", "videos per second", low=0.0)
    yield _curve(records, "data_wait", "share of time waiting for data", low=0.0, high=1.0)


def _accuracies(records: list[dict[str, Any]], names: Iterable[str]) -> Iterator[Chart]:
    """Draw a chart for each term, top 1 and top 5 in one."""
    terms: dict[str, dict[str, str]] = {}  # term -> line of its chart -> name in the log
    for name in names:
        short = name.removeprefix(ACCURACY)
        top = TOP.fullmatch(short)
        term, line = (f"loss{'' if top[2] == '_pos' else '_cls'}{top[2]}", f"top {top[1]}") if top else (short, short)
        terms.setdefault(term, {})[line] = name
    for term, lines in terms.items():
        series = {line: _points(records, name) for line, name in lines.items()}
        yield chart(f"accuracy of {term}", series, low=0.0, high=1.0, unit="epochs")


def _curve(
    records: list[dict[str, Any]], name: str, title: str, *, low: float | None = None, high: float | None = None
) -> Chart:
    return chart(title, {name: _points(records, name)}, low=low, high=high, unit="epochs")


def _points(records: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """List a value of the log by epoch."""
    return [(record["epoch"], record[name]) for record in records if name in record]
