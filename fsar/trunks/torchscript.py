"""Tensors of a TorchScript archive, without TorchScript: neither its code nor pickled code is ever run."""

from __future__ import annotations

import pickle
import pickletools
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from shards_spec.errors import ConfigError

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


MEMO = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
MOST_TENSORS = 100_000  # a module may hold others over and over: their number doubles with each level


class Refused(Exception):  # noqa: N818 -- becomes a ConfigError
    """What a pickle asks for is not part of a module's tensors."""


class Bag:
    """What stands for an object of any class of the archive: its attributes, and nothing that it does."""

    attributes: dict[str, Any]

    def __new__(cls) -> Self:
        """A bag without attributes; unpickling calls no __init__."""
        bag = super().__new__(cls)
        bag.attributes = {}
        return bag

    def __setstate__(self, state: object) -> None:
        self.attributes = state if isinstance(state, dict) else {}


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except Exception:  # noqa: BLE001 -- a damaged archive can fail anywhere; it is none then
        return False


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Parameters, buffers and other tensors of the module in an archive, by their dotted names.

    The pickle in it may name the module's own classes, which become bags of attributes, and the few functions
    that put tensors together, which are replaced by ours; ConfigError when it names anything else or is damaged.
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


class _Unpickler(pickle.Unpickler):
    """Rebuilds tensors, lists and bags; every global that it may meet is answered here."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        (name,) = (name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl"))
        data = archive.read(name)
        _check_memo(data)
        super().__init__(BytesIO(data))
        self._archive, self._folder = archive, name.removesuffix("data.pkl")
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401 -- types, functions and markers
        """Our stand-in for a global; Refused when the archive of a plain module has no business with it."""
        if module.partition(".")[0] == "__torch__":
            return Bag
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (module, name) not in GLOBALS:
            raise Refused(f"names {module}.{name}, which is no part of a module's tensors")
        function = GLOBALS[module, name]
        # One of its own, since a pickle may set attributes of what it gets.
        return lambda *given: function(*given)  # noqa: PLW0108

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
    """Refuse a pickle that numbers what it remembers beyond its own length: memory would be taken up to that number."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in MEMO and int(argument or 0) > len(data):
            raise Refused(f"remembers more than its {len(data)} bytes can hold")


def _tensor(storage: Tensor, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: object) -> Tensor:
    """A tensor on a storage; torch refuses one that reaches beyond it."""
    return storage.as_strided(shape, strides, offset)


def _first(value: object, *_: object) -> object:
    return value


GLOBALS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("collections", "OrderedDict"): dict,
    ("torch.jit._pickle", "restore_type_tag"): _first,
    **{("torch.jit._pickle", f"build_{kind}list"): _first for kind in ("int", "double", "bool", "tensor")},
}


def _named_tensors(bag: object, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in bag.attributes.items() if isinstance(bag, Bag) else ():
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{name}", value
        else:
            yield from _named_tensors(value, f"{prefix}{name}.")
