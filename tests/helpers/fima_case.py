"""A golden case of `golden/fima`: its inputs, and the comparison with what the reference made of them."""

from __future__ import annotations

import numpy as np
import torch
from golden_case import fill
from pretraining_case import outputs_of, settings_of, structured_clip


class FimaCase:
    """Inputs by name, and stored outputs with their tolerances."""

    def __init__(self, name: str) -> None:
        self.settings = settings_of(f"fima/{name}")
        self.seed = self.settings["seed"]
        self.outputs = outputs_of(f"fima/{name}")

    def normal(self, name: str, *shape: int) -> torch.Tensor:
        return torch.from_numpy(fill.normal(name, shape, self.seed))

    def uniform(self, name: str, *shape: int) -> torch.Tensor:
        return torch.from_numpy(fill.uniform(name, shape, self.seed))

    def clip(self, name: str, *shape: int) -> torch.Tensor:
        """[B, 3, T, S, S] of shape (B, T, S), in [0, 1)."""
        return structured_clip(name, shape, self.seed)

    def check(self, name: str, value: torch.Tensor) -> None:
        """AssertionError unless the output of that name is met within its tolerance."""
        rule, expected = self.settings["outputs"][name], self.outputs[name]
        assert tuple(value.shape) == expected.shape, name
        found = value.detach().numpy()
        if rule.get("exact"):
            np.testing.assert_array_equal(found, expected, err_msg=name)
        else:
            np.testing.assert_allclose(found, expected, rtol=0, atol=rule["atol"], err_msg=name)
