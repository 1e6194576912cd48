"""Decode windows of stored frames."""
