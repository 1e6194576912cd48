"""Weights of a trunk before training: a file with torchvision's names, or torchvision's published one."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from shards_spec.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

# torchvision's IMAGENET1K_V1 files; the hash at the end of each name is the start of its SHA-256.
PUBLISHED = {
    "resnet18": "https://download.pytorch.org/models/resnet18-f37072fd.pth",
    "resnet34": "https://download.pytorch.org/models/resnet34-b627a593.pth",
    "resnet50": "https://download.pytorch.org/models/resnet50-0676ba61.pth",
}


def load_trunk_weights(trunk: nn.Module, name: str, source: str) -> None:
    """Fill a trunk: `source` is a file, `fetch`, or `random` for the weights that it was made with.

    Raises:
        ConfigError: nothing was asked for, or the file is missing, unreadable or of another network.
    """
    if source == "random":
        return
    if not source:
        where = f' ("fetch" gets {PUBLISHED[name]})' if name in PUBLISHED else ""
        raise ConfigError(
            f"this recipe starts from pretrained weights of {name}: give --trunk-weights FILE{where}, "
            "or --trunk-weights random to train from nothing on purpose"
        )
    state = _fetch(name) if source == "fetch" else _read(Path(source))
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}  # no trunk has a classifier
    try:
        problems = trunk.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ConfigError(f"{source} does not fit {name}: {str(error).splitlines()[-1].strip()}") from error
    missing = [key for key in problems.missing_keys if not key.endswith("num_batches_tracked")]
    if missing or problems.unexpected_keys:
        names = ", ".join([*missing, *problems.unexpected_keys][:4])
        raise ConfigError(
            f"{source} does not fit {name}: {len(missing)} tensors missing, {len(problems.unexpected_keys)} unexpected "
            f"({names}); expected torchvision's names"
        )


def _fetch(name: str) -> dict[str, Tensor]:
    if name not in PUBLISHED:
        raise ConfigError(f"no published weights are known for {name}; give --trunk-weights FILE or random")
    try:
        state: dict[str, Tensor] = torch.hub.load_state_dict_from_url(
            PUBLISHED[name], map_location="cpu", check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"cannot fetch {PUBLISHED[name]} ({error}); download it and give its path") from error
    return state


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ConfigError(f"--trunk-weights {path}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ConfigError(f"{path} holds pickled code, which is never run; save its state dict alone") from None
    except Exception as error:
        raise ConfigError(f"{path} cannot be read as weights ({type(error).__name__}: {error})") from error
    return state
