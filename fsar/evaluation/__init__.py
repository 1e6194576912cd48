"""Accuracy of a model on episodes, computed from embeddings that are made once."""
