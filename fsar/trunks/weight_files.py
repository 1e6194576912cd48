"""Read files of weights that others made: tensors by name, never code.

A TorchScript archive is read without TorchScript: neither its code nor pickled code is run.
"""

from __future__ import annotations

import pickle
import pickletools
import zipfile
from collections.abc import Callable, Iterator, Mapping
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file
from torch import Tensor

from shards_spec.errors import ConfigError
from shards_spec.index.layout import check_announced

OUTER = ("module.", "backbone.")  # prefixes of parallel wrappers and of outer models
# Prefixes of a trunk in files that hold more: CLIP's has a text tower, pre-training's a momentum
# copy.
TRUNKS_IN_FILES = ("visual.", "encoder_q.", "recognizer.encoder_q.")
CLASSIFIERS = ("fc.", "_fc.")  # no trunk has one
WRAPPERS = ("state_dict", "model_state", "model")  # names under which others keep the tensors in their files


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file: a state dict, or a training checkpoint. No pickled code is run.

    Raises:
        ConfigError: the file is missing, unreadable, holds code, or no plain table of tensors.
    """
    tensors = plain_tensors(_load(path), str(path))
    # One stored number may stand for a tensor of any size, and one tensor may have many names.
    check_announced(sum(value.nbytes for value in tensors.values()), path.stat().st_size, path)
    return tensors


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
    """Refuse an archive that announces far more than it holds, before any of it is unpacked."""
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            announced = sum(entry.file_size for entry in archive.infolist())
    except Exception as error:  # a damaged archive can fail anywhere
        raise ConfigError(f"{path} cannot be read as weights ({type(error).__name__}: {error})") from error
    check_announced(announced, path.stat().st_size, path)


def plain_tensors(table: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """Return the tensors of a table, or of the table in it that holds them.

    Raises:
        ConfigError: some entries are no plain tensors; it names them and `source`.
    """
    for wrapper in WRAPPERS:
        if isinstance(table.get(wrapper), dict):
            table = table[wrapper]
    wrong = [str(key)[:80] for key, value in table.items() if not (isinstance(key, str) and _is_plain(value))]
    if wrong or not table:
        raise ConfigError(f"{source} holds no plain table of tensors ({', '.join(wrong[:4]) or 'it is empty'})")
    return dict(table)


def _is_plain(value: object) -> bool:
    """Tell whether a value is a dense tensor of numbers in memory."""
    if not isinstance(value, torch.Tensor) or value.is_quantized or value.is_nested:
        return False
    return value.layout == torch.strided and value.device.type == "cpu"


def trunk_entries(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select a trunk's tensors, by its own names: no outer prefixes, other parts or classifier."""
    bare = {_bare(name): value for name, value in tensors.items()}
    for prefix in TRUNKS_IN_FILES:
        found = {name.removeprefix(prefix): value for name, value in bare.items() if name.startswith(prefix)}
        bare = found or bare
    return {name: value for name, value in bare.items() if not name.startswith(CLASSIFIERS)}


def _bare(name: str) -> str:
    for prefix in OUTER:
        name = name.removeprefix(prefix)
    return name


# TorchScript archives

DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# Operations of a pickle that keep an object under a number.
MEMO = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
MOST_TENSORS = 100_000  # a module may hold another twice, on every level: then their number doubles with each


def is_torchscript(path: Path) -> bool:
    """Tell whether a file is a TorchScript archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except Exception:  # noqa: BLE001 -- a damaged archive can fail anywhere; then it is not one
        return False


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Read the parameters, buffers and other tensors of an archive's module, by dotted names.

    The pickle in it may name the module's own classes, which become bags of attributes. It may name
    the few functions that put tensors together, which are replaced by ours.

    Raises:
        ConfigError: the pickle names anything else, or the archive is damaged or holds too many
            tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            root = _Unpickler(archive).load()
            found = dict(islice(_named_tensors(root, ""), MOST_TENSORS + 1))
    except Refused as error:
        raise ConfigError(f"{path} {error}; no pickled code is ever run, so take the file from its publisher") from None
    except Exception as error:  # a damaged archive can fail anywhere
        raise ConfigError(f"{path} cannot be read as TorchScript ({type(error).__name__}: {error})") from error
    if len(found) > MOST_TENSORS:
        raise ConfigError(f"{path} holds more than {MOST_TENSORS:,} tensors; give the file of one trunk")
    return found


class Refused(Exception):  # noqa: N818 -- becomes a ConfigError
    """A pickle asks for an object that is not part of a module's tensors."""


class Bag:
    """A stand-in for an object of any class of the archive: its attributes, without its methods."""

    attributes: dict[str, Any]

    def __new__(cls) -> Self:
        """Make a bag without attributes; unpickling calls no __init__."""
        bag = super().__new__(cls)
        bag.attributes = {}
        return bag

    def __setstate__(self, state: object) -> None:
        self.attributes = state if isinstance(state, dict) else {}


class _Unpickler(pickle.Unpickler):
    """Rebuild tensors, lists and bags; every global that a pickle may name is answered here."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        (name,) = (name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl"))
        data = archive.read(name)
        _check_memo(data)
        super().__init__(BytesIO(data))
        self._archive, self._folder = archive, name.removesuffix("data.pkl")
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401 -- types, functions and markers
        """Return our stand-in for a global; Refused when no plain module's archive names it."""
        if module.partition(".")[0] == "__torch__":
            return Bag
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (module, name) not in GLOBALS:
            raise Refused(f"names {module}.{name}, which is no part of a module's tensors")
        function = GLOBALS[module, name]
        # A new function each time, since a pickle may set attributes of the object that it gets.
        return lambda *arguments: function(*arguments)  # noqa: PLW0108

    def persistent_load(self, key: Any) -> Tensor:  # noqa: ANN401 -- whatever the pickle holds
        """("storage", dtype, number, device, elements) -> the stored elements [n]."""
        kind, dtype, number, _, elements = key
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise Refused(f"holds a {kind}, which is no storage of a tensor")
        if number not in self._storages:
            stored = bytearray(self._archive.read(f"{self._folder}data/{number}"))
            storage = torch.frombuffer(stored, dtype=dtype, count=elements) if elements else torch.empty(0, dtype=dtype)
            self._storages[number] = storage
        return self._storages[number]


def _check_memo(data: bytes) -> None:
    """Refuse a pickle that keeps objects under numbers beyond its length: they take memory."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in MEMO and int(argument or 0) > len(data):
            raise Refused(f"remembers more than its {len(data)} bytes can hold")


def _named_tensors(bag: object, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in bag.attributes.items() if isinstance(bag, Bag) else ():
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{name}", value
        else:
            yield from _named_tensors(value, f"{prefix}{name}.")


def _tensor(storage: Tensor, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: object) -> Tensor:
    """Make a tensor on a storage; torch refuses one that reaches beyond it."""
    return storage.as_strided(shape, strides, offset)


def _first(value: object, *_: object) -> object:
    return value


GLOBALS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("collections", "OrderedDict"): dict,
    ("torch.jit._pickle", "restore_type_tag"): _first,
    **{("torch.jit._pickle", f"build_{kind}list"): _first for kind in ("int", "double", "bool", "tensor")},
}
