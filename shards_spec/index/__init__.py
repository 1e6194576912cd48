"""The index of a shard set: built, checked, read."""
