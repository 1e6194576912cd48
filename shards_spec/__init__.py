"""What a shard is: the format (`SPEC.md`), its writer, index, random-access reader and verification."""

from shards_spec.errors import FsarError, ShardError
from shards_spec.reader import ShardSet
from shards_spec.schema import Dataset, Split
from shards_spec.series import Series

__all__ = ["Dataset", "FsarError", "Series", "ShardError", "ShardSet", "Split"]
