"""Decoded frames -> the members of each series."""
