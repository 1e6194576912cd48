"""A linear classifier, trained with its trunk (fine-tuning) or without it (linear probe)."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fsar.checkpoints import load_state, save_state
from fsar.probing.features import trunk_features
from fsar.run.device import autocast
from fsar.run.folder import last_checkpoint
from fsar.training.loop import Batch, Loop, Progress
from fsar.training.optim import epoch_learning_rate
from fsar.training.step import Reading
from fsar.trunks import Trunk
from pipelines.draw import PhiloxDraw
from shards_spec.errors import ConfigError

Source = Callable[[int, int], Generator[tuple[Tensor, Tensor], None, None]]  # of steps from, to
After = Callable[[int], dict[str, float]]  # of an epoch, whose number is from 1


@dataclass(frozen=True)
class Fit:
    """Settings of a classifier's training, by SGD with momentum 0.9; the values are FIMA's.

    Attributes:
        lr: Initial learning rate; times 0.1 from each of the milestones on.
        weight_decay: Of all parameters that are trained.
        batch: Videos of a step.
        epochs: Times that one clip of every video is read.
        milestones: Epochs at which the rate falls.
        dropout: Before the classifier.
        l2norm: Give each feature length 1 before the classifier.
        clip_norm: Largest norm of the gradient; 0: any.
    """

    lr: float
    weight_decay: float
    batch: int
    epochs: int
    milestones: tuple[int, ...]
    dropout: float
    l2norm: bool = False
    clip_norm: float = 0.0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: one of them is out of its range.
        """
        if self.epochs < 1 or self.batch < 1:
            raise ConfigError(f"epochs={self.epochs} and batch={self.batch} must be 1 or more")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout:g} must be a probability below 1")

    def rate(self, epoch: int) -> float:
        """Return the learning rate of an epoch."""
        milestones = [milestone for milestone in self.milestones if milestone < self.epochs]
        if not milestones:
            return self.lr
        return epoch_learning_rate(epoch, base_lr=self.lr, schedule="step", epochs=self.epochs, milestones=milestones)


FINETUNE = Fit(lr=0.01, weight_decay=1e-4, batch=16, epochs=150, milestones=(60, 120), dropout=0.5)
LINEAR = Fit(lr=30.0, weight_decay=0.0, batch=256, epochs=100, milestones=(60, 80), dropout=0.0)


class Classifier(nn.Module):
    """A trunk, dropout and one linear layer.

    Args:
        trunk: The trunk.
        classes: Number of classes.
        dropout: Probability, before the linear layer.
        l2norm: Give each feature length 1 before the linear layer.
        frozen: Keep the trunk as it is, in evaluation mode.
        seed: Of the linear layer's first weights.
    """

    def __init__(self, trunk: Trunk, classes: int, *, dropout: float, l2norm: bool, frozen: bool, seed: int) -> None:
        super().__init__()
        self.trunk, self.dropout, self.l2norm, self.frozen = trunk, nn.Dropout(dropout), l2norm, frozen
        self.fc = nn.Linear(trunk.channels, classes)
        nn.init.normal_(self.fc.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.fc.bias)
        self.trunk.requires_grad_(not frozen)

    @property
    def learned(self) -> nn.Module:
        """The part that training changes."""
        return self.fc if self.frozen else self

    def train(self, mode: bool = True) -> Classifier:
        """Set the mode, a frozen trunk's to evaluation."""
        super().train(mode)
        self.trunk.train(mode and not self.frozen)
        return self

    def head(self, features: Tensor) -> Tensor:
        """[..., C] -> logits [..., classes]."""
        features = F.normalize(features, dim=-1) if self.l2norm else features
        logits: Tensor = self.fc(self.dropout(features))
        return logits

    def forward(self, clips: Tensor) -> Tensor:
        """[N, T, 3, S, S] -> logits [N, classes]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = trunk_features(self.trunk, clips)
        return self.head(features)


@dataclass
class Training:
    """The training of a classifier; killed at any moment, it is resumed from the last whole epoch.

    Attributes:
        model: The classifier, on its device.
        fit: How it is trained.
        source: Numbers of steps, from and to -> inputs [B, ...] and classes [B] of each.
        steps: Of an epoch.
        forward: Inputs -> logits [B, classes].
        seed: Of dropout.
        precision: fp32 or bf16 (autocast).
        run: Folder of the log and the checkpoint; None: neither is written.
        facts: Values by name that must be the same when the training is resumed.
    """

    model: Classifier
    fit: Fit
    source: Source
    steps: int
    forward: Callable[[Tensor], Tensor]
    seed: int = 0
    precision: str = "fp32"
    run: Path | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        learned = [p for p in self.model.learned.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(learned, lr=self.fit.lr, momentum=0.9, weight_decay=self.fit.weight_decay)
        self.progress = Progress()
        self._after: After | None = None
        self._reset()

    def _reset(self) -> None:
        self._totals = torch.zeros(3, device=next(self.model.parameters()).device)
        self._clips = 0

    def train(self, *, resume: bool = False, after: After | None = None) -> None:
        """Run all epochs that are left; what `after` returns for each is logged with it.

        Raises:
            FsarError: the loss is not finite.
            ConfigError: the training to resume had other facts.
            DiskError: the disk is full.
        """
        self._after = after
        if resume:
            self._resume()
        Loop(
            self,
            total=self.fit.epochs * self.steps,
            unit="step",
            items="clips",
            log_every=self.steps,
            save_every=self.steps,
            log_unit=self.steps,
            most_skipped=0,
        ).train()

    def batches(self) -> Generator[Batch]:
        """Yield the batches of the epochs that are left."""
        for epoch in range(self.progress.n // self.steps, self.fit.epochs):
            first, began = epoch * self.steps, time.perf_counter()
            # One source an epoch: nothing is decoded ahead while the classifier is tested in
            # between. The last batch of the epoch stays in memory during that test.
            with closing(self.source(first, first + self.steps)) as source:
                for n, (inputs, labels) in enumerate(source, first):
                    yield Batch(n, (inputs, labels), len(labels), time.perf_counter() - began)
                    began = time.perf_counter()

    def train_step(self, n: int, batch: tuple[Tensor, Tensor]) -> None:
        """Take optimiser step n on inputs [B, ...] and classes [B]."""
        inputs, labels = batch
        torch.manual_seed(PhiloxDraw(self.seed, n).randint(0, 2**62))  # of dropout: nothing else is to be saved
        for group in self.optimizer.param_groups:
            group["lr"] = self.fit.rate(n // self.steps)
        with autocast(labels.device, self.precision):
            logits = self.forward(inputs)
        loss = F.cross_entropy(logits.float(), labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.fit.clip_norm:
            nn.utils.clip_grad_norm_(self.model.learned.parameters(), self.fit.clip_norm)
        self.optimizer.step()
        self._count(loss.detach(), logits, labels)

    def _count(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add the loss, right answers and losses that are not finite, all on the device."""
        right = (logits.argmax(dim=1) == labels).sum()
        self._totals += torch.stack([loss * len(labels), right.float(), loss.isfinite().logical_not().float()])
        self._clips += len(labels)

    def read(self) -> Reading:
        """Return the counts since the last reading; this waits for the device."""
        loss, right, bad = self._totals.tolist()
        # No step is skipped here.  One loss that is not finite spoils the weights, so that all
        # after it are in a row.
        reading = Reading({"loss": loss, "accuracy": right}, self._clips, longest=int(bad))
        self._reset()
        return reading

    def log_values(self, n: int) -> dict[str, float]:
        """Return the learning rate of the last epoch, and what `after` returns for it."""
        epoch = n // self.steps
        values = {"lr": self.fit.rate(epoch - 1)} | (self._after(epoch) if self._after else {})
        self.model.train()  # a test leaves it in evaluation mode
        return values

    @property
    def checkpoint(self) -> Path:
        """The checkpoint of the last whole epoch."""
        assert self.run is not None
        return last_checkpoint(self.run)

    def save(self) -> None:
        """Write that checkpoint."""
        state = {"epoch": self.progress.n // self.steps, "facts": dict(self.facts)}
        save_state(self.checkpoint, self.model.learned, self.optimizer, state)

    def _resume(self) -> None:
        state = load_state(self.checkpoint, self.model.learned, self.optimizer)
        other = [key for key, value in self.facts.items() if state.get("facts", {}).get(key) != value]
        if other:
            raise ConfigError(
                f"--resume: {self.run} was trained with another {', '.join(other)}; give the options that it was "
                "started with, or start a new run"
            )
        self.progress = Progress(n=int(state["epoch"]) * self.steps)
