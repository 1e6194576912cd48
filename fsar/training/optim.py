"""The optimiser of the reference code: parameter groups and the learning-rate clock."""

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
    """Two groups for an optimiser: without and with weight decay; frozen parameters are in neither.

    "reference": only parameters whose official name says "bn" or "norm" are spared, so the norms of the stem,
    the down-sampling and the decoder, the tokens, scales and biases are decayed as in the reference code
    (alibaba-mmai-research/MoLo).  "none": only weights of two dimensions and more are decayed.
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
    """Adam with weight decay as an L2 term of the gradient (betas 0.9 and 0.999, eps 1e-8).

    It is the fused one, which keeps rates and counts of steps on the device; see `guarded_step`.
    """
    groups = parameter_groups(model, weight_decay=weight_decay, decay_norms=decay_norms)
    device = next(model.parameters()).device
    for group in groups:
        group["lr"] = torch.tensor(lr, dtype=torch.float32, device=device)
    return torch.optim.Adam(groups, lr=lr, fused=True, capturable=device.type == "cuda")


def create_sgd(model: nn.Module, *, lr: float, momentum: float = 0.9, weight_decay: float = 1e-4) -> torch.optim.SGD:
    """SGD as pre-training has it: weight decay on every parameter, norms and biases too; frozen ones are left out.

    It is the fused one; see `guarded_step`.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rate = torch.tensor(lr, dtype=torch.float32, device=trained[0].device)
    optimizer = torch.optim.SGD(trained, lr=rate, momentum=momentum, weight_decay=weight_decay, fused=True)
    if momentum:  # without it a first step that is left out would leave them unset
        for parameter in trained:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def guarded_step(optimizer: torch.optim.Optimizer, rate: float, good: Tensor) -> None:
    """One step at a learning rate, or none where `good` [] is False, without waiting for the device to say so.

    Fused optimisers take that from `found_inf`, which is how torch.amp.GradScaler leaves steps out.
    """
    for group in optimizer.param_groups:
        group["lr"].fill_(rate)
    optimizer.found_inf = good.logical_not().float()  # type: ignore[attr-defined]  # read by fused steps alone
    optimizer.step()


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
    """Learning rate at episode n: linear warm-up over the first epoch of the clock, then steps.

    An epoch has `steps_iter` episodes; from epoch steps[k] on the rate is base_lr * factors[k].  The "reference"
    clock counts the epoch twice, floor(n / steps_iter) + n / steps_iter, as the reference code does, so its
    steps come early; "single" counts n / steps_iter.  ConfigError for lists that do not fit.
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
    """Learning rate of one epoch of pre-training, constant within it.

    "cosine": base_lr * (1 + cos(pi * epoch / epochs)) / 2.  "step": times `factor` from each of the milestones on.
    "warmup_step": linear from warmup_lr to base_lr over the first milestones[0] epochs, then steps at the others.
    Source: FIMA's code (ZMHH-H/FIMA, train.py).  ConfigError for another schedule or milestones that do not rise.
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
