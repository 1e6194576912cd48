"""Read and compare class splits: lists of the field, lists that ship, those of a shard set."""
