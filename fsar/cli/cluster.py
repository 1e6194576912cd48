"""The command `fsar-cluster`: cluster the videos of a split, to train on clusters as classes."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import click
import numpy as np
from torch import Tensor
from torch.nn import functional as F

from fsar.cli.help import Command
from fsar.cli.options import check_option
from fsar.evaluation.embeddings import embed_videos
from fsar.methods import FewShotMethod, Model, TwoStreams, create_method
from fsar.run.build import build_model, evaluation_rules, frozen_prototypes, motion_alone, open_model
from fsar.run.config import RunConfig, build_config, run_config
from fsar.run.device import choose_device
from fsar.run.weights import weights_of_run
from fsar.training.clusters import agreement, k_means, keep_large
from pipelines.episodes.labels import write_labels
from pipelines.loader import executor_for
from shards_spec import ShardSet
from shards_spec.cli.console import run_command, shards_option
from shards_spec.errors import ConfigError
from shards_spec.remote.shards import RemoteShards


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@shards_option()
@click.option("--split", default="train", show_default=True, help="fsar-train reads only clusters of train.")
@click.option(
    "--features", type=click.Choice(["trunk", "flow"]), default="trunk", show_default=True, help="What is clustered."
)
@click.option("--trunk", help="Name of the trunk whose features are clustered, such as resnet50.")
@click.option("--trunk-weights", help="Goes with --trunk: a file, fetch (download), or random.")
@click.option("--weights", type=click.Path(path_type=Path), help="A run folder of fsar-train, instead of --trunk.")
@click.option("--clusters", type=click.IntRange(2), help="[default: twice the number of classes of the split]")
@click.option("--least", type=click.IntRange(1), default=7, show_default=True, help="Drop clusters of fewer videos.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The CSV file to write.")
@click.option("--normalise/--no-normalise", default=True, show_default=True, help="Give each vector length 1.")
@click.option(
    "--frames", type=click.IntRange(1), help="Of a video; with flow its segments.  [default: the run's, or 8]"
)
@click.option("--motion-series", help="Of the shards, that flow is read from.  [default: flow1]")
@click.option("--clip-frames", type=click.IntRange(1), help="Frames of each clip that a video trunk reads.")
@click.option("--clip-stride", type=click.IntRange(1), help="Distance of a clip's frames.  [default: the run's, or 1]")
@click.option("--resize", type=click.IntRange(1), help="Both sides before the crop.  [default: the run's, or 256]")
@click.option("--crop", type=click.IntRange(1), help="Side of the centre square.  [default: the run's, or 224]")
@check_option
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", help="[default: the run's, or auto]")
def cli(
    folder: Path | RemoteShards,
    split: str,
    features: str,
    trunk: str | None,
    trunk_weights: str | None,
    weights: Path | None,
    clusters: int | None,
    least: int,
    out: Path,
    *,
    normalise: bool,
    seed: int,
    check: bool,
    **command_options: Any,  # noqa: ANN401 -- keys of the configuration
) -> None:
    """Cluster the videos of a split for training without labels: fsar-train --labels clusters.csv.

    Each video is one vector: the mean over time of a trunk's features. With --features flow it is
    the stored motion of its segments in order, as the method motion reads it. That needs no weights
    and tells directions apart. Labels decide nothing, unless the features come from a run that was
    trained with them.
    """
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}; make it first")
    if features == "flow":
        _check_flow(trunk=trunk, trunk_weights=trunk_weights, weights=weights, **command_options)
    elif command_options["motion_series"]:
        raise ConfigError("--motion-series names what --features flow reads: leave it out, or choose these features")
    with ShardSet.open(folder, check=check) as shards:
        rows = shards.split_rows(split)
        clusters = clusters or 2 * len(shards.dataset.splits[split].classes)
        if clusters > len(rows):
            raise ConfigError(f"{clusters} clusters of {len(rows)} videos: give fewer --clusters, at most one a video")
        click.echo(f"{len(rows)} videos of split {split}, {clusters} clusters")
        config = _config(trunk, trunk_weights, weights, command_options, flow=features == "flow")
        vectors = embed(_model(config, weights), shards, rows.tolist(), config)  # [n, C]
        place = keep_large(k_means(F.normalize(vectors) if normalise else vectors, clusters, seed=seed), least)
        kept = place >= 0
        write_labels(out, {shards.name(row): int(c) for row, c in zip(rows[kept], place[kept], strict=True)})
        sizes = np.bincount(place[kept])
        click.echo(f"{len(sizes)} clusters of {least} videos or more, {(~kept).sum()} videos left out")
        click.echo(f"sizes: {', '.join(map(str, sizes.tolist()))}")
        if len(shards.dataset.splits[split].classes) > 1:
            known = agreement(place[kept], shards.labels[rows[kept]].astype(np.int64))
            click.echo(f"purity {known.purity:.1%}, NMI {known.nmi:.2f} (labels used for this line alone)")
    click.echo(f"{out}: train with fsar-train --labels {out}")


def _check_flow(*, frames: int | None, motion_series: str | None, device: str | None, **others: object) -> None:
    """Refuse options that flow features do not read; `frames` is their number of segments."""
    del frames, motion_series, device
    unread = [f"--{key.replace('_', '-')}" for key, value in others.items() if value is not None]
    if unread:
        raise ConfigError(f"--features flow reads no weights and no pictures: leave out {', '.join(unread)}")


def _config(
    trunk: str | None,
    trunk_weights: str | None,
    run: Path | None,
    command_options: Mapping[str, int | str | None],
    *,
    flow: bool = False,
) -> RunConfig:
    """Configure the features: a run's configuration, a trunk's or that of motion, with the given options."""
    changes = {key: value for key, value in command_options.items() if value is not None}
    if flow:
        return motion_alone(**changes)
    if "clip_frames" in changes:
        changes["frame_rule"] = "segment_clips"
    if "resize" in changes:
        changes["resize_width"] = 0  # one number is both sides
    return build_config(_base_config(trunk, trunk_weights, run).flat() | changes)


def _base_config(trunk: str | None, trunk_weights: str | None, run: Path | None) -> RunConfig:
    if (run is None) == (trunk is None):
        raise ConfigError("give --trunk NAME with --trunk-weights, --weights RUN, or --features flow, one of the three")
    if run is None:
        return build_config({"method": "prototype", "trunk": trunk, "trunk_weights": trunk_weights or ""})
    if trunk_weights:
        raise ConfigError(f"the trunk's weights are those of the run {run}: leave out --trunk-weights, or --weights")
    return run_config(run)


def _model(config: RunConfig, run: Path | None) -> FewShotMethod:
    """Build prototypes of the trunk, whose embedding is the mean over time; or motion without training."""
    device = choose_device(config.device)
    if run is None:
        alone: Model = build_model(config) if config.method == "motion" else frozen_prototypes(config)
        assert not isinstance(alone, TwoStreams)
        return alone.to(device)
    trained = open_model(config, weights_of_run(run))
    return create_method("prototype", trunk=trained.trunk, frames=config.frames).to(device)


def embed(model: FewShotMethod, shards: ShardSet, rows: list[int], config: RunConfig) -> Tensor:
    """Embed videos to one vector each [n, C], float32."""
    rules = evaluation_rules(config)
    options: dict[str, Any] = {"name": config.executor, "threads": config.threads}
    series = [rules.motion_series if model.stream == "motion" else "rgb"]
    with closing(executor_for(shards, choose_device(config.device), series=series, **options)) as executor:
        embedding = embed_videos(
            model, shards, rows, rules, executor=executor, precision=config.precision, progress=True
        )
    return embedding.tokens.float().flatten(1)


def main() -> None:
    """Entry point."""
    sys.path.insert(0, "")  # the run's --method module:Class may lie in the current folder
    run_command(cli, again="nothing was written")


if __name__ == "__main__":
    main()
