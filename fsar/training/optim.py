"""Make the optimisers of the reference codes, and compute their learning rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fsar.checkpoints import reference_names
from shards_spec.errors import ConfigError

DecayNorms = Literal["reference", "none"]
Clock = Literal["reference", "single"]
EpochSchedule = Literal["cosine", "step", "warmup_step"]


def parameter_groups(
    model: nn.Module, *, weight_decay: float, decay_norms: DecayNorms = "reference"
) -> list[dict[str, Any]]:
    """Split the trained parameters into two groups for an optimiser: without and with weight decay.

    "reference" spares only parameters whose official name contains "bn" or "norm".  So the norms of
    the stem, the down-sampling and the decoder, the tokens, scales and biases are decayed, as in
    the reference code (alibaba-mmai-research/MoLo).  "none" decays only weights of two dimensions
    and more.

    Raises:
        ConfigError: there is no such rule.
    """
    if decay_norms not in ("reference", "none"):
        raise ConfigError(f'decay_norms="{decay_norms}" is not known; choose "reference" or "none"')
    official = reference_names(model)
    spared: list[Tensor] = []
    decayed: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if decay_norms == "reference":
            decays = "bn" not in official[name] and "norm" not in official[name]
        else:
            decays = name.endswith("weight") and parameter.ndim >= 2
        (decayed if decays else spared).append(parameter)
    return [{"params": spared, "weight_decay": 0.0}, {"params": decayed, "weight_decay": weight_decay}]


def create_optimizer(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 1e-3,
    decay_norms: DecayNorms = "reference",
) -> torch.optim.Adam:
    """Make Adam with weight decay as an L2 term of the gradient (betas 0.9 and 0.999, eps 1e-8).

    `TrainingStep.update` relies on the fused kernel, which keeps rates and counts of steps on the
    device.
    """
    groups = parameter_groups(model, weight_decay=weight_decay, decay_norms=decay_norms)
    device = next(model.parameters()).device
    for group in groups:
        group["lr"] = torch.tensor(lr, dtype=torch.float32, device=device)
    return torch.optim.Adam(groups, lr=lr, fused=True, capturable=device.type == "cuda")


def create_sgd(model: nn.Module, *, lr: float, momentum: float = 0.9, weight_decay: float = 1e-4) -> torch.optim.SGD:
    """Make the SGD of pre-training: weight decay on every trained parameter, norms and biases too.

    The kernel is the fused one, on which `TrainingStep.update` relies.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rate = torch.tensor(lr, dtype=torch.float32, device=trained[0].device)
    optimizer = torch.optim.SGD(trained, lr=rate, momentum=momentum, weight_decay=weight_decay, fused=True)
    if momentum:  # a fused first step makes them uninitialised, and leaves them so when it is skipped
        for parameter in trained:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def learning_rate(
    n: int,
    *,
    base_lr: float,
    warmup_lr: float,
    steps_iter: int,
    steps: Sequence[float],
    factors: Sequence[float],
    clock: Clock = "reference",
) -> float:
    """Return the learning rate at episode n: linear warm-up over the first epoch, then steps.

    An epoch has `steps_iter` episodes.  From epoch steps[k] on the rate is base_lr * factors[k].
    The "single" clock counts n / steps_iter.  The "reference" clock counts the epoch twice,
    floor(n / steps_iter) + n / steps_iter, as the reference code does; its steps come early.

    Raises:
        ConfigError: the lists do not fit, or there is no such clock.
    """
    if len(steps) != len(factors) or not steps or steps[0] != 0 or list(steps) != sorted(steps):
        raise ConfigError(f"steps {list(steps)} and factors {list(factors)} must be equally long, steps rising from 0")
    if clock not in ("reference", "single"):
        raise ConfigError(f'lr_clock="{clock}" is not known; choose "reference" or "single"')
    epoch = n / steps_iter + (n // steps_iter if clock == "reference" else 0)
    if epoch < 1:
        return warmup_lr + epoch * (base_lr - warmup_lr)
    reached = max(k for k, step in enumerate(steps) if step <= epoch)
    return base_lr * factors[reached]


def epoch_learning_rate(
    epoch: int,
    *,
    base_lr: float,
    schedule: EpochSchedule = "cosine",
    epochs: int,
    milestones: Sequence[int] = (),
    factor: float = 0.1,
    warmup_lr: float = 0.0025,
) -> float:
    """Return the learning rate of one epoch of pre-training, constant within it.

    - "cosine": base_lr * (1 + cos(pi * epoch / epochs)) / 2.
    - "step": times `factor` from each of the milestones on.
    - "warmup_step": linear from warmup_lr to base_lr over the first milestones[0] epochs, then
      steps at the others.
    Source: FIMA's code (ZMHH-H/FIMA, train.py).

    Raises:
        ConfigError: there is no such schedule, or the milestones do not rise.
    """
    if schedule == "cosine":
        return base_lr * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    if schedule not in ("step", "warmup_step"):
        raise ConfigError(f'schedule="{schedule}" is not known; choose "cosine", "step" or "warmup_step"')
    if not milestones or milestones[0] < 1 or list(milestones) != sorted(set(milestones)):
        raise ConfigError(f'milestones {list(milestones)} of schedule="{schedule}" must be epochs that rise from 1')
    if schedule == "warmup_step":
        if epoch < milestones[0]:
            return warmup_lr + (base_lr - warmup_lr) * epoch / milestones[0]
        milestones = milestones[1:]
    return base_lr * factor ** sum(epoch >= milestone for milestone in milestones)
