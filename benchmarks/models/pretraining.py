"""Measure the gain of pre-training without labels, by probes on held-out videos.

Each method is trained whole, and with each of its terms left out once.

    python -m benchmarks.models.pretraining --shards synthetic --out runs/pretraining --epochs 4
    python -m benchmarks.models.pretraining --shards clips --out runs/clips --name pretraining-egogestar -- --queue 64

Every row is a run of `fsar-pretrain` with the method's tiny recipe and as many steps as the others. With several
`--seed` it is as many runs. A run that has ended is kept, one that was interrupted goes on. Then every trunk is
probed on the same videos, in clips like those that it was trained on: those of `--probe-split`, whose classes
pre-training never saw, a part of them as queries. Differences are paired, video by video; intervals are over videos.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.measure.environment import load_average, write_result
from benchmarks.measure.timing import markdown_table
from fsar.cli.options import overrides
from fsar.cli.pretrain import cli, resolve
from fsar.pretraining import MotionViews
from fsar.pretraining.batches import ViewLoader
from fsar.pretraining.config import PretrainConfig, all_keys, pretrain_config_of
from fsar.probing.prober import Prober, Rules
from fsar.probing.scores import group_interval
from fsar.probing.weights import Probed, open_probed
from fsar.trunks.base import VideoTrunk
from pipelines.clips.labelled import ProbeRules
from shards_spec import ShardSet
from shards_spec.cli.console import run_command
from shards_spec.splits.divisions import Division, held_out_division

Floats = NDArray[np.float64]

WARM = 20  # batches whose statistics an untrained trunk's BatchNorm takes on


@dataclass(frozen=True)
class Variant:
    """A row of the table: a method's tiny recipe, and what is changed in it."""

    name: str
    method: str
    options: tuple[str, ...] = ()
    less: str = ""  # the variant that it lacks a term of


VARIANTS = (
    Variant("moco", "moco"),
    Variant("fima", "fima"),
    Variant("fima without places", "fima", ("--dense-weight", "0"), less="fima"),
    Variant("fima without parts", "fima", ("--local-weight", "0"), less="fima"),
    Variant("mscl", "mscl"),
    Variant("mscl without sampling by motion", "mscl", ("--motion-filter", "false"), less="mscl"),
    Variant("mscl without turned flow", "mscl", ("--fra", "false"), less="mscl"),
    Variant("mscl without frames against flow", "mscl", ("--local-weight", "0"), less="mscl"),
    Variant("mscl without clips against flow", "mscl", ("--cross-weight", "0"), less="mscl"),
)


@dataclass
class Answers:
    """Answers of a trunk, or of several seeds of it: a 1 or 0 a seed and query, by the measure."""

    right: dict[str, Floats] = field(default_factory=dict)  # [seeds, Q]

    def add(self, right: dict[str, str]) -> None:
        """Answers of one more seed, as results have them."""
        for name, answers in right.items():
            row = np.array([int(answer) for answer in answers], np.float64)[None]
            self.right[name] = np.concatenate([self.right[name], row]) if name in self.right else row

    def figures(self, groups: NDArray[np.int64]) -> dict[str, Any]:
        """Mean over seeds and videos, its interval over videos, and the mean of each seed."""
        found: dict[str, Any] = {}
        for name, right in self.right.items():
            videos = right.mean(axis=0)  # [Q]
            found[name] = figure(videos, groups) | {"seeds": [round(float(seed), 4) for seed in right.mean(axis=1)]}
        return found

    def less(self, other: Answers, groups: NDArray[np.int64]) -> dict[str, Any]:
        """Compute the interval of the paired difference."""
        return {k: figure(right.mean(axis=0) - other.right[k].mean(axis=0), groups) for k, right in self.right.items()}


def figure(videos: Floats, groups: NDArray[np.int64]) -> dict[str, float | None]:
    """Mean of values [Q] of the queries, and half of its 95 % interval."""
    half = group_interval(videos, groups)
    return {"value": round(float(videos.mean()), 4), "interval": None if half is None else round(half, 4)}


def asked_of(variant: Variant, words: Sequence[str]) -> list[str]:
    """The words of fsar-pretrain that decide what a variant is."""
    return ["--recipe", f"{variant.method}-tiny", *words, *variant.options]


def config_of(dataset: str, words: Sequence[str]) -> PretrainConfig:
    """The configuration that these words ask fsar-pretrain for."""
    given = cli.make_context("fsar-pretrain", ["--shards", ".", "--out", "run", *words]).params
    kinds = all_keys()
    changed = overrides({key: value for key, value in given.items() if key in kinds and key != "method"}, kinds)
    return resolve(dataset, given["method"], given["recipe"], changed)


def check_kept(shards: ShardSet, run: Path, words: Sequence[str]) -> None:
    """Refuse a run that was made otherwise than these words ask, or of other shards."""
    different = config_of(shards.dataset.name, words).differences(pretrain_config_of(run))
    if (run / "result.json").exists():
        made = json.loads((run / "result.json").read_text())["shards_sha256"]
        different += [] if made == shards.sha256 else ["it is of other shards"]
    if different:
        raise click.ClickException(f"{run} was made otherwise ({'; '.join(different)}): name another --out")


def train(shards: ShardSet, run: Path, variant: Variant, words: Sequence[str]) -> None:
    """Pre-train one variant in a process of its own, or go on with it; nothing where its result is there."""
    given, resume = asked_of(variant, words), (run / "checkpoints" / "last.safetensors").exists()
    done = (run / "result.json").exists()
    if resume or done:
        check_kept(shards, run, given)
    if done:
        return
    call = [sys.executable, "-m", "fsar.cli.pretrain", "--shards", str(shards.path), "--out", str(run)]
    call += ["--resume"] if resume else given
    if code := subprocess.run(call, check=False).returncode:
        raise click.ClickException(f"{' '.join(call[1:])}: ended with exit code {code}")


class Bench:
    """All trunks on the videos of one division."""

    def __init__(self, shards: ShardSet, division: Division, *, clips: int, cache: Path) -> None:
        self.shards, self.division, self.clips, self.cache = shards, division, clips, cache
        self.groups = shards.groups[division.test].astype(np.int64)

    def ask(self, probed: Probed, answers: Answers) -> None:
        """Add the answers of a trunk, in clips like those that it was trained on."""
        rules = Rules(ProbeRules(**probed.clips | {"clips": self.clips}))
        device = torch.device("cpu")
        with Prober(self.shards, self.division, probed, rules, device=device, cache=self.cache) as prober:
            recall, votes = prober.retrieval()[0]["recall"], prober.knn(k=20, temperature=0.07)["accuracy"]
        answers.add({"R@1": recall["R@1"]["right"], "R@5": recall["R@5"]["right"], "knn": votes["right"]})

    def ask_untrained(self, run: Path, seed: int, answers: Answers, *, warm: bool) -> None:
        """Ask the trunk of a run with random weights; `warm` lets its BatchNorm see the training clips."""
        trained = open_probed(str(run), None)
        probed = replace(open_probed(None, trained.name, seed=seed), clips=trained.clips)
        if warm:
            settle(self.shards, run, probed)
            probed = replace(probed, sha256=f"{probed.sha256}-{run.name}")
        self.ask(probed, answers)


@torch.no_grad()
def settle(shards: ShardSet, run: Path, probed: Probed) -> None:
    """Give BatchNorm the statistics of a run's clips, its weights staying as they are."""
    config, trunk = pretrain_config_of(run), probed.trunk.train()
    assert isinstance(trunk, VideoTrunk)
    with ViewLoader(config, shards, device=torch.device("cpu")) as views:
        for batch, _ in views.batches(0, WARM, trunk=trunk):
            trunk.clip_maps(batch.rgb[0] if isinstance(batch, MotionViews) else batch.query)
    trunk.eval()


def compare_few_shot(shards: Path, runs: Sequence[Path], out: Path) -> dict[str, Any]:
    """Prototypes on each trunk against the first, on the same episodes of the test classes."""
    words = ["--shards", str(shards), "--out", str(out), "--allow-styles", "--compare", *map(str, runs)]
    call = [sys.executable, "-m", "fsar.cli.evaluate", *words]
    if subprocess.run(call, check=False).returncode:
        raise click.ClickException(f"{' '.join(call[1:])}: ended with an error")
    found: dict[str, Any] = json.loads(out.read_text())
    for row in found["runs"]:
        del row["test"]["confusion"]
    kept = ("run", "trunk", "frames", "clip_frames", "clip_stride", "test", "difference", "weights_sha256")
    return found | {"runs": [{key: row[key] for key in kept} for row in found["runs"]]}


def measure(bench: Bench, runs: dict[str, list[Path]], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One row a variant, and before them the untrained trunk, once for each kind of clips."""
    answered: dict[str, Answers] = {}
    baseline: dict[str, str] = {}  # variant -> the untrained trunk that looked at the same clips
    for name, folders in runs.items():
        clips = open_probed(str(folders[0]), None).clips
        kind = f"{clips['frames']} frames, every {clips['stride']}"
        baseline[name] = f"untrained ({kind})"
        for warm in (False, True):
            control = f"untrained ({kind}{', own BatchNorm statistics' if warm else ''})"
            if control not in answered:
                answered[control] = Answers()
                for run, seed in zip(folders, seeds, strict=True):
                    bench.ask_untrained(run, seed, answered[control], warm=warm)
        answered[name] = Answers()
        for run in folders:
            bench.ask(open_probed(str(run), None), answered[name])
    rows = []
    for name, answers in sorted(answered.items(), key=lambda item: item[0] in runs):
        row: dict[str, Any] = {"name": name, "side": "ours" if name in runs else "usual"}
        row |= {"recall_at_1": answers.figures(bench.groups)["R@1"]["value"]} | answers.figures(bench.groups)
        others = {"untrained": baseline.get(name), "moco": "moco" if name in runs and name != "moco" else None}
        others |= {variant.less: variant.less for variant in VARIANTS if variant.name == name and variant.less}
        for short, other in others.items():
            if other in answered:
                row[f"less_{short}"] = answers.less(answered[other], bench.groups)
        if name in baseline:
            row["ratio_to_usual"] = row["recall_at_1"] / answered[baseline[name]].right["R@1"].mean()
        rows.append(row)
    return rows


def spent(folders: Sequence[Path]) -> dict[str, Any]:
    """Steps and seconds of a variant's runs, and what its configuration says."""
    results = [json.loads((run / "result.json").read_text()) for run in folders]
    kept = {key: results[0][key] for key in ("steps", "batch", "videos", "trunk_sha256")}
    return kept | {"seconds": [round(result["seconds"]) for result in results]}


def commit() -> str | None:
    """Hash of the checkout that this file lies in, with a "+" where it was changed since; None outside of one."""
    call = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty=+"]
    done = subprocess.run(call, check=False, capture_output=True, text=True)
    return done.stdout.strip() or None


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, in percent."""
    head = ["trunk", "R@1", "R@5", "kNN", "R@1 less untrained", "kNN less untrained", "R@1 less MoCo", "kNN less MoCo"]
    lines = []
    for row in rows:
        own = [_percent(row[kind]) for kind in ("R@1", "R@5", "knn")]
        pairs = [
            _percent(row[f"less_{other}"][kind], sign=True) if f"less_{other}" in row else ""
            for other in ("untrained", "moco")
            for kind in ("R@1", "knn")
        ]
        lines.append([row["name"], *own, *pairs])
    return markdown_table(head, lines)


def _percent(figure: dict[str, Any], *, sign: bool = False) -> str:
    value, half = 100 * figure["value"], figure["interval"]
    text = f"{value:+.1f}" if sign else f"{value:.1f}"
    return text if half is None else f"{text} ± {100 * half:.1f}"


@click.command()
@click.option("--shards", "folder", type=click.Path(path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for a run folder a variant.")
@click.option("--variant", "names", type=click.Choice([each.name for each in VARIANTS]), multiple=True,
              help="[default: all]")  # fmt: skip
@click.option("--seed", "seeds", type=int, multiple=True, default=(0,), show_default=True, help="May be given again.")
@click.option("--epochs", type=click.IntRange(1), default=4, show_default=True)
@click.option("--probe-split", default="test", show_default=True, help="Whose videos are probed.")
@click.option("--held-out", type=click.FloatRange(0, 1), default=0.6, show_default=True, help="Share of queries.")
@click.option("--clips", type=click.IntRange(1), default=10, show_default=True, help="Of a probed video.")
@click.option("--few-shot", "others", type=click.Path(path_type=Path), multiple=True,
              help="A run, as of an image trunk, for the test episodes; the first is the baseline.")  # fmt: skip
@click.option("--name", help="Name of the result.  [default: pretraining-DATASET]")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(
    folder: Path,
    out: Path,
    names: tuple[str, ...],
    seeds: tuple[int, ...],
    *,
    epochs: int,
    probe_split: str,
    held_out: float,
    clips: int,
    others: tuple[Path, ...],
    name: str | None,
    options: tuple[str, ...],
) -> None:
    """Train every variant, probe it; print and store the table. OPTIONS after -- go to every training."""
    before = load_average()
    chosen = [variant for variant in VARIANTS if not names or variant.name in names]
    out.mkdir(parents=True, exist_ok=True)
    runs = {variant.name: [out / f"{variant.name.replace(' ', '-')}-{seed}" for seed in seeds] for variant in chosen}
    with ShardSet.open(folder) as shards:
        division = held_out_division(shards, split=probe_split, share=held_out)  # what it refuses is to be known now
        for number, seed in enumerate(seeds):
            for variant in chosen:
                words = ["--seed", str(seed), "--epochs", str(epochs), *options]
                train(shards, runs[variant.name][number], variant, words)
        bench = Bench(shards, division, clips=clips, cache=out / "features")
        rows = measure(bench, runs, seeds)
        context: dict[str, Any] = {"dataset": shards.dataset.name, "division": division.name}
        context |= {"gallery": len(division.train), "queries": len(division.test), "shards_sha256": shards.sha256}
    for row in rows:
        row |= spent(runs[row["name"]]) if row["name"] in runs else {}
    click.echo(table(rows))
    context |= {"clips": clips, "seeds": seeds, "epochs": epochs, "options": options, "commit": commit()}
    context |= {"load_average_before": before}
    name = name or f"pretraining-{context['dataset']}"
    path = write_result(name, rows, context=context)
    if others:  # what is measured is kept where these runs cannot be compared
        beside = [*others, *(each[0] for each in runs.values())]
        context["few_shot"] = compare_few_shot(folder, beside, out / "few.json")
        path = write_result(name, rows, context=context)
    click.echo(f"written: {path}")


if __name__ == "__main__":
    run_command(main)
