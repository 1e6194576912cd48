"""Describe the machine of a result, and write the result."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks import chart
from preprocess.decode import ffmpeg_version

RESULTS = chart.RESULTS
PACKAGES = (
    "numpy",
    "opencv-python-headless",
    "simplejpeg",
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
    "decord",
)


def hardware() -> dict[str, Any]:
    """Processor, cores, accelerator, versions and load average."""
    model = next(
        (line.partition(":")[2].strip() for line in _cpu_lines() if "model name" in line),
        platform.processor(),
    )
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fsar": _version("fsar"),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "ffmpeg": ffmpeg_version(),
        "load_average": load_average(),
    }


def load_average() -> list[float]:
    """Processes that wanted a core, over 1, 5 and 15 minutes: well below the number of cores on an idle machine."""
    return [round(value, 2) for value in os.getloadavg()]


def write_result(name: str, rows: list[dict[str, Any]], *, context: Mapping[str, Any] | None = None) -> Path:
    """Write `results/NAME.json`: the hardware, the context (what was measured, and how), the rows; draw them too."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {"hardware": hardware()} | ({"context": dict(context)} if context else {}) | {"rows": rows}
    path.write_text(json.dumps(content, indent=1) + "\n")
    if chart.is_available():
        chart.draw(path)
    return path


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
