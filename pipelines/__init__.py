"""From shards to batches on the device: which frames, decoding, augmentation."""
