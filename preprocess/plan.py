"""Settle the plan of a shard set: all that decides its bytes, from the videos and the settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from preprocess.datasets.catalogue import Catalogue
from preprocess.decode import USUAL_FRAMES, USUAL_PIXELS, Geometry
from preprocess.encode.flow_estimators import DIS
from preprocess.encode.series import series_plans
from shards_spec import ShardError
from shards_spec.schema import Plan, is_motion, motion_series

LEAST_ROWS, MOST_ROWS, SHARDS = 8, 64, 32  # of `usual_rows`


@dataclass(frozen=True)
class Settings:
    """The way in which videos are stored and the work is done.

    No byte depends on the number of workers, the executor or the limits.

    Attributes:
        geometry: Size of the stored frames.
        motion: Names of stored motion, as in the command's --motion.
        rows_per_shard: Videos of a shard; 0: as the folder has it, `usual_rows` in a new folder.
        time_limit: Seconds that one video may take.
        max_frames: Frames that a video may have.
        max_pixels: Pixels that a video's own frames may have.
        workers: Processes of this machine.
        retry_failed: Try the videos again that failed in an earlier run.
        codec: Codec of the frames, "jpeg" or "raw".
        flow_estimator: Estimator of the flow in `motion`.
        executor: "local" or "ray".
    """

    geometry: Geometry
    motion: tuple[str, ...] = ("diff", "flow")
    rows_per_shard: int = 0
    time_limit: float = 300.0
    max_frames: int = USUAL_FRAMES
    max_pixels: int = USUAL_PIXELS
    workers: int = 1
    retry_failed: bool = False
    codec: str = "jpeg"
    flow_estimator: str = DIS
    executor: str = "local"


def usual_rows(videos: int) -> int:
    """Return the videos of a shard where nobody chose: 64, fewer in a set of under 2,000.

    A small set has some 32 shards, so that workers can share it. The number of workers does not
    count here: no byte depends on it.
    """
    return min(max(-(-videos // SHARDS), LEAST_ROWS), MOST_ROWS)


def wanted_plan(catalogue: Catalogue, settings: Settings, held: Plan | None = None) -> Plan:
    """Return the plan that a catalogue and settings ask for.

    Series of motion that the plan `held` of the folder has stay in it, asked for or not.
    """
    rows = len(catalogue.videos)
    asked = motion_series(settings.motion)
    kept = {name: plan for name, plan in held.series.items() if is_motion(name) and name not in asked} if held else {}
    estimators = dict.fromkeys(asked, settings.flow_estimator)
    estimators |= {name: plan["method"] for name, plan in kept.items() if "method" in plan}
    series = series_plans(settings.geometry, [*asked, *kept], codec=settings.codec, estimators=estimators)
    per_shard = settings.rows_per_shard or (held.rows_per_shard if held else usual_rows(rows))
    return Plan(catalogue.dataset.name, per_shard, rows, catalogue.sha256(rows), series)


def settle_plan(catalogue: Catalogue, out: Path, settings: Settings) -> Plan:
    """Return the plan that the folder `out` will have: `wanted_plan` with the series it holds.

    Raises:
        ShardError: the folder holds another plan, or was made from other videos.
    """
    if not (out / "plan.json").exists():
        return wanted_plan(catalogue, settings)
    held = Plan.load(out / "plan.json")
    plan = wanted_plan(catalogue, settings, held)
    held.check_same(plan, out)
    if catalogue.sha256(held.catalogue_rows) != held.catalogue_sha256 or plan.catalogue_rows < held.catalogue_rows:
        raise ShardError(
            f"{out} was made from other videos: the first {held.catalogue_rows} videos in order of class and name, "
            "or their groups (--group), changed (videos may only be added at the end); use another --out folder, or "
            "restore them"
        )
    return plan
