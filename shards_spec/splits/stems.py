"""Find the video that a line of a list means: by its stem, within the class that the line names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable


class StemIndex:
    """Positions of videos by stem and class; files and stored videos are found by it alike."""

    def __init__(self, videos: Iterable[tuple[str, str]]) -> None:
        """Index videos.

        Args:
            videos: Stem and class of each video, in order; spelled as `find` will be asked for.
        """
        # By stem first: a line may name no class, and few videos share a stem.
        self._positions: dict[str, list[tuple[str, int]]] = defaultdict(list)
        for position, (stem, label) in enumerate(videos):
            self._positions[stem].append((label, position))

    def find(self, stem: str, label: str | None) -> list[int]:
        """Return the positions of a stem's videos, in order; of one class if `label` names it."""
        return [position for own, position in self._positions.get(stem, ()) if label in {None, own}]
