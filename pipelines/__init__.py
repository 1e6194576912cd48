"""Shards -> batches on the device: which frames, decoding, augmentation."""

from pipelines.draw import Draw, PhiloxDraw

__all__ = ["Draw", "PhiloxDraw"]
