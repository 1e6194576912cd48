"""Write `report.html` of a pre-training run: curves, pictures of its trunk, provenance and configuration."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterable, Sequence
from html import escape
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
from fsar.pretraining.loader import ClipLoader, ClipViews
from fsar.pretraining.trainer import build_pretraining
from fsar.probing.activation import activation_sheet
from fsar.report.run import chart, document, html_bytes, provenance_rows, read_log, table
from fsar.trunks import Trunk
from pipelines.clips.labelled import ClipRules
from pipelines.clips.stream import ClipPlan, CropView
from shards_spec import ShardSet
from shards_spec.files import write_whole
from shards_spec.peek.sheet import Block, Legend, Row, draw_sheet, png_bytes
from shards_spec.schema import flow_pairs

Ints = NDArray[np.int64]

VIDEOS = 3  # of each picture
WHEEL = 72  # pixels of the legend
# Files in the run folder, and what the report says of them.
PICTURES = {
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
        shards: What it read.
        rows: Catalogue rows of its videos.
        model: The method, trained.
        device: Where it is.

    Raises:
        ShardError: a frame cannot be read; DiskError: the disk is full.
    """
    chosen = np.random.default_rng(config.seed).permutation(rows)[:VIDEOS].tolist()
    trunks: dict[str, Trunk] = {}
    if config.weights in {"", "fetch"} or Path(config.weights).exists():  # a file may be gone by now
        trunks["before training"] = build_pretraining(config, samples=1).encoder.to(device)  # the same as then
    trunks["after training"] = model.encoder
    look = ClipRules(frames=config.clip_frames, stride=frame_stride(config), size=config.crop)
    title = f"{config.method}, {config.trunk}: where the trunk responds"
    sheet = activation_sheet(title, shards, chosen, trunks, look, device=device)
    write_whole(run / "activation.png", png_bytes(sheet))
    if config.method == "mscl":
        write_whole(run / "flow.png", png_bytes(flow_sheet(config, shards, np.array(chosen))))


def flow_sheet(config: PretrainConfig, shards: ShardSet, rows: Ints) -> Image:
    """Query clips of MSCL: their frames, the flow in the query's crop in the model's colours, and the same turned."""
    rules, count = clip_rules(config), len(rows)
    with ClipLoader(shards, rows, rules, batch=count, seed=config.seed, device="cpu", executor="portable") as loader:
        ((plan, views, _),) = loader.batches(0, 1)
    angles = draw_angles(count, generator=torch.Generator().manual_seed(config.seed))
    series = config.value("flow_series")
    blocks = [_flow_block(shards, series, plan, views, place, angles[place]) for place in range(count)]
    title = f"{config.method}: flow {series} of query clips"
    lines = ("vectors in units of the longest one of their whole field, in the crop of the clip",)
    return draw_sheet(title, lines, blocks, legend=_legend())


def _flow_block(shards: ShardSet, series: str, plan: ClipPlan, views: ClipViews, place: int, angle: Tensor) -> Block:
    """The query clip of video `place` of a plan."""
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
    """[T] stored members of a view."""
    return plan.reads[view.reads].frames[list(view.indices)]


def _coloured(flow: Tensor) -> Sequence[NDArray[np.uint8]]:
    """Flow [1, 2, t, h, w] in units -> t pictures [h, w, 3] in the model's own colours."""
    return _pictures(rearrange(FlowColours()(flow), "1 c t h w -> t c h w"))


def _pictures(clip: Tensor) -> Sequence[NDArray[np.uint8]]:
    """[T, 3, h, w] in [0, 1] -> T pictures [h, w, 3]."""
    return list(rearrange(255 * clip, "t c h w -> t h w c").round().byte().numpy())


def _legend() -> Legend:
    """The model's wheel: each place shows the colour of motion towards it from the centre."""
    axis = (torch.arange(WHEEL) + 0.5) * 2 / WHEEL - 1
    v, u = torch.meshgrid(axis, axis, indexing="ij")  # [h, w] each
    (wheel,) = _coloured(torch.stack([u, v])[None, :, None])
    wheel[(u.square() + v.square() > 1).numpy()] = 255
    return Legend(("colour = direction, as on the wheel;", "the stronger, the faster;", "white = no motion"), wheel)


ACCURACY = "accuracy_"
TOP = re.compile(r"top(\d)_acc(.*)")  # MSCL's names of accuracies
MEANINGS = {  # of MSCL's terms
    "loss_cls": "pictures to pictures",
    "loss_cls_flow": "flow to flow",
    "loss_cls_mx": "pictures to flow",
    "loss_cls_mx_r": "flow to pictures",
    "loss_cls_flow_aug": "turned flow to turned flow",
    "loss_cls_mx_aug": "pictures to turned flow",
    "loss_cls_mx_r_aug": "turned flow to pictures",
    "loss_pos": "frame by frame, pictures to flow",
}
# What a record has besides terms of the loss and accuracies.
OTHERS = frozenset({"kind", "n", "epoch", "loss", "lr", "skipped", "samples_per_s", "data_wait", "memory_mb"})


def write_pretrain_report(run: Path, result: dict[str, Any], config: dict[str, Any]) -> Path:
    """Write the page of a finished run from its result, configuration and log.

    Raises:
        DiskError: the disk is full.
    """
    path = run / "report.html"
    pictures = [png_part(run / file, heading) for file, heading in PICTURES.items() if (run / file).exists()]
    write_whole(path, html_bytes(pretrain_page(run.name, result, config, read_log(run), pictures=pictures)))
    return path


def png_part(path: Path, heading: str) -> str:
    """A PNG file as a part of a page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f"<h2>{escape(heading)}</h2><div class=scroll>"
        f'<img style="max-width:100%" alt="{escape(heading, quote=True)}" src="data:image/png;base64,{data}"></div>'
    )


def pretrain_page(
    title: str,
    result: dict[str, Any],
    config: dict[str, Any],
    log: list[dict[str, Any]],
    *,
    pictures: Iterable[str] = (),
) -> str:
    """The whole page as text; `pictures` are parts of it."""
    heading = f"{result['method']} pre-training of {result['trunk']} on {result['training']}"
    counts = f"{result['videos']:,} videos, {result['epochs']} epochs, {result['steps']:,} steps of {result['batch']}"
    parts = [
        f"<h1>{escape(heading)}</h1>",
        f"<p class=quiet>{escape(title)} · {counts} · {result['seconds'] / 3600:.2f} h</p>",
        "<h2>Training</h2>",
        f"<div class=row>{''.join(_charts(log))}</div>",
        *pictures,
        f"<h2>Provenance</h2>{table(provenance_rows(result))}",
        f"<h2>Configuration</h2>{table((key, json.dumps(value)) for key, value in config.items())}",
    ]
    return document(heading, parts)


def _charts(log: list[dict[str, Any]]) -> Iterable[str]:
    """The loss, each of its terms, the accuracies, the rate, and where the time goes."""
    records = [record for record in log if record["kind"] == "train" and "loss" in record]
    if not records:
        return
    names = [name for name in records[-1] if name not in OTHERS]
    rights = [name for name in names if name.startswith(ACCURACY)]
    terms = [name for name in names if name not in rights]
    for name in ["loss", *(terms if len(terms) > 1 else ())]:
        yield _curve(records, name, f"{name}: {MEANINGS[name]}" if name in MEANINGS else name)
    yield from _accuracies(records, rights)
    yield _curve(records, "lr", "learning rate", low=0.0)
    yield _curve(records, "samples_per_s", "videos per second", low=0.0)
    yield _curve(records, "data_wait", "share of time waiting for data", low=0.0, high=1.0)


def _accuracies(records: list[dict[str, Any]], names: Iterable[str]) -> Iterable[str]:
    """A chart a term, top 1 and top 5 in one."""
    terms: dict[str, dict[str, str]] = {}  # term -> line of its chart -> name in the log
    for name in names:
        short = name.removeprefix(ACCURACY)
        top = TOP.fullmatch(short)
        term, line = (f"loss{'' if top[2] == '_pos' else '_cls'}{top[2]}", f"top {top[1]}") if top else (short, short)
        terms.setdefault(term, {})[line] = name
    for term, lines in terms.items():
        series = {line: [(r["epoch"], r[name]) for r in records if name in r] for line, name in lines.items()}
        yield chart(f"accuracy of {term}", series, low=0.0, high=1.0, unit="epochs")


def _curve(
    records: list[dict[str, Any]], name: str, title: str, *, low: float | None = None, high: float | None = None
) -> str:
    points = [(record["epoch"], record[name]) for record in records if name in record]
    return chart(title, {name: points}, low=low, high=high, unit="epochs")
