"""Accuracy of a model on episodes, computed from embeddings that are made once.

`fsar.evaluation.prediction` classifies plain video files.  It is not handed on here, since it loads
`preprocess`.
"""

from fsar.evaluation.accuracy import answer, evaluate, summarise
from fsar.evaluation.comparison import compare
from fsar.evaluation.embeddings import EmbeddingStore

__all__ = ["EmbeddingStore", "answer", "compare", "evaluate", "summarise"]
