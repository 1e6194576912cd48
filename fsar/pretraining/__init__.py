"""Pre-training without labels: methods from views of videos to a loss."""

from __future__ import annotations

from fsar.pretraining.base import Output, PretrainingMethod
from fsar.pretraining.moco import MoCo, Views

__all__ = ["MoCo", "Output", "PretrainingMethod", "Views"]
