"""State what each option of a few-shot method means, for the help of the commands."""

from __future__ import annotations

from fsar.methods import METHODS, method_options
from fsar.run.keys import Key, option_types

DERIVED = frozenset({"trunk", "channels", "frames", "num_classes"})  # options that a run derives itself
GROUP = "Options of single methods"
EXPLAINED = {
    "classification_weight": "Weight of the auxiliary classifier's loss.",
    "contrastive_weight": "Weight of the contrastive losses of the global tokens.",
    "depth": "Layers of the temporal transformer.",
    "dropout": "Drop out in training.",
    "heads": "Heads of attention.",
    "inference": "What answers: visual, text or combined.",
    "metric": "How videos are compared; molo: hausdorff, otam; ctx, prototype: cosine, euclidean; prototype: shift.",
    "most_shift": "Steps that a video may be moved in time; by default a quarter of them.",
    "motion_weight": "Weight of the motion logits.",
    "outside_weight": "Factor of the temporal loss beyond the window.",
    "position_scale": "A,B: features are scaled by sqrt(width / A), the position code by B.",
    "recons_norm": "Target of the reconstruction: none (as it is) or video (divided by its own size).",
    "recons_target": "What is reconstructed of the steps between frames: frames, difference or flow.",
    "recons_weight": "Weight of the reconstruction loss.",
    "reduction": "Set distance over frames: sum (the code) or mean (the paper).",
    "semi_temperature": "Divides the distances of unlabelled videos.",
    "semi_threshold": "Least probability with which an unlabelled video joins a class.",
    "shift_price": "What each step of such a shift costs, in cosine.",
    "single_direction": "Compare only the query with the class, not the class with the query.",
    "smoothing": "Smoothing of the alignment (lambda).",
    "support_merge": "Shots of a class: prototype (averaged first) or video (each compared).",
    "temperature": "Factor of the logits, 0: learned; molo: fixed factor of the contrastive logits.",
    "temporal_balance": "Frames over which the temporal margin grows: twice sigma squared.",
    "temporal_weight": "Weight of the temporal loss.",
    "text_weight": "Weight of the text with --inference combined.",
    "tuple_sizes": "Numbers of frames of a tuple, with commas between them.",
    "width": "Width of keys and values.",
    "window": "Steps up to which frames are neighbours.",
}


def method_keys() -> dict[str, Key]:
    """Collect every option of the registry's methods that a recipe may set.

    The kind of an option is that of its default.
    """
    found: dict[str, dict[str, object]] = {}  # option -> method -> default
    for method in METHODS:
        for option, default in method_options(method).items():
            if option not in DERIVED:
                found.setdefault(option, {})[method] = default
    return {option: _key(option, defaults) for option, defaults in found.items()}


def _key(option: str, defaults: dict[str, object]) -> Key:
    values = [value for value in defaults.values() if value is not None]
    default = values[0] if len(set(values)) == 1 else None
    kind = option_types(dict.fromkeys([option], values[-1] if values else None))[option]
    text = f"{EXPLAINED.get(option, 'Option').rstrip('.')} ({', '.join(defaults)})."
    return Key(name=option, kind=kind, default=default, help=text, group=GROUP)
