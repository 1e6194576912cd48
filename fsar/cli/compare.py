"""`fsar-eval --compare`: test several runs on the same episodes, and tell their differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch

from fsar.checkpoints import weights_sha256
from fsar.evaluation.comparison import Comparison, compare
from fsar.evaluation.intervals import Answers
from fsar.evaluation.overlap import Overlap
from fsar.evaluation.shared_episodes import UNLABELLED, ModelUnderTest, SharedEpisodes, unlabelled_text
from fsar.report.comparison import comparison_page
from fsar.report.result import coverage, inference
from fsar.run import ranks
from fsar.run.build import class_text_sha256
from fsar.run.config import RunConfig
from shards_spec.errors import ConfigError, suggest
from shards_spec.files import json_bytes, write_whole
from shards_spec.peek.html import write_html


@dataclass(frozen=True)
class CompareOptions:
    """Options for the results; baseline, styles, markdown and csv go only with --compare."""

    baseline: str | None
    allow_styles: bool
    control: bool
    allow_overlap: bool
    out: Path | None
    report: Path | None
    markdown: Path | None
    csv: Path | None


def check_runs(models: Sequence[ModelUnderTest], runs: Sequence[Path], options: CompareOptions) -> list[ModelUnderTest]:
    """Give the runs names that tell them apart.

    Raises:
        ConfigError: there is only one run, a run is given twice, or the runs differ in recipe
            style.
    """
    if len(models) + options.control < 2:
        raise ConfigError("--compare needs two runs, or one and --prototype-control")
    names = distinct_names(runs)
    styles = {name: one.config.recipe_style for name, one in zip(names, models, strict=True)}
    if len(set(styles.values())) > 1 and not options.allow_styles:
        listing = ", ".join(f"{name} {style}" for name, style in styles.items())
        raise ConfigError(
            f"the runs differ in recipe style ({listing}), which decides how they are trained and tested; compare "
            "runs of one style, or --allow-styles to have the result stamped with it"
        )
    return [replace(one, name=name) for one, name in zip(models, names, strict=True)]


def distinct_names(runs: Sequence[Path]) -> list[str]:
    """Name the folders, with as many of the folders above them as tell them apart.

    Raises:
        ConfigError: a folder is given twice.
    """
    paths = [run.resolve() for run in runs]
    twice = [str(run) for run, path in zip(runs, paths, strict=True) if paths.count(path) > 1]
    if twice:
        raise ConfigError(f"--compare: {' and '.join(twice)} are one run")
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def compare_runs(models: Sequence[ModelUnderTest], shared: SharedEpisodes, options: CompareOptions) -> None:
    """Ask all models the same episodes; print and write the comparison.

    Raises:
        ConfigError: there is no such baseline, a run was trained on the classes, or its weights do
            not fit.
    """
    names = [one.name for one in models]
    baseline = options.baseline or names[0]
    if baseline not in names:
        raise ConfigError(f"--baseline {baseline} is none of the runs; {suggest(baseline, names)}")
    overlaps = {one.name: shared.overlap(one, allowed=options.allow_overlap) for one in models}
    answers: dict[str, Answers] = {}
    described = {one.name: _describe(one, shared) for one in models}
    for one in models:
        model, answers[one.name], device = shared.run(one)
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        described[one.name] |= {"weights_sha256": weights_sha256(model), "device": where}
    comparison = compare(answers, shared.shards.dataset.classes, baseline=baseline)
    _write(comparison, models, shared, overlaps, described, options)


def _describe(tested: ModelUnderTest, shared: SharedEpisodes) -> dict[str, Any]:
    config = shared.configured(tested.config)
    keys = ("method", "trunk", "recipe_style", "frames", "frame_rule", "test_frames", "views", "resize", "crop")
    others = ("clip_frames", "clip_stride", *UNLABELLED, "precision", "class_text", "labels", "tasks")
    described = {key: getattr(config, key) for key in keys + others}
    return described | inference(config) | {"class_text_sha256": class_text_sha256(config)} | tested.stamp


def _write(
    comparison: Comparison,
    models: Sequence[ModelUnderTest],
    shared: SharedEpisodes,
    overlaps: dict[str, Overlap],
    described: dict[str, dict[str, Any]],
    options: CompareOptions,
) -> None:
    details = {one.name: _details(one, shared, overlaps[one.name]) for one in models}
    styles = sorted({one.config.recipe_style for one in models})
    text = _heading(shared, styles) + comparison.to_markdown(details)
    click.echo(text, nl=False)
    if not ranks.is_first():
        return
    if options.markdown:
        write_whole(options.markdown, text.encode("utf-8", "backslashreplace"))
    if options.csv:
        write_whole(options.csv, comparison.to_csv(details).encode("utf-8", "backslashreplace"))
    if options.report:
        facts = {name: one["weights_sha256"] for name, one in described.items()}
        page = comparison_page(comparison, details, facts, _provenance(shared) | {"styles": styles})
        write_html(options.report, page)
    if options.out:
        rows = [
            {"run": name} | described[name] | {"overlap": overlaps[name].to_json()} | figures
            for name, figures in comparison.to_json().items()
        ]
        table = _provenance(shared) | {"styles": styles, "baseline": comparison.baseline, "runs": rows}
        write_whole(options.out, json_bytes(table))


def frames_text(config: RunConfig) -> str:
    """Describe the frame rule: frames, or clips of frames/stride; their place; views."""
    clips = f" clips of {config.clip_frames}/{config.clip_stride}" if config.clip_frames else ""
    views = f", {config.views} views" if config.views else ""
    return f"{config.frames}{clips} {config.test_frames}{views}"


def _details(tested: ModelUnderTest, shared: SharedEpisodes, overlap: Overlap) -> dict[str, str]:
    """Make the columns that describe a run."""
    config, stamp = shared.configured(tested.config), tested.stamp
    chosen_on = stamp.get("selected_on", "last")
    return {
        "method": config.method,
        "trunk": config.trunk,
        "frames": frames_text(config),
        "style": config.recipe_style,
        "checkpoint": stamp.get("checkpoint", "none") + (f" on {chosen_on}" if chosen_on != "last" else ""),
        "unlabelled": unlabelled_text(config),
        "texts": Path(config.class_text).name or "none",
        "inference": inference(config).get("inference", "none"),
        "labels": Path(config.labels).name or "none",
        "tasks": config.tasks,
        "seen in training": overlap.short,
    }


def _heading(shared: SharedEpisodes, styles: Sequence[str]) -> str:
    config, dataset = shared.config, shared.shards.dataset
    lines = [f"{dataset.name}, {shared.split}: {config.test_way}-way {config.test_shot}-shot, seed {config.eval_seed}"]
    if shared.shuffled:
        lines.append("The frames of each clip are shuffled.")
    if len(styles) > 1:
        lines.append(f"The runs differ in recipe style ({', '.join(styles)}): more than their methods sets them apart.")
    return "".join(line + "\n\n" for line in lines)


def _provenance(shared: SharedEpisodes) -> dict[str, Any]:
    shards, config = shared.shards, shared.config
    return shared.stamp() | {
        "dataset": shards.dataset.name,
        "way": config.test_way,
        "shot": config.test_shot,
        "groups": config.groups,
        "fsar": version("fsar"),
        "torch": torch.__version__,
        "shards_sha256": shards.sha256,
        "splits_sha256": {name: split.sha256 for name, split in shards.dataset.splits.items()},
        "coverage": coverage(shards),
    }
