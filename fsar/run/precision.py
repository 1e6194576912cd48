"""The precision of a run, "fp32" or "bf16", as a context."""

from __future__ import annotations

import torch


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Context in which the model computes in bfloat16 where that is safe, or nothing changes."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
