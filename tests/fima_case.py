"""A golden case of `golden/fima`: its inputs, and the comparison with what the reference made of them."""

from __future__ import annotations

import json

import numpy as np
import torch

from tests.golden_case import GOLDEN, fill


class FimaCase:
    """Inputs by name, and stored outputs with their tolerances."""

    def __init__(self, name: str) -> None:
        self.settings = json.loads((GOLDEN / "fima" / f"{name}.json").read_text())
        self.seed = self.settings["seed"]
        self.outputs = dict(np.load(GOLDEN / "fima" / f"{name}.npz"))

    def normal(self, name: str, *shape: int) -> torch.Tensor:
        return torch.from_numpy(fill.normal(name, shape, self.seed))

    def uniform(self, name: str, *shape: int) -> torch.Tensor:
        return torch.from_numpy(fill.uniform(name, shape, self.seed))

    def clip(self, name: str, batch: int, frames: int, size: int) -> torch.Tensor:
        """[B, 3, T, S, S] in [0, 1), coarse cells and fine noise."""
        coarse = self.uniform(f"{name}.coarse", batch, 3, 4, 4, 4)
        for dim, length in ((2, frames), (3, size), (4, size)):
            coarse = coarse.repeat_interleave(length // 4, dim)
        return (0.7 * coarse + 0.3 * self.uniform(f"{name}.fine", batch, 3, frames, size, size)).float()

    def check(self, name: str, value: torch.Tensor) -> None:
        """AssertionError unless the output of that name is met within its tolerance."""
        rule, expected = self.settings["outputs"][name], self.outputs[name]
        assert tuple(value.shape) == expected.shape, name
        found = value.detach().numpy()
        if rule.get("exact"):
            np.testing.assert_array_equal(found, expected, err_msg=name)
        else:
            np.testing.assert_allclose(found, expected, rtol=0, atol=rule["atol"], err_msg=name)
