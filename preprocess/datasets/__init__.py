"""Catalogues of data sets: the videos, their classes and splits."""
