"""Build, check and read the index of a shard set; `layout` defines its columns."""
