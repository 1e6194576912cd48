"""Pre-training without labels: methods from views of videos to a loss."""

from __future__ import annotations

from fsar.pretraining.base import Output, PretrainingMethod
from fsar.pretraining.moco import MoCo, Views
from fsar.pretraining.mscl import MSCL, MotionViews

__all__ = ["MSCL", "MoCo", "MotionViews", "Output", "PretrainingMethod", "Views"]
