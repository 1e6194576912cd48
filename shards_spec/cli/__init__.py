"""The command `fsar-shards`."""
