"""Make indices that lie: columns and attributes changed, every hash made to fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs import Zstd

from shards_spec.index.layout import INDEX, attributes_sha256, column_sha256


def write_column(path: Path, values: np.ndarray) -> str:
    """Replace the array in a folder, in one chunk; return its hash."""
    metadata = json.loads((path / "zarr.json").read_bytes())
    metadata |= {"shape": list(values.shape), "data_type": values.dtype.name}
    metadata["chunk_grid"]["configuration"]["chunk_shape"] = [max(len(values), 1), *values.shape[1:]]
    (path / "zarr.json").write_text(json.dumps(metadata))
    chunk = path / "/".join(["c", *"0" * values.ndim])
    shutil.rmtree(path / "c", ignore_errors=True)
    chunk.parent.mkdir(parents=True)
    packed = len(metadata["codecs"]) > 1
    chunk.write_bytes(Zstd().encode(np.ascontiguousarray(values)) if packed else values.tobytes())
    return column_sha256(values)


def change_metadata(path: Path, **changes: Any) -> None:
    """Change what the metadata of an array says."""
    metadata = json.loads((path / "zarr.json").read_bytes())
    (path / "zarr.json").write_text(json.dumps(metadata | changes))


def seal(folder: Path, **columns: str) -> None:
    """Make the attributes of an index fit new hashes of some columns (`__` stands for `/`)."""
    root = folder / INDEX / "zarr.json"
    metadata = json.loads(root.read_bytes())
    attributes = metadata["attributes"]
    attributes["columns"] |= {name.replace("__", "/"): sha256 for name, sha256 in columns.items()}
    attributes["sha256"] = attributes_sha256(attributes)
    root.write_text(json.dumps(metadata))


def lie(folder: Path, column: str, values: np.ndarray) -> None:
    """Replace a column of a shard set's index, all hashes made to fit."""
    seal(folder, **{column.replace("/", "__"): write_column(folder / INDEX / column, values)})
