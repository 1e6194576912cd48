"""Files of weights that others made: tensors by name, and never code."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fsar.trunks.torchscript import is_torchscript, read_torchscript
from shards_spec.errors import ConfigError
from shards_spec.index.files import check_announced

OUTER = ("module.", "backbone.")  # prefixes of parallel wrappers and of outer models
# Where files that hold more than a trunk keep it: CLIP's beside a text tower, pre-training's beside its momentum copy.
TRUNKS_IN_FILES = ("visual.", "encoder_q.", "recognizer.encoder_q.")
CLASSIFIERS = ("fc.", "_fc.")  # no trunk has one
WRAPPERS = ("state_dict", "model_state", "model")  # under which others keep the tensors in their files


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, of a state dict alone or of a training checkpoint that holds one; pickled code is not run.

    Raises:
        ConfigError: the file is missing, unreadable, holds code, or no plain table of tensors.
    """
    tensors = plain_tensors(_load(path), str(path))
    # one stored number may stand for a tensor of any size, and one tensor under many names
    check_announced(sum(value.nbytes for value in tensors.values()), path.stat().st_size, path)
    return tensors


def plain_tensors(given: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """The tensors of a table, which may hold them under a name of its own.

    Raises:
        ConfigError: naming `source` and what is no tensor.
    """
    for wrapper in WRAPPERS:
        if isinstance(given.get(wrapper), dict):
            given = given[wrapper]
    wrong = [str(key)[:80] for key, value in given.items() if not (isinstance(key, str) and _is_plain(value))]
    if wrong or not given:
        raise ConfigError(f"{source} holds no plain table of tensors ({', '.join(wrong[:4]) or 'it is empty'})")
    return dict(given)


def _is_plain(value: object) -> bool:
    """Whether it is a dense tensor of numbers in memory."""
    if not isinstance(value, torch.Tensor) or value.is_quantized or value.is_nested:
        return False
    return value.layout == torch.strided and value.device.type == "cpu"


def trunk_entries(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a file belongs to a trunk, under the trunk's own names: without outer parts and without a classifier."""
    bare = {_bare(name): value for name, value in tensors.items()}
    for prefix in TRUNKS_IN_FILES:
        found = {name.removeprefix(prefix): value for name, value in bare.items() if name.startswith(prefix)}
        bare = found or bare
    return {name: value for name, value in bare.items() if not name.startswith(CLASSIFIERS)}


def _bare(name: str) -> str:
    for prefix in OUTER:
        name = name.removeprefix(prefix)
    return name


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file")
    _check_archive(path)
    if is_torchscript(path):
        return dict(read_torchscript(path))
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ConfigError(f"{path} holds pickled code, which is never run; save its state dict alone") from None
    except Exception as error:
        raise ConfigError(f"{path} cannot be read as weights ({type(error).__name__}: {error})") from error
    if not isinstance(state, dict):
        raise ConfigError(f"{path} holds a {type(state).__name__}; expected a state dict")
    return state


def _check_archive(path: Path) -> None:
    """Refuse an archive that announces far more than it holds, before anything of it is unpacked."""
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            announced = sum(entry.file_size for entry in archive.infolist())
    except Exception as error:  # a damaged archive can fail anywhere
        raise ConfigError(f"{path} cannot be read as weights ({type(error).__name__}: {error})") from error
    check_announced(announced, path.stat().st_size, path)
