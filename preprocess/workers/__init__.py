"""Make shards: in processes of this machine, as parts of an array job, on a Ray cluster."""
