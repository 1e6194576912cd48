"""Read shard sets and files at URLs."""
