"""Decoded frames -> normalised clips."""
