"""Find the key or option that a name of another project or a slip of the keyboard means."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from shards_spec.errors import suggest

# Names of other projects and papers -> ours, the likeliest first; a command takes the first that it
# has.
MEANINGS: dict[str, tuple[str, ...]] = {
    "adam_lr": ("lr",),
    "amp": ("precision",),
    "annotations": ("lists", "split"),
    "arch": ("trunk",),
    "architecture": ("trunk",),
    "backbone": ("trunk",),
    "backend": ("executor",),
    "base_lr": ("lr",),
    "batch_size": ("episodes_per_step", "batch"),
    "bf16": ("precision",),
    "ckpt": ("checkpoint", "weights", "trunk_weights"),
    "classes_per_episode": ("way",),
    "config": ("recipe",),
    "config_file": ("recipe",),
    "crop_size": ("crop", "size"),
    "cuda": ("device",),
    "data": ("shards",),
    "data_dir": ("shards",),
    "data_path": ("shards",),
    "dataset": ("shards",),
    "decay": ("weight_decay",),
    "dump_config": ("print_config",),
    "encoder": ("trunk",),
    "epochs": ("episodes", "epochs"),
    "eval_episodes": ("test_episodes", "episodes"),
    "experiment": ("run", "out"),
    "fp16": ("precision",),
    "freeze_backbone": ("freeze_trunk",),
    "frozen": ("freeze_trunk",),
    "gpu": ("device",),
    "gpus": ("device",),
    "gradient_accumulation": ("episodes_per_step",),
    "image_size": ("crop", "size"),
    "img_size": ("crop", "size"),
    "init_lr": ("lr",),
    "input": ("shards",),
    "iterations": ("episodes", "epochs"),
    "iters": ("episodes", "epochs"),
    "jobs": ("threads",),
    "k_shot": ("shot",),
    "learning_rate": ("lr",),
    "list_recipes": ("recipes",),
    "load": ("weights", "trunk_weights"),
    "log_interval": ("log_every",),
    "logdir": ("run", "out"),
    "lr_decay": ("lr_factors", "lr_factor"),
    "lr_milestones": ("lr_steps", "milestones"),
    "max_epochs": ("episodes", "epochs"),
    "max_steps": ("episodes", "epochs"),
    "metrics": ("out",),
    "milestones": ("lr_steps", "milestones"),
    "mixed_precision": ("precision",),
    "model": ("method",),
    "n_frames": ("frames", "clip_frames"),
    "n_query": ("queries",),
    "n_shot": ("shot",),
    "n_way": ("way",),
    "network": ("trunk",),
    "num_clips": ("clips", "views"),
    "num_episodes": ("episodes",),
    "num_epochs": ("episodes", "epochs"),
    "num_frames": ("frames", "clip_frames"),
    "num_iterations": ("episodes", "epochs"),
    "num_samples": ("episodes",),
    "num_segments": ("frames",),
    "num_test_tasks": ("test_episodes", "episodes"),
    "num_threads": ("threads",),
    "num_train_tasks": ("episodes",),
    "num_workers": ("threads",),
    "out": ("run", "out"),
    "out_dir": ("run", "out"),
    "output": ("run", "out"),
    "output_dir": ("run", "out"),
    "pretrained": ("trunk_weights", "weights"),
    "pretrained_weights": ("trunk_weights", "weights"),
    "print_freq": ("log_every",),
    "query": ("queries",),
    "query_per_class": ("queries",),
    "queue_size": ("queue",),
    "random_seed": ("seed",),
    "rate": ("lr",),
    "resume_from": ("resume",),
    "runs": ("run",),
    "sampling_rate": ("clip_stride", "stride"),
    "save_dir": ("run", "out"),
    "save_every": ("checkpoint_every",),
    "save_freq": ("checkpoint_every",),
    "seq_len": ("frames", "clip_frames"),
    "shots": ("shot",),
    "split_file": ("lists", "split"),
    "steps": ("episodes", "epochs"),
    "tasks_per_batch": ("episodes_per_step",),
    "temp": ("temperature",),
    "text_features": ("class_text",),
    "val_freq": ("val_every",),
    "val_interval": ("val_every",),
    "warmup": ("warmup_lr",),
    "wd": ("weight_decay",),
    "work_dir": ("run", "out"),
    "workers": ("threads",),
}


def nearest(name: str, known: Collection[str]) -> str | None:
    """Find the known name that is meant by another, by its meaning or its spelling.

    "-" and "_" are the same.

    A name of another project counts as the name that it means: "lerning-rate" is "learning_rate",
    hence "lr".
    """
    word = name.strip("-").lower().replace("-", "_")
    meant = {other: found for other, ours in MEANINGS.items() if (found := next((o for o in ours if o in known), None))}
    meant |= {own: own for own in known}
    if word in MEANINGS and word not in meant:
        return None  # the meaning is known, and nothing here has it
    near = [word] if word in meant else difflib.get_close_matches(word, meant, n=1, cutoff=0.6)
    return meant[near[0]] if near else None


def suggest_key(name: str, known: Collection[str]) -> str:
    """Write what an unknown key may mean: `did you mean "lr"?`, or the names that there are."""
    near = nearest(name, known)
    return f'did you mean "{near}"?' if near else suggest(name, known)
