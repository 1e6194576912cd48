"""Write, read and verify shard sets; SPEC.md describes the format byte by byte."""

from shards_spec.errors import FsarError, ShardError
from shards_spec.reader import ShardSet
from shards_spec.schema import Dataset, Split
from shards_spec.series import Series

__all__ = ["Dataset", "FsarError", "Series", "ShardError", "ShardSet", "Split"]
