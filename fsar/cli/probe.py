"""The command `fsar-probe`: measure a trunk's features on labelled videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from fsar.cli.help import GroupedCommand, option
from fsar.cli.options import check_option
from fsar.cli.probe_run import ACTIVATION, FIT, MODES, ProbeRun
from fsar.evaluation.overlap import UNKNOWN, Overlap, find_overlap
from fsar.probing.prober import VIEWS, Rules
from fsar.probing.scores import AVERAGES
from fsar.probing.weights import Probed, open_probed
from fsar.report.probe import Neighbours, figures, page
from fsar.report.result import coverage_text
from fsar.run.config import DATA, METHOD, OUTPUT, SPEED
from fsar.run.device import choose_device
from fsar.run.recipes import read_table, shipped
from pipelines.clips.labelled import SAMPLING, ProbeRules
from shards_spec import ShardSet
from shards_spec.cli.console import run_command, shards_option
from shards_spec.errors import ConfigError, suggest
from shards_spec.files import disk_errors, json_bytes, write_whole
from shards_spec.peek.html import write_html
from shards_spec.remote.shards import RemoteShards
from shards_spec.splits.divisions import Division, held_out_division, listed_division

FILE = click.Path(path_type=Path)
CLIPS, MEASURES, TRAINING = "Clips", "Measures", "Training of classifiers"  # headings of the help
SHARE = click.FloatRange(0, 1, min_open=True)
SIZES = {"i3d": 224}  # of a clip; 112 for all others, as the published code has them
CUT = ("frames", "stride", "size", "clips", "sampling", "centre", "area", "flip", "jitter")  # of ProbeRules
OF_RECIPES = {*CUT, *FIT, "test_frames", "test_size", "clip_average"}


def _epochs(_: click.Context, __: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    """Parse rising numbers with commas between them."""
    if text is None:
        return None
    try:
        found = tuple(int(part) for part in text.split(",") if part)
    except ValueError:
        raise ConfigError(f"--milestones {text}: expected epochs with commas between them, such as 60,120") from None
    if any(epoch < 1 for epoch in found) or list(found) != sorted(set(found)):
        raise ConfigError(f"--milestones {text}: expected epochs that rise from 1")
    return found


def _recipe(context: click.Context, _: click.Parameter, name: str | None) -> None:
    """Make a recipe's values the defaults of the options."""
    if name is None:
        return
    known = shipped("probe.toml")
    table = read_table(name, known, hint=lambda _: ", ".join(known))
    for key in table:
        if key not in OF_RECIPES:
            raise ConfigError(f'recipe {name}: unknown key "{key}"; {suggest(key, OF_RECIPES)}')
    context.default_map = {key: str(value) for key, value in table.items()}  # text, whose type click checks


@click.command(cls=GroupedCommand)
@option("--recipe", group=METHOD, is_eager=True, expose_value=False, callback=_recipe,
        help="Values for the options below: mscl-ssv2, or a TOML file.  [default: the papers' protocols]")  # fmt: skip
@option("--weights", group=METHOD, help="A run folder of fsar-pretrain or fsar-train, a file of weights, or fetch.")
@shards_option()
@option("--mode", "modes", group=MEASURES, type=click.Choice([*MODES, ACTIVATION]), multiple=True, required=True,
        help="Measure; may be given again.")  # fmt: skip
@option("--trunk", group=METHOD, help="Name of the trunk, of a file of weights or for random weights.")
@option("--checkpoint", group=METHOD, main=False, type=click.Choice(["best", "last"]),
        help="Checkpoint of a run.  [default: best, if there is one]")  # fmt: skip
@option("--untrained", group=METHOD, is_flag=True,
        help="Also probe the trunk with random weights; without --weights, only that.")  # fmt: skip
@option("--lists", group=DATA, type=FILE,
        help="Official lists of UCF101 or HMDB51 (a folder), or a .json or .csv file.")  # fmt: skip
@option("--list", "number", group=DATA, main=False, type=click.IntRange(1), default=1, show_default=True,
        help="Which official list.")  # fmt: skip
@option("--split", group=DATA, help="Without --lists: hold out videos of this split's classes.  [default: of all]")
@option("--held-out", group=DATA, main=False, type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.3,
        show_default=True,
        help="Without --lists: share of each class that is tested; groups stay together.")  # fmt: skip
@option("--held-out-seed", group=DATA, main=False, type=click.IntRange(0), default=0, show_default=True,
        help="Another holds out others.")  # fmt: skip
@option("--frames", group=CLIPS, type=click.IntRange(1), help="Frames of a clip.  [default: the run's, or 16]")
@option("--stride", group=CLIPS, type=click.IntRange(1),
        help="Distance of a clip's frames.  [default: the run's, or 2]")  # fmt: skip
@option("--size", group=CLIPS, type=click.IntRange(1),
        help="Side of a clip.  [default: the run's, or 224 for i3d, else 112]")  # fmt: skip
@option("--clips", group=CLIPS, type=click.IntRange(1), default=10, show_default=True,
        help="Uniform clips of a test video.")  # fmt: skip
@option("--test-frames", group=CLIPS, main=False, type=click.IntRange(1), help="Of a test clip.  [default: --frames]")
@option("--test-size", group=CLIPS, main=False, type=click.IntRange(1), help="Side of a test clip.  [default: --size]")
@option("--sampling", group=CLIPS, main=False, type=click.Choice(SAMPLING), default="windows", show_default=True,
        help="Frames at --stride, or one of each of --frames equal parts of the video.")  # fmt: skip
@option("--centre", group=CLIPS, main=False, type=SHARE, default=0.875, show_default=True,
        help="Of test clips: side over that of the frame.")  # fmt: skip
@option("--area", group=CLIPS, main=False, type=SHARE, default=0.2, show_default=True,
        help="Of training clips: least share of the frame.")  # fmt: skip
@option("--flip/--no-flip", group=CLIPS, main=False, default=True, show_default=True,
        help="Mirror training clips by chance.")  # fmt: skip
@option("--jitter/--no-jitter", group=CLIPS, main=False, default=True, show_default=True,
        help="Change the colours of training clips.")  # fmt: skip
@option("--clip-average", group=MEASURES, main=False, type=click.Choice(AVERAGES),
        help="Of a classifier.  [default: logprob for i3d, else logit]")  # fmt: skip
@option("--k", group=MEASURES, main=False, type=click.IntRange(1), default=20, show_default=True,
        help="Neighbours of knn.")  # fmt: skip
@option("--temperature", group=MEASURES, main=False, type=click.FloatRange(0), default=0.07, show_default=True,
        help="Of knn: votes are exp(cosine / temperature); 0: a plain majority.")  # fmt: skip
@option("--lr", group=TRAINING, type=click.FloatRange(0, min_open=True), help="[default: finetune 0.01, linear 30]")
@option("--weight-decay", group=TRAINING, main=False, type=click.FloatRange(0),
        help="[default: finetune 0.0001, linear 0]")  # fmt: skip
@option("--batch", group=TRAINING, type=click.IntRange(1), help="Clips of a step.  [default: finetune 16, linear 256]")
@option("--clip-norm", group=TRAINING, main=False, type=click.FloatRange(0),
        help="Largest norm of the gradient.  [default: any]")  # fmt: skip
@option("--epochs", group=TRAINING, type=click.IntRange(1), help="[default: finetune 150, linear 100]")
@option("--milestones", group=TRAINING, main=False, callback=_epochs,
        help="Epochs from which lr is times 0.1.  [default: finetune 60,120, linear 60,80]")  # fmt: skip
@option("--dropout", group=TRAINING, main=False, type=click.FloatRange(0, 1, max_open=True),
        help="Dropout.  [default: finetune 0.7 on ucf101, else 0.5; linear 0]")  # fmt: skip
@option("--probe-l2norm", "l2norm", group=TRAINING, main=False, is_flag=True, default=None,
        help="linear: features of length 1.")  # fmt: skip
@option("--views", group=TRAINING, main=False, type=click.Choice(VIEWS), default="fresh", show_default=True,
        help="linear: train on new random clips, or on the cached features of the uniform ones.")  # fmt: skip
@option("--test-every", group=TRAINING, main=False, type=click.IntRange(0), default=0, show_default=True,
        help="Epochs between tests in training; 0: only at the end.")  # fmt: skip
@option("--seed", group=TRAINING, main=False, type=click.IntRange(0), default=0, show_default=True,
        help="Of clips and weights.")  # fmt: skip
@option("--device", group=SPEED, default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@option("--precision", group=SPEED, main=False, type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
@option("--executor", group=SPEED, main=False, type=click.Choice(["auto", "dali", "portable"]), default="auto",
        show_default=True)  # fmt: skip
@option("--threads", group=SPEED, type=click.IntRange(0), default=0, show_default=True,
        help="Decoding threads; 0: one a core.")  # fmt: skip
@option("--features", "cache", group=OUTPUT, main=False, type=FILE,
        help="Folder in which features are kept for the next command.")  # fmt: skip
@option("--resume", group=OUTPUT, is_flag=True, help="Go on with the classifier in --out.")
@option("--allow-overlap", group=OUTPUT, main=False, is_flag=True,
        help="Test on videos that training saw; the result is stamped with it.")  # fmt: skip
@check_option
@option("--out", group=OUTPUT, type=FILE, help="Folder for result.json, report.html, and the classifier's log.")
def cli(
    weights: str | None,
    folder: Path | RemoteShards,
    modes: tuple[str, ...],
    *,
    trunk: str | None,
    checkpoint: str | None,
    untrained: bool,
    lists: Path | None,
    number: int,
    split: str | None,
    held_out: float,
    held_out_seed: int,
    device: str,
    cache: Path | None,
    allow_overlap: bool,
    out: Path | None,
    check: bool,
    **command_options: Any,  # noqa: ANN401 -- fields of ProbeRules, Rules and Fit, and the options of single modes
) -> None:
    """Probe features on labelled videos: by retrieval, neighbours, a classifier, fine-tuning.

    Training and test videos have the same classes here: --lists names UCF101's or HMDB51's official
    lists; without them a share of the videos of each class is held out, whole groups together.  The
    mode activation measures nothing: it draws where the trunk responds in some test videos, as
    activation.png.

    \b
    fsar-probe --weights RUN --shards DIR --mode retrieval --mode knn --lists ucfTrainTestlist
    fsar-probe --weights FILE.pth --trunk i3d --shards DIR --mode finetune --out RUN
    fsar-probe --trunk r3d18 --untrained --shards DIR --mode retrieval
    fsar-probe --weights RUN --shards DIR --mode activation --untrained --out OUT
    fsar-probe --weights RUN --shards DIR --mode finetune --recipe mscl-ssv2 --out OUT
    """  # noqa: D301 -- \b is click's mark of lines to be left as they are
    _check(weights, lists, split, out, command_options, modes=modes, number=number)
    if weights is None and not untrained:
        raise ConfigError("give --weights RUN or FILE, or --untrained with --trunk for random weights")
    with ShardSet.open(folder, check=check) as shards:
        if lists is None:
            division = held_out_division(shards, split=split, share=held_out, seed=held_out_seed)
        else:
            division = listed_division(shards, lists, number=number)
        probed = open_probed(weights, trunk, checkpoint=checkpoint, seed=command_options["seed"])
        overlap = _overlap(probed, shards, division, allowed=allow_overlap or set(modes) == {ACTIVATION})
        for line in (coverage_text(shards), _division_text(division), str(overlap)):
            if line:
                click.echo(line)
        rules = _rules(probed, command_options)
        run = ProbeRun(shards, division, rules, choose_device(device), cache, out)
        both = untrained and weights is not None
        control = open_probed(None, probed.name, seed=command_options["seed"]) if both else None
        activation = run.draw_activation(probed, control) if ACTIVATION in modes else None  # before fine-tuning
        found, retrieval = run.probe(probed, modes, command_options)
        result = run.stamps(probed, overlap) | {"probes": found}
        if control is not None:
            result["untrained"], _ = run.probe(control, modes, command_options)
            result["difference"] = run.differences(found, result["untrained"])
        _tell(result, out, retrieval=retrieval, activation=activation)


def _tell(
    result: dict[str, Any], out: Path | None, *, retrieval: Sequence[Neighbours], activation: Path | None
) -> None:
    """Print the figures, and write the result and its page to the folder."""
    for name, text in figures(result):
        click.echo(f"{name}: {text}")
    if out is not None:
        write_whole(out / "result.json", json_bytes(result))
        write_html(out / "report.html", page(result, retrieval=retrieval, activation=activation))
        click.echo(f"{out / 'report.html'}")


def _check(
    weights: str | None,
    lists: Path | None,
    split: str | None,
    out: Path | None,
    command_options: Mapping[str, Any],
    *,
    modes: tuple[str, ...],
    number: int,
) -> None:
    """Refuse options that contradict each other, and folders that cannot be written."""
    if lists is not None and not lists.exists():
        raise ConfigError(f"--lists {lists}: there is no such file or folder")
    if lists is None and number > 1:
        raise ConfigError(f"--list {number} chooses one of the official lists: give --lists, or leave it out")
    if lists is not None and split is not None:
        raise ConfigError("--split and --held-out divide the videos where there are no --lists: leave one of them out")
    if weights not in {None, "fetch"} and not Path(str(weights)).exists():
        raise ConfigError(f"--weights {weights}: there is no such file or folder")
    if ACTIVATION in modes and out is None:
        raise ConfigError("--mode activation draws a picture: give --out FOLDER for it")
    if command_options["resume"] and out is None:
        raise ConfigError("--resume goes on in a folder: give --out RUN")
    if out is not None:
        if not out.parent.is_dir():
            raise ConfigError(f"--out {out}: there is no folder {out.parent}; make it first")
        if (out / "checkpoints").exists():
            raise ConfigError(f"--out {out} is a run of another command: name a new folder")
        with disk_errors(out):
            out.mkdir(exist_ok=True)


def _overlap(probed: Probed, shards: ShardSet, division: Division, *, allowed: bool) -> Overlap:
    """Find the test videos in the weights' training; classes may be shared in a probe."""
    overlap = UNKNOWN if probed.trained_on is None else find_overlap(probed.trained_on, shards, division.test)
    if overlap.videos and not allowed:
        raise ConfigError(
            f"{probed.source} was trained on {overlap.videos:,} of the {len(division.test):,} test videos: take "
            "--lists or a --split that it has not seen, or --allow-overlap to have the result stamped with it"
        )
    return overlap


def _division_text(division: Division) -> str:
    missing = sum(division.absent.values())
    text = f"{len(division.train):,} training and {len(division.test):,} test videos ({division.name})"
    return text + (f"; {missing:,} listed videos are not stored" if missing else "")


def _rules(probed: Probed, command_options: Mapping[str, Any]) -> Rules:
    """Choose what was given, else the run's own clips, else the published values."""
    chosen = {name: command_options[name] for name in CUT if command_options[name] is not None}
    cut = ProbeRules(**({"size": SIZES.get(probed.name, ProbeRules.size)} | probed.clips | chosen))
    test = replace(
        cut, frames=command_options["test_frames"] or cut.frames, size=command_options["test_size"] or cut.size
    )
    how = {name: command_options[name] for name in ("precision", "executor", "threads", "seed", "test_every")}
    average = command_options["clip_average"] or ("logprob" if probed.name == "i3d" else "logit")
    return Rules(test, cut, clip_average=average, **how)


def main() -> None:
    """Entry point."""
    run_command(cli, again="type the same command with --resume to go on")


if __name__ == "__main__":
    main()
