"""Pre-training without labels: methods from views of videos to a loss."""

from __future__ import annotations

from fsar.pretraining.base import Output, PretrainingMethod
from fsar.pretraining.fima import FIMA
from fsar.pretraining.moco import MoCo, Views
from fsar.pretraining.motion_views import MotionViews
from fsar.pretraining.mscl import MSCL, PairedViews

__all__ = ["FIMA", "MSCL", "MoCo", "MotionViews", "Output", "PairedViews", "PretrainingMethod", "Views"]
