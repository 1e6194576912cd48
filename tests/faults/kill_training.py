"""Train again and again, killed at random moments; compare each run with an undisturbed one.

    python kill_training.py SHARDS FOLDER KILLS STREAMS

Torch is imported once, and no thread of it has run when the process forks.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from fsar.cli.train import resolve
from fsar.run import folder as log
from fsar.run.folder import last_checkpoint
from fsar.training.trainer import Trainer
from shards_spec import ShardSet

SMALL = {
    "way": 2, "test_way": 2, "queries": 1, "episodes": 24, "episodes_per_step": 2, "val_every": 8, "val_episodes": 2,
    "checkpoint_every": 4, "log_every": 1, "resize": 64, "crop": 32, "random_crop": True, "threads": 1,
    "executor": "portable", "num_classes": 3,
}  # fmt: skip


def train(shards: Path, run: Path, streams: str) -> None:
    """Train from the last checkpoint to the end; the videos of each episode are noted first."""
    torch.set_num_threads(1)
    with ShardSet.open(shards) as opened:
        config = resolve("synthetic", "molo", "demo", None, SMALL | {"streams": streams})
        resume = last_checkpoint(run).exists()
        with Trainer(config, opened, run, device=torch.device("cpu"), resume=resume) as trainer:
            planned = trainer.train_episodes.planned

            def watched(*args, **options):
                for plan, episode, wait in planned(*args, **options):
                    with (run / "episodes").open("a") as file:
                        file.write(f"{plan.n} {plan.support} {plan.query}\n")
                    yield plan, episode, wait

            trainer.train_episodes.planned = watched
            trainer.train()


def forked(shards: Path, run: Path, streams: str, *, seconds: float | None = None) -> bool:
    """Train in a process that is killed after some seconds; tell whether it was."""
    child = os.fork()
    if not child:
        code = 1
        try:
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, 1)
            if seconds is not None:
                os.dup2(sink, 2)
            train(shards, run, streams)
            code = 0
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in {0, -signal.SIGKILL}, f"training failed with {code}"
    return code != 0


def results_of(run: Path) -> tuple:
    """Return all losses, the bytes of weights and optimisers, and the videos of each episode."""
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    losses = [(r["kind"], r["n"], r.get("loss"), r.get("accuracy")) for r in log]
    episodes = sorted({line for line in (run / "episodes").read_text().splitlines(keepends=True) if line[-1] == "\n"})
    checkpoints = [tensor_bytes(run / "checkpoints" / f"{name}.safetensors") for name in ("last", "best")]
    return losses, episodes, checkpoints


def tensor_bytes(path: Path) -> bytes:
    """Return the bytes after the header, which holds a time."""
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def main(shards: Path, folder: Path, kills: int, streams: str) -> None:
    log._open_board = lambda *_: None  # TensorBoard's import takes seconds, and its events decide nothing
    began = time.monotonic()
    forked(shards, folder / "whole", streams)
    seconds, expected = time.monotonic() - began, results_of(folder / "whole")
    draw, done, runs = random.Random(3), 0, 0
    while done < kills:
        run = folder / "killed"
        while forked(shards, run, streams, seconds=None if done >= kills else draw.uniform(0.1, 1) * seconds):
            done += 1
        assert results_of(run) == expected, f"run {runs} differs after {done} kills"
        runs += 1
        shutil.rmtree(run)
    print(f"{done} of {kills} kills: the same losses, weights and episodes, bit for bit, in {runs} of {runs} runs")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
