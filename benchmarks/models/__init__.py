"""Accuracy of models, not their cost."""
