"""A linear classifier on a trunk, and its training: the trunk with it (fine-tuning) or the classifier alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from fsar.checkpoints import load_state, save_state
from fsar.probing.features import trunk_features
from fsar.run.device import autocast
from fsar.run.folder import RunLog
from fsar.training.optim import epoch_learning_rate
from fsar.trunks import Trunk
from pipelines.draw import PhiloxDraw
from shards_spec.errors import ConfigError, FsarError

Batches = Callable[[int, int], Generator[tuple[Tensor, Tensor], None, None]]  # of steps from, to


@dataclass(frozen=True)
class Fit:
    """How a classifier is trained: SGD with momentum 0.9 and steps of the rate; the values are FIMA's.

    Attributes:
        lr: Initial learning rate; times 0.1 from each of the milestones on.
        weight_decay: Of all that is trained.
        batch: Videos a step.
        epochs: Each has one clip of every video.
        milestones: Epochs.
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
        """ConfigError for values that mean nothing."""
        if self.epochs < 1 or self.batch < 1:
            raise ConfigError(f"epochs={self.epochs} and batch={self.batch} must be 1 or more")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout:g} must be a probability below 1")

    def rate(self, epoch: int) -> float:
        """Learning rate of an epoch."""
        milestones = [milestone for milestone in self.milestones if milestone < self.epochs]
        if not milestones:
            return self.lr
        return epoch_learning_rate(epoch, base_lr=self.lr, schedule="step", epochs=self.epochs, milestones=milestones)


FINETUNE = Fit(lr=0.01, weight_decay=1e-4, batch=16, epochs=150, milestones=(60, 120), dropout=0.5)
LINEAR = Fit(lr=30.0, weight_decay=0.0, batch=256, epochs=100, milestones=(60, 80), dropout=0.0)


class Classifier(nn.Module):
    """A trunk, dropout and one linear layer; `frozen` keeps the trunk as it is, in eval mode."""

    def __init__(self, trunk: Trunk, classes: int, *, dropout: float, l2norm: bool, frozen: bool, seed: int) -> None:
        super().__init__()
        self.trunk, self.dropout, self.l2norm, self.frozen = trunk, nn.Dropout(dropout), l2norm, frozen
        self.fc = nn.Linear(trunk.channels, classes)
        nn.init.normal_(self.fc.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.fc.bias)
        self.trunk.requires_grad_(not frozen)

    @property
    def learned(self) -> nn.Module:
        """What training changes."""
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
    """Trains a classifier epoch by epoch; killed at any moment, it goes on with the last whole epoch.

    Attributes:
        model: The classifier, on its device.
        fit: How it is trained.
        batches: Numbers of steps, from and to -> inputs and classes of each.
        steps: Of an epoch.
        forward: Inputs -> logits.
        seed: Of dropout.
        precision: fp32 or bf16 (autocast).
        run: Folder of the log and the checkpoint; None: neither is written.
    """

    model: Classifier
    fit: Fit
    batches: Batches
    steps: int
    forward: Callable[[Tensor], Tensor]
    seed: int = 0
    precision: str = "fp32"
    run: Path | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        learned = [p for p in self.model.learned.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(learned, lr=self.fit.lr, momentum=0.9, weight_decay=self.fit.weight_decay)

    def train(self, *, resume: bool = False, after: Callable[[int], dict[str, float]] | None = None) -> None:
        """Run all epochs that are left; what `after` says of each is logged with it.

        Raises:
            FsarError: the loss is not finite.
            ConfigError: what is to be resumed was trained in another way.
            DiskError: the disk is full.
        """
        start = self._resume() if resume else 0
        with ExitStack() as stack:
            log = None if self.run is None else stack.enter_context(RunLog(self.run, start))
            epochs = range(start, self.fit.epochs)
            bar = stack.enter_context(
                tqdm(epochs, initial=start, total=self.fit.epochs, unit="epoch", desc="train", leave=False)
            )
            for epoch in bar:
                record = self.epoch(epoch)
                bar.set_postfix_str(f"loss {record['loss']:.3f}, accuracy {record['accuracy']:.1%}")
                record |= after(epoch + 1) if after else {}
                if log is not None:
                    log.write("train", epoch + 1, **record)
                    log.make_durable()
                    self._save(epoch + 1)

    def epoch(self, epoch: int) -> dict[str, float]:
        """One epoch: mean loss, share of right answers, learning rate, clips a second."""
        rate, began = self.fit.rate(epoch), time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        first, totals, clips = epoch * self.steps, torch.zeros(2), 0
        with closing(self.batches(first, first + self.steps)) as batches:
            for n, (inputs, labels) in enumerate(batches, first):
                loss, right = self.step(n, inputs, labels)
                totals = totals.to(loss.device) + torch.stack([loss * len(labels), right.float()])
                clips += len(labels)
        loss, right = (totals / clips).tolist()
        if not math.isfinite(loss):
            raise FsarError(f"the loss of epoch {epoch + 1} is not finite: lower --lr")
        seconds = time.perf_counter() - began
        return {"loss": loss, "accuracy": right, "lr": rate, "clips_per_s": round(clips / seconds, 2)}

    def step(self, n: int, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """One optimiser step: the mean loss and the number of right answers, on the device."""
        torch.manual_seed(PhiloxDraw(self.seed, n).randint(0, 2**62))  # of dropout: nothing else is to be saved
        with autocast(labels.device, self.precision):
            logits = self.forward(inputs)
        loss = F.cross_entropy(logits.float(), labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.fit.clip_norm:
            nn.utils.clip_grad_norm_(self.model.learned.parameters(), self.fit.clip_norm)
        self.optimizer.step()
        return loss.detach(), (logits.argmax(dim=1) == labels).sum()

    @property
    def checkpoint(self) -> Path:
        """Where the last whole epoch lies."""
        assert self.run is not None
        return self.run / "checkpoints" / "last.safetensors"

    def _save(self, epoch: int) -> None:
        save_state(self.checkpoint, self.model.learned, self.optimizer, {"epoch": epoch} | {"facts": dict(self.facts)})

    def _resume(self) -> int:
        loop = load_state(self.checkpoint, self.model.learned, self.optimizer)
        other = [key for key, value in self.facts.items() if loop.get("facts", {}).get(key) != value]
        if other:
            raise ConfigError(
                f"--resume: {self.run} was trained with another {', '.join(other)}; give the options that it was "
                "started with, or start a new run"
            )
        return int(loop["epoch"])
