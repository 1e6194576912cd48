"""Who makes the shards: processes, array jobs, a Ray cluster."""
