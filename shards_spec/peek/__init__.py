"""Contact sheets of a shard set."""
