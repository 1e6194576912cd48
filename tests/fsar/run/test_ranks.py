"""Several processes compute the run of one: training, evaluation, pre-training; and they end together."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import click
import pytest
import torch
from processes import Command, free_port, stop_server, together
from safetensors.torch import load_file

from fsar.checkpoints import TrainingRecord, weights_sha256
from fsar.cli import launch as launching
from fsar.pretraining import Views
from fsar.pretraining.batches import ViewLoader
from fsar.pretraining.config import PretrainConfig, build_pretrain_config, read_pretrain_recipe
from fsar.pretraining.trainer import Pretrainer, build_pretraining
from fsar.run import ranks
from fsar.run.device import choose_device
from shards_spec import ShardSet
from shards_spec.cli.console import INTERRUPTED
from shards_spec.errors import ConfigError

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[3]
SMALL = {
    "way": 2, "test_way": 2, "queries": 1, "episodes": 16, "episodes_per_step": 4, "val_every": 8, "val_episodes": 5,
    "test_episodes": 7, "checkpoint_every": 4, "log_every": 4, "resize": 64, "crop": 32, "random_crop": True,
    "threads": 1, "executor": "portable", "device": "cpu",
}  # fmt: skip
MORTAL = """
import os, signal
from fsar.methods import find_method
from shards_spec.errors import FsarError

class Mortal(find_method("molo")):
    '''Ends in the middle of a run, where the environment says so.'''
    calls = 0
    def forward(self, episode):
        Mortal.calls += self.training
        how = os.environ.get("END") if os.environ.get("RANK") == "1" and Mortal.calls == 7 else None
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "raise":
            raise FsarError("the sky has fallen")
        return super().forward(episode)
"""


def words(shards: Path, run: str, **changes) -> list[str]:
    """The words after `fsar-train` for a small run."""
    pairs = [
        (f"--{k.replace('_', '-')}", str(v).lower() if isinstance(v, bool) else str(v))
        for k, v in (SMALL | changes).items()
    ]
    return ["--shards", str(shards), "--recipe", "demo", "--run", run, *(w for pair in pairs for w in pair)]


def train(*words: str) -> Command:
    return Command("fsar.cli.train", words)


def records(run: Path) -> list[dict]:
    """What a log says that depends on neither time nor memory."""
    kept = ("kind", "n", "loss", "ce", "accuracy", "lr", "skipped")
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: record[key] for key in kept if key in record} for record in log]


def check_same_run(run: Path, other: Path) -> None:
    """Losses and weights to rounding, accuracies exactly."""
    for one, two in zip(records(run), records(other), strict=True):
        assert one.pop("kind") == two.pop("kind")
        assert one == pytest.approx(two, rel=1e-4)
    results = [json.loads((path / "result.json").read_text()) for path in (run, other)]
    assert results[0]["test"] == results[1]["test"]
    one, two = (load_file(path / "checkpoints" / "last.safetensors") for path in (run, other))
    assert one.keys() == two.keys()
    for key in one:  # statistics of BatchNorm among them
        # a mean of gradients keeps the rounding of the largest of them
        share = 0.02 * float(two[key].float().abs().max()) if "exp_avg" in key else 0
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=max(2e-4, share), msg=key)


@pytest.fixture(scope="module")
def folder(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where all runs lie, and a method that can be told to end."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "mortal.py").write_text(MORTAL)
    stop_server()  # that of preprocessing has no torch
    yield folder
    stop_server()


@pytest.fixture(scope="module")
def mortal(tiny_path: Path) -> partial:
    """Words of a run of that method, tested on random frames."""
    return partial(words, tiny_path, method="mortal:Mortal", recipe_style="reference")


@pytest.fixture(scope="module")
def alone(folder: Path, mortal: partial) -> Path:
    """That run by one process."""
    (left,) = together(train(*mortal("alone")), 1, folder)
    assert left.code == 0, left.err
    return folder / "alone"


def test_killed_with_two_processes_and_resumed_with_four_it_is_the_run_of_one(
    alone: Path, folder: Path, mortal: partial
) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "END": "kill", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, str(free_port()), "-m", "--", "fsar.cli.train", *mortal("killed")],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr
    run = folder / "killed"
    logged = [record["n"] for record in records(run)]
    assert logged == [4, 8, 8, 12][: len(logged)]  # the other one may have been ended as it wrote the last
    assert len(logged) > 2
    assert not (run / "result.json").exists()
    left = together(train(*mortal("killed"), "--resume"), 4, folder)
    assert [one.code for one in left] == [0] * 4, left[0].err
    assert re.search("resumed after (8|12) of 16", left[0].out)
    assert [one.out + one.err for one in left[1:]] == [""] * 3  # the first one speaks
    check_same_run(run, alone)
    assert json.loads((run / "result.json").read_text())["processes"] == 4


def test_an_error_of_one_process_ends_all_and_is_said_once(folder: Path, mortal: partial) -> None:
    left = together(train(*mortal("raised")), 2, folder, END="raise")
    assert [one.code for one in left] == [2, 2]
    said = [line for one in left for line in one.err.splitlines() if "error" in line]
    assert said == ["error: the sky has fallen"]
    assert not (folder / "raised" / "result.json").exists()
    left = together(train(*mortal("uneven")), 3, folder)
    assert [one.code for one in left] == [2] * 3
    errors = "".join(one.err for one in left)
    assert errors.count("episodes_per_step = 4 has no equal parts for 3 processes") == 1
    assert "Traceback" not in errors


def test_a_frozen_trunk_and_its_features(tiny_path: Path, folder: Path) -> None:
    """Each process makes some of the parts."""
    for count, run in ((1, "frozen"), (2, "frozen-by-two")):
        given = words(tiny_path, run, freeze_trunk=True, cached_views=4, episodes=8)
        left = together(train(*given), count, folder)
        assert [one.code for one in left] == [0] * count, left[0].err
    check_same_run(folder / "frozen-by-two", folder / "frozen")
    features = [sorted((folder / run).glob("features/*/part-*/*/c/**/0")) for run in ("frozen", "frozen-by-two")]
    features = [[path for path in paths if path.is_file()] for paths in features]
    assert len(features[0]) > 2
    assert [path.read_bytes() for path in features[0]] == [path.read_bytes() for path in features[1]]


def test_evaluation_is_shared_out(alone: Path, tiny_path: Path, folder: Path) -> None:
    """Of whole episodes, of embedded videos, and from a table of pairs; the first process keeps what all embed."""
    base = ["--weights", "alone", "--shards", str(tiny_path)]
    left = together(Command("fsar.cli.evaluate", [*base, "--out", "whole.json"]), 2, folder)
    assert [one.code for one in left] == [0, 0], left[0].err
    before, again = (json.loads((folder / name).read_text()) for name in ("alone/result.json", "whole.json"))
    assert again["test"] == before["test"]
    many = [*base, "--views", "2", "--episodes", "200", "--prototype-control"]
    for count in (1, 3):
        files = ["--embeddings", f"{count}.zarr", "--episodes-file", f"{count}.jsonl", "--out", f"{count}.json"]
        left = together(Command("fsar.cli.evaluate", [*many, *files]), count, folder)
        assert [one.code for one in left] == [0] * count, left[0].err
    one, three = (json.loads((folder / f"{count}.json").read_text()) for count in (1, 3))
    assert one == three
    assert one["frozen_prototypes"]["queries"] == 400
    for path in (folder / "1.zarr").rglob("*"):
        if path.is_file():
            assert (folder / "3.zarr" / path.relative_to(folder / "1.zarr")).read_bytes() == path.read_bytes()


def test_evaluation_of_two_streams_is_shared_out(tiny_path: Path, folder: Path) -> None:
    """Each episode's share of motion is found by the process that has the episode."""
    model = ["--method", "prototype", "--trunk", "tiny", "--trunk-weights", "random", "--shards", str(tiny_path)]
    asked = ["--way", "2", "--shot", "2", "--groups", "any", "--episodes", "7", "--streams", "both"]
    asked += [
        "--stream-weight",
        "support",
        "--option",
        "resize=64",
        "--option",
        "crop=64",
        "--no-motion-control",
        "--out",
    ]
    for count in (1, 2):
        left = together(Command("fsar.cli.evaluate", [*model, *asked, f"streams-{count}.json"]), count, folder)
        assert [one.code for one in left] == [0] * count, left[0].err
    one, two = (json.loads((folder / f"streams-{count}.json").read_text()) for count in (1, 2))
    assert one == two
    assert 0 < one["share_of_motion"] < 1


def test_an_interrupt_that_another_has_told_of_is_not_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "join", object)
    monkeypatch.setattr(launching, "_first_to_say", lambda *_: False)
    with pytest.raises(SystemExit) as leave, launching._joined():
        raise click.Abort  # what click makes of KeyboardInterrupt
    assert leave.value.code == INTERRUPTED


class Shares:
    """Random batches of eight videos, of which each process takes its part; not finite at the steps `poisoned`."""

    epoch_steps = 4

    def __init__(self, poisoned: tuple[int, ...] = ()) -> None:
        self.poisoned = poisoned

    def batches(self, start: int, stop: int, *, trunk: object) -> Iterator[tuple[Views, float]]:
        del trunk
        for n in range(start, stop):
            clips = torch.rand(2, 8, 3, 4, 16, 16, generator=torch.Generator().manual_seed(n))
            if n in self.poisoned:
                clips[0, -1] = torch.nan  # of the last process
            own = ranks.share(8)
            yield Views(*clips[:, own.start : own.stop]), 0.0


def trainer_of(run: Path, *, norms: bool = True, resume: bool = False, **views) -> Pretrainer:
    changes = {
        "batch": 8,
        "epochs": 1,
        "queue": 16,
        "clip_frames": 4,
        "crop": 16,
        "checkpoint_every": 1,
        "log_every": 1,
    }
    config = build_pretrain_config(read_pretrain_recipe("moco-tiny") | changes | {"device": "cpu"})
    model = build_pretraining(config, samples=32)
    if not norms:
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, torch.nn.BatchNorm3d):
                    setattr(module, name, torch.nn.Identity())
    nothing = torch.zeros(0, dtype=torch.int64)
    return Pretrainer(config, model, Shares(**views), run, trained_on=TrainingRecord(nothing, nothing), resume=resume)


def contrast_in_a_group() -> None:
    """What each process does in the test below."""
    ranks.join()
    trainer_of(Path("plain"), norms=False).train()
    whole = trainer_of(Path("whole"), poisoned=(1,))
    whole.train()
    part = trainer_of(Path("part"), poisoned=(1,))
    part.steps = 2
    part.train()
    ranks.wait_for_all()
    rest = trainer_of(Path("part"), resume=True)
    rest.train()
    hashes = ranks.gather_values([weights_sha256(trainer.model) for trainer in (whole, rest)])
    assert len({value for both in hashes for value in both}) == 1
    assert whole.progress.skipped == rest.progress.skipped == 1
    with ShardSet.open(os.environ["SHARDS"]) as shards, ViewLoader(views_config(), shards, device=CPU) as views:
        ((batch, _),) = views.batches(5, 6, trunk=whole.model.encoder)
        both = ranks.gather(batch.query)
    if ranks.is_first():
        torch.save(both, "query.pt")
    ranks.leave()


def views_config() -> PretrainConfig:
    changes = {"batch": 6, "queue": 8, "clip_frames": 4, "crop": 32, "threads": 1, "device": "cpu"}
    return build_pretrain_config(read_pretrain_recipe("moco-tiny") | changes)


def test_pretraining_shares_out_every_batch(tiny_path: Path, folder: Path) -> None:
    """Without BatchNorm it is the run of one process; with it all have the same weights, resumed bit for bit."""
    left = together(contrast_in_a_group, 2, folder, SHARDS=str(tiny_path))
    assert [one.code for one in left] == [0, 0], left[0].err + left[1].err
    alone = trainer_of(folder / "alone-plain", norms=False)
    alone.train()
    ours, theirs = (load_file(folder / run / "checkpoints/last.safetensors") for run in ("plain", "alone-plain"))
    for key in ours:  # the queue and its pointer among them
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-5, msg=key)
    assert ours["model.queue_ptr"].item() == 0
    for one, two in zip(records(folder / "plain"), records(folder / "alone-plain"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
    with ShardSet.open(tiny_path) as shards, ViewLoader(views_config(), shards, device=CPU) as views:
        ((batch, _),) = views.batches(5, 6, trunk=alone.model.encoder)
    assert torch.equal(torch.load(folder / "query.pt"), batch.query)


def test_the_command_pretrains_in_two_processes(tiny_path: Path, folder: Path) -> None:
    small = {"batch": 4, "epochs": 1, "queue": 8, "clip-frames": 4, "crop": 32, "log-every": 1}
    few = [word for key, value in small.items() for word in (f"--{key}", str(value))]
    words = ["--shards", str(tiny_path), "--recipe", "moco-tiny", "--out", "contrast", "--device", "cpu", *few]
    left = together(Command("fsar.cli.pretrain", words), 2, folder)
    assert [one.code for one in left] == [0, 0], left[0].err
    assert left[1].out + left[1].err == ""
    assert "2 processes" in left[0].out
    assert len(records(folder / "contrast")) == json.loads((folder / "contrast/result.json").read_text())["steps"]


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_every_process_needs_a_gpu_of_its_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ConfigError, match="1 GPUs on this machine do not fit"):
        choose_device(name)
