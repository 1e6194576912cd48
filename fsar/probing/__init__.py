"""Probes of a trunk: retrieval, neighbours, linear classifiers."""
