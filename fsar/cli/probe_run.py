"""Run the probes of one command on its videos, and write their results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch

from fsar.evaluation.overlap import Overlap
from fsar.probing.activation import activation_sheet, choose_by_class
from fsar.probing.classifier import FINETUNE, LINEAR, Fit
from fsar.probing.prober import Prober, Rules, ask
from fsar.probing.weights import RANDOM, Probed
from fsar.report.probe import Neighbours, retrieval_examples
from shards_spec import ShardSet
from shards_spec.errors import ConfigError
from shards_spec.files import write_whole
from shards_spec.peek.sheet import png_bytes
from shards_spec.splits.divisions import Division

MODES = ("retrieval", "knn", "linear", "finetune")
ACTIVATION = "activation"  # a picture
PICTURED = 4  # test videos of it, of as many classes as may be
FIT = ("lr", "weight_decay", "batch", "epochs", "milestones", "dropout", "l2norm", "clip_norm")


class ProbeRun:
    """Videos, rules, device and folders that all probes of a command share."""

    def __init__(
        self,
        shards: ShardSet,
        division: Division,
        rules: Rules,
        device: torch.device,
        cache: Path | None,
        out: Path | None,
    ) -> None:
        self.shards, self.division, self.rules = shards, division, rules
        self.device, self.cache, self.out = device, cache, out
        self.asked = ask(shards, division, rules.clips)

    def probe(
        self, probed: Probed, modes: tuple[str, ...], command_options: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[Neighbours]]:
        """Probe a trunk in each mode, fine-tuning last.

        Returns:
            The results by mode, and examples of its retrieval.
        """
        results: dict[str, Any] = {}
        examples: list[Neighbours] = []
        with Prober(self.shards, self.division, probed, self.rules, device=self.device, cache=self.cache) as prober:
            for mode in sorted(set(modes) - {ACTIVATION}, key=MODES.index):
                if mode == "retrieval":
                    results[mode], found = prober.retrieval()
                    examples = retrieval_examples(self.shards, self.division, found)
                elif mode == "knn":
                    results[mode] = prober.knn(k=command_options["k"], temperature=command_options["temperature"])
                else:
                    results[mode] = self._classify(prober, mode, command_options)
        return results, examples

    def _classify(self, prober: Prober, mode: str, command_options: Mapping[str, Any]) -> dict[str, Any]:
        name = mode if prober.probed.source != RANDOM else f"{mode}-untrained"
        run = None if self.out is None else self.out / name
        begun = run is not None and (run / "checkpoints").exists()
        if begun and not command_options["resume"]:
            raise ConfigError(f"{run} holds a classifier already: go on with --resume, or name another --out")
        fit, frozen = self.fit(mode, command_options), mode == "linear"
        return prober.classify(fit, frozen=frozen, views=command_options["views"], run=run, resume=begun)

    def draw_activation(self, probed: Probed, control: Probed | None) -> Path:
        """Write activation.png, of some test videos of each class; return its path."""
        assert self.out is not None
        rows = choose_by_class(self.shards, self.division.test, PICTURED, seed=self.rules.seed)
        first = "untrained" if probed.source == RANDOM else "weights"
        trunks = {first: probed.trunk} | ({"untrained": control.trunk} if control else {})
        trunks = {name: trunk.to(self.device) for name, trunk in trunks.items()}
        title = f"{probed.name} on {self.shards.dataset.name}: where it responds ({probed.source})"
        sheet = activation_sheet(title, self.shards, rows, trunks, self.rules.clips, device=self.device)
        write_whole(path := self.out / "activation.png", png_bytes(sheet))
        click.echo(f"{path}")
        return path

    def differences(self, found: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
        """Subtract the control's first figure of each mode, on the same videos."""
        pairs = {mode: (found[mode]["accuracy"], other[mode]["accuracy"]) for mode in found if mode != "retrieval"}
        if "retrieval" in found:
            pairs["retrieval R@1"] = (found["retrieval"]["recall"]["R@1"], other["retrieval"]["recall"]["R@1"])
        return {name: self.asked.difference(*pair) for name, pair in pairs.items()}

    def fit(self, mode: str, command_options: Mapping[str, Any]) -> Fit:
        """Choose how a mode's classifier is trained: its defaults, and what was given."""
        default = LINEAR
        if mode == "finetune":
            default = replace(FINETUNE, dropout=0.7 if self.shards.dataset.name == "ucf101" else FINETUNE.dropout)
        return replace(default, **{name: command_options[name] for name in FIT if command_options[name] is not None})

    def stamps(self, probed: Probed, overlap: Overlap) -> dict[str, Any]:
        """Collect what the figures rest on."""
        division = self.division
        return {
            "dataset": self.shards.dataset.name,
            "weights": {
                "source": probed.source,
                "trunk": probed.name,
                "method": probed.method,
                "sha256": probed.sha256,
                "colours": {"mean": probed.trunk.mean, "std": probed.trunk.std},
            },
            "overlap": overlap.to_json(),
            "division": {
                "name": division.name,
                "train": len(division.train),
                "test": len(division.test),
                "absent": division.absent,
                "sha256": division.sha256(self.shards),
            },
            "clips": asdict(self.rules.clips),
            "training_clips": asdict(self.rules.training or self.rules.clips),
            "seed": self.rules.seed,
            "precision": self.rules.precision,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "shards_sha256": self.shards.sha256,
            "fsar": version("fsar"),
            "torch": torch.__version__,
        }
