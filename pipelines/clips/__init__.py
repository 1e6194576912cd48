"""Plan the clips that pre-training compares and that probes look at."""

from pipelines.clips.flow import FlowPairRules
from pipelines.clips.labelled import ProbeRules
from pipelines.clips.stream import ClipPlan, ClipRules, ClipStream
from pipelines.clips.windows import PairRules, WindowRules

__all__ = ["ClipPlan", "ClipRules", "ClipStream", "FlowPairRules", "PairRules", "ProbeRules", "WindowRules"]
