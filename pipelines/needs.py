"""What frame rules need of a shard set beside frames: frame rates, or every frame of the source."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipelines.sampling import RULES_OF_CLIPS, RULES_WITH_FPS
from shards_spec import ShardSet
from shards_spec.errors import ShardError

Ints = npt.NDArray[np.int64]

LOOKED_AT = 100  # videos; what leaves frames out leaves them out of all


def check_needs(shards: ShardSet, rows: Ints, *, rule: str, split: str) -> None:
    """ShardError unless the videos `rows` [n] of a split have what the frame rule needs."""
    if rule in RULES_WITH_FPS:
        _check_fps(shards, rows, rule, split)
    if rule in RULES_OF_CLIPS:
        check_every_frame(shards, rows, what=f'frame rule "{rule}"')


def _check_fps(shards: ShardSet, rows: Ints, rule: str, split: str) -> None:
    unknown = rows[~(shards.fps[rows] > 0)]
    if len(unknown):
        raise ShardError(
            f'frame rule "{rule}" needs the frame rate of every video, and {len(unknown)} videos of split "{split}" in '
            f'{shards.path} have none (the first: "{shards.name(int(unknown[0]))}"): use frame rule "segment"'
        )


def check_every_frame(shards: ShardSet, rows: Ints, *, what: str) -> None:
    """ShardError, saying `what` needs them, unless every frame of the videos `rows` [n] is stored; some are seen."""
    for row in rows[:: max(len(rows) // LOOKED_AT, 1)].tolist():
        kept = shards.series("rgb").kept(row)
        if len(kept) and kept[-1] != len(kept) - 1:
            raise ShardError(
                f"{what} needs every frame of a video, and {shards.path} holds {len(kept)} of at least "
                f'{kept[-1] + 1} of "{shards.name(row)}": make shards of all frames with fsar-preprocess'
            )
