"""Stored frames -> pixels: DALI, JPEG threads, raw copies."""
