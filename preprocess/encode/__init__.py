"""Encode decoded frames as the members of each series."""
