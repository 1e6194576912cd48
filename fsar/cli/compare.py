"""`fsar-eval --compare`: several runs, the same episodes -> tables of what sets them apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch

from fsar.checkpoints import weights_sha256
from fsar.cli.weights import prototype_candidate
from fsar.evaluation.accuracy import Answers
from fsar.evaluation.comparison import Comparison, compare
from fsar.evaluation.overlap import Overlap
from fsar.evaluation.shared_episodes import UNLABELLED, Candidate, Trial, unlabelled_text
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
    """What is done with the answers; `baseline`, styles and tables go with --compare alone."""

    baseline: str | None
    allow_styles: bool
    control: bool
    allow_overlap: bool
    out: Path | None
    report: Path | None
    markdown: Path | None
    csv: Path | None


def check_runs(found: Sequence[Candidate], runs: Sequence[Path], options: CompareOptions) -> list[Candidate]:
    """The runs under names that tell them apart, and the control where it is asked for.

    Raises:
        ConfigError: a run alone or given twice, or runs that differ in recipe style.
    """
    if len(found) + options.control < 2:
        raise ConfigError("--compare needs two runs, or one and --prototype-control")
    names = distinct_names(runs)
    styles = {name: one.config.recipe_style for name, one in zip(names, found, strict=True)}
    if len(set(styles.values())) > 1 and not options.allow_styles:
        listing = ", ".join(f"{name} {style}" for name, style in styles.items())
        raise ConfigError(
            f"the runs differ in recipe style ({listing}), which decides how they are trained and tested; compare "
            "runs of one style, or --allow-styles to have the result stamped with it"
        )
    named = [replace(one, name=name) for one, name in zip(found, names, strict=True)]
    return [*named, prototype_candidate(found[0].config)] if options.control else named


def distinct_names(runs: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of the folders above them as tell them apart.

    Raises:
        ConfigError: a folder stands there twice.
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


def compare_runs(found: Sequence[Candidate], trial: Trial, options: CompareOptions) -> None:
    """Ask all of them the same episodes; print and write what they answered.

    Raises:
        ConfigError: there is no such baseline, a run has seen the classes, or its weights do not fit.
    """
    names = [one.name for one in found]
    baseline = options.baseline or names[0]
    if baseline not in names:
        raise ConfigError(f"--baseline {baseline} is none of the runs; {suggest(baseline, names)}")
    overlaps = {one.name: trial.overlap(one, allowed=options.allow_overlap) for one in found}
    answers: dict[str, Answers] = {}
    described = {one.name: _describe(one, trial) for one in found}
    for one in found:
        model, answers[one.name], device = trial.run(one)
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        described[one.name] |= {"weights_sha256": weights_sha256(model), "device": where}
    comparison = compare(answers, trial.shards.dataset.classes, baseline=baseline)
    _write(comparison, found, trial, overlaps, described, options)


def _describe(candidate: Candidate, trial: Trial) -> dict[str, Any]:
    config = trial.configured(candidate.config)
    keys = ("method", "trunk", "recipe_style", "frames", "frame_rule", "test_frames", "views", "resize", "crop")
    others = ("clip_frames", "clip_stride", *UNLABELLED, "precision", "class_text", "labels", "tasks")
    described = {key: getattr(config, key) for key in keys + others}
    return described | inference(config) | {"class_text_sha256": class_text_sha256(config)} | candidate.stamp


def _write(
    comparison: Comparison,
    found: Sequence[Candidate],
    trial: Trial,
    overlaps: dict[str, Overlap],
    described: dict[str, dict[str, Any]],
    options: CompareOptions,
) -> None:
    details = {one.name: _details(one, trial, overlaps[one.name]) for one in found}
    styles = sorted({one.config.recipe_style for one in found})
    text = _heading(trial, styles) + comparison.to_markdown(details)
    click.echo(text, nl=False)
    if not ranks.is_first():
        return
    if options.markdown:
        write_whole(options.markdown, text.encode("utf-8", "backslashreplace"))
    if options.csv:
        write_whole(options.csv, comparison.to_csv(details).encode("utf-8", "backslashreplace"))
    if options.report:
        facts = {name: one["weights_sha256"] for name, one in described.items()}
        page = comparison_page(comparison, details, facts, _provenance(trial) | {"styles": styles})
        write_html(options.report, page)
    if options.out:
        rows = [
            {"run": name} | described[name] | {"overlap": overlaps[name].to_json()} | figures
            for name, figures in comparison.to_json().items()
        ]
        table = _provenance(trial) | {"styles": styles, "baseline": comparison.baseline, "runs": rows}
        write_whole(options.out, json_bytes(table))


def frames_text(config: RunConfig) -> str:
    """How many frames of a video are looked at, or clips of how many, every how many-th; and where they are taken."""
    clips = f" clips of {config.clip_frames}/{config.clip_stride}" if config.clip_frames else ""
    views = f", {config.views} views" if config.views else ""
    return f"{config.frames}{clips} {config.test_frames}{views}"


def _details(candidate: Candidate, trial: Trial, overlap: Overlap) -> dict[str, str]:
    """The columns that say what a run is."""
    config, stamp = trial.configured(candidate.config), candidate.stamp
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


def _heading(trial: Trial, styles: Sequence[str]) -> str:
    config, dataset = trial.config, trial.shards.dataset
    lines = [f"{dataset.name}, {trial.split}: {config.test_way}-way {config.test_shot}-shot, seed {config.eval_seed}"]
    if trial.shuffled:
        lines.append("The frames of each clip are shuffled.")
    if len(styles) > 1:
        lines.append(f"The runs differ in recipe style ({', '.join(styles)}): more than their methods sets them apart.")
    return "".join(line + "\n\n" for line in lines)


def _provenance(trial: Trial) -> dict[str, Any]:
    shards, config = trial.shards, trial.config
    return trial.stamp() | {
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
