"""Before a shard set is opened: is it one, is it finished, and is its index what was written?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shards_spec.errors import ShardError
from shards_spec.files import read_json
from shards_spec.index.build import INDEX, attributes_sha256, list_shards, pinned_hashes
from shards_spec.schema import FORMAT


def check_folder(path: Path) -> None:
    """Refuse a folder that is no finished shard set: ShardError, with the command that makes or finishes one."""
    if not path.is_dir():
        raise ShardError(f"{path} is no folder; make shards with: fsar-preprocess NAME --videos DIR --out {path}")
    if not (path / INDEX).is_dir():
        unfinished = bool(list_shards(path)) or (path / "plan.json").exists()
        hint = (
            "preprocessing is unfinished: type the same fsar-preprocess command again (or run fsar-shards reindex)"
            if unfinished
            else "it is no shard set: make one with fsar-preprocess"
        )
        raise ShardError(f"{path} has no {INDEX}; {hint}")


def read_attributes(files: Path, path: Path) -> dict[str, Any]:
    """What the index in `files` says of itself: format, the hashes of its columns and of the small files.

    Args:
        files: Folder of the small files.
        path: What messages call the set.

    Raises:
        ShardError: the index is damaged or of another format, or the small files are not those of its making.
    """
    where = path / INDEX
    raw = read_json(files / INDEX / "zarr.json")
    attributes = raw.get("attributes") if isinstance(raw, dict) else None
    if not isinstance(attributes, dict) or attributes.get("format") != FORMAT:
        raise ShardError(f"{where} is not of format {FORMAT}; run fsar-shards reindex {path}")
    whole = {"columns", "files", "sha256"} <= set(attributes) and isinstance(attributes["columns"], dict)
    if not whole or attributes["sha256"] != attributes_sha256(attributes):
        raise ShardError(f"{where} is damaged; run fsar-shards reindex {path}")
    if pinned_hashes(files) != attributes["files"]:
        raise ShardError(f"{path}: dataset.json, plan.json or failures.jsonl changed; run fsar-shards reindex {path}")
    return attributes
