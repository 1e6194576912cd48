"""Timing, bounds, and the environment of a result."""
