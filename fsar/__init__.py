"""Few-shot action recognition: episodes in, trained model and honest numbers out."""

from fsar.checkpoints import load_reference_state_dict
from fsar.episode import Episode
from fsar.methods import METHODS, create_method

__all__ = ["METHODS", "Episode", "create_method", "load_reference_state_dict"]
