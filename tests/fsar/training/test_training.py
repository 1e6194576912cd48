"""The loop from shards to result: resumption bit for bit, skipped episodes, bad input."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import SMALL, call, words

from fsar.cli.evaluate import cli as evaluate_cli
from fsar.cli.train import cli as train_cli
from fsar.cli.train import resolve
from fsar.run.build import build_model
from fsar.training.trainer import Trainer
from shards_spec import ShardSet
from shards_spec.errors import FsarError


@pytest.fixture(scope="module")
def finished(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run from beginning to end."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert call(train_cli, *words(tiny_path, run), "--shuffle-control", "--prototype-control") == 0
    return run


def test_run_folder_holds_all_that_it_promises(finished: Path, tiny_path: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    assert result["test"]["episodes"] == 4
    assert result["test"]["chance"] == 0.5
    assert set(result["test"]["per_class"]) == {"fox", "gnu"}
    assert result["shuffled_frames"]["queries"] == result["test"]["queries"] == 8
    assert result["frozen_prototypes"]["queries"] == 8
    assert result["coverage"] == {}  # of no published data set
    assert json.loads((finished / "data.json").read_text())["geometry"] == {"height": 64, "width": 64}
    with ShardSet.open(tiny_path) as shards:
        assert result["shards_sha256"] == shards.sha256
    log = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert [r["n"] for r in log if r["kind"] == "train"] == [4, 8, 12, 16]
    assert [r["n"] for r in log if r["kind"] == "val"] == [8, 16]
    assert {"loss", "ce", "recons", "lr", "episodes_per_s", "data_wait", "memory_mb"} <= set(log[0])
    page = (finished / "report.html").read_text()
    assert "fox" in page
    assert f"{result['test']['accuracy']:.1%}" in page
    assert "http" not in page.replace("http-equiv", "")  # self-contained
    assert page.count("<section class=example>") >= 2  # queries with what they were matched with


def test_tensorboard_events_lie_beside_the_log(finished: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = events.EventAccumulator(str(finished / "tensorboard"))
    board.Reload()
    log = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    for record in log:
        values = {event.step: event.value for event in board.Scalars(f"{record['kind']}/accuracy")}
        assert values[record["n"]] == pytest.approx(record["accuracy"])


def test_evaluating_the_run_again_gives_the_same_figures(finished: Path, tiny_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "again.json"
    assert call(evaluate_cli, "--weights", str(finished), "--shards", str(tiny_path), "--out", str(out)) == 0
    again, before = json.loads(out.read_text()), json.loads((finished / "result.json").read_text())
    assert again["test"] == before["test"]
    assert again["weights_sha256"] == before["weights_sha256"]


def test_a_pretrained_trunk_is_evaluated_without_a_run(
    finished: Path, tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trunk, out = tmp_path / "trunk.pth", tmp_path / "result.json"
    config = resolve("synthetic", "molo", str(finished / "config.toml"), None, {})
    torch.save(build_model(config).trunk.state_dict(), trunk)  # the starting weights of the run
    given = [
        "--trunk",
        "tiny",
        "--trunk-weights",
        str(trunk),
        "--shards",
        str(tiny_path),
        "--way",
        "2",
        "--split",
        "val",
    ]
    few = ["--episodes", "4", "--out", str(out)]
    assert call(evaluate_cli, "--method", "prototype", *given, *few) == 0
    result = json.loads(out.read_text())
    assert (result["method"], result["test"]["episodes"], result["split"]) == ("prototype", 4, "val")
    assert call(evaluate_cli, "--weights", str(finished), *given[4:], "--prototype-control", *few) == 0
    assert "frozen_prototypes" in json.loads(out.read_text())
    capsys.readouterr()
    for words_, sentence in (
        (["--method", "molo", *given], "molo has weights beyond its trunk"),
        (["--shards", str(tiny_path)], "or --method prototype with --trunk"),
        (["--method", "prototype", *given[:2], *given[4:]], "starts from pretrained weights"),
        (["--weights", str(finished), "--method", "prototype", *given[4:]], "are those of the run"),
    ):
        assert call(evaluate_cli, *words_) == 2
        assert sentence in capsys.readouterr().err


def test_killed_at_any_moment_it_resumes_bit_for_bit(finished: Path, tiny_path: Path, tmp_path: Path) -> None:
    run = tmp_path / "killed"
    command = [sys.executable, "-m", "fsar.cli.train", *words(tiny_path, run)]
    generator, kills = random.Random(4), 0
    for _ in range(40):
        resume = ["--resume"] if (run / "checkpoints" / "last.safetensors").exists() else []
        process = subprocess.Popen([*command, *resume], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        killer = kills < 3
        if killer:  # from the first checkpoint on, at a random moment
            seen = (run / "checkpoints" / "last.safetensors").stat().st_mtime_ns if resume else 0
            while process.poll() is None and _mtime(run) <= seen:
                time.sleep(0.01)
            time.sleep(generator.random() * 0.5)
            process.send_signal(signal.SIGKILL)
            kills += 1
        _, errors = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors.decode()
    assert (run / "result.json").exists()
    assert kills
    for name in ("last", "best"):
        ours, theirs = (load_file(r / "checkpoints" / f"{name}.safetensors") for r in (run, finished))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert _losses(run) == _losses(finished)


def _mtime(run: Path) -> int:
    path = run / "checkpoints" / "last.safetensors"
    return path.stat().st_mtime_ns if path.exists() else 0


def _losses(run: Path) -> list[tuple]:
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(r["kind"], r["n"], r["accuracy"]) for r in log]


def test_an_episode_without_finite_loss_is_skipped_alone(tiny_shards: ShardSet, tmp_path: Path) -> None:
    """With episode 1 poisoned, the step of episodes 0 and 1 is that of episode 0."""
    config = resolve("synthetic", "molo", "demo", None, SMALL | {"num_classes": 3})
    gradients = []
    for poison in (True, False):
        with Trainer(config, tiny_shards, tmp_path / str(poison), device=torch.device("cpu")) as trainer:
            trainer.model.train()
            for plan, episode, _ in trainer.train_episodes.planned(0, 2 if poison else 1):
                if plan.n == 1:
                    episode.query[0, 0, 0, 0, 0] = float("nan")
                trainer.step.update = lambda *_: None
                before = [buffer.clone() for buffer in trainer.model.buffers()]
                trainer.train_step(plan.n, episode)
                if plan.n == 1:  # not even the running statistics
                    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.buffers(), strict=True))
            gradients.append([p.grad.clone() for p in trainer.model.parameters() if p.grad is not None])
            trainer.progress.add(trainer.read())
            assert trainer.progress.skipped == int(poison)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_loss_that_is_never_finite_ends_the_run(tiny_shards: ShardSet, tmp_path: Path) -> None:
    config = resolve("synthetic", "molo", "demo", None, SMALL | {"num_classes": 3, "episodes": 64})
    with Trainer(config, tiny_shards, tmp_path, device=torch.device("cpu")) as trainer:
        torch.nn.init.constant_(trainer.model.class_token, float("nan"))
        with pytest.raises(FsarError, match="not finite; lower --lr"):
            trainer.train()


def test_random_weights_depend_on_the_seed_alone() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.randn(random.randrange(1, 9))  # whatever was drawn before
        config = resolve("synthetic", "molo", "demo", None, {"seed": seed, "num_classes": 3})
        return torch.cat([p.flatten() for p in build_model(config).parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_bfloat16_trains(tiny_path: Path, tmp_path: Path) -> None:
    assert call(train_cli, *words(tiny_path, tmp_path / "bf16", precision="bf16", episodes=8)) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_trains_on_a_gpu(tiny_path: Path, tmp_path: Path) -> None:
    changes = {"device": "cuda", "executor": "auto", "precision": "bf16", "episodes": 8}
    assert call(train_cli, *words(tiny_path, tmp_path / "gpu", **changes)) == 0


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (["--method", "mola"], 'did you mean "molo"'),
        (["--recipe", "demos"], 'did you mean "demo"'),
        (["--lrr", "1"], "has no option --lrr; did you mean --lr?"),
        (["--lr", "fast"], "expected a number"),
        (["--device", "abacus"], "not to be had here"),
        (["--way", "4"], "has 3 classes and a 4-way episode needs"),
        (["--shot", "4", "--queries", "2"], "has 5 videos and an episode needs 6"),
        (["--trunk", "resnet5"], "did you mean"),
        (["--trunk", "resnet18", "--trunk-weights", "nowhere.pth"], "there is no such file"),
        (["--trunk", "resnet18", "--trunk-weights", ""], "pretrained weights"),
        (["--resume"], "holds no run"),
        (["--crop", "80"], "larger than resize"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], sentence: str
) -> None:
    assert call(train_cli, *words(tiny_path, tmp_path / "run"), *extra) == 2
    errors = capsys.readouterr().err
    assert sentence in errors
    assert "Traceback" not in errors


def test_resuming_takes_the_configuration_from_the_run_folder(tiny_path: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert call(train_cli, *words(tiny_path, run)) == 0
    before = (run / "result.json").read_bytes()
    assert call(train_cli, "--shards", str(tiny_path), "--run", str(run), "--resume") == 0
    assert (run / "result.json").read_bytes() == before


def test_no_space_for_a_checkpoint_is_one_sentence_and_the_last_one_stays(tiny_path: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert call(train_cli, *words(tiny_path, run, episodes=8)) == 0
    before = (run / "checkpoints" / "last.safetensors").read_bytes()
    limit = f"ulimit -f {len(before) // 2048}; exec {sys.executable} -m fsar.cli.train"  # half a checkpoint
    pairs = words(tiny_path, tmp_path / "full", episodes=8)
    done = subprocess.run(["bash", "-c", f'{limit} "$@"', "bash", *pairs], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "cannot write" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "full" / "checkpoints").glob("*.safetensors"))


def test_resuming_with_other_options_or_over_a_run_is_refused(
    finished: Path, tiny_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(train_cli, *words(tiny_path, finished, lr=0.5), "--resume") == 2
    assert "lr was 0.001, asked for 0.5" in capsys.readouterr().err
    assert call(train_cli, *words(tiny_path, finished)) == 2
    assert "holds a run already" in capsys.readouterr().err


def test_damaged_and_pickled_weights_are_refused(tiny_path: Path, tmp_path: Path, capsys) -> None:
    class Payload:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/executed",))

    torch.save({"conv1.weight": Payload()}, tmp_path / "evil.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    for name, sentence in (("evil.pth", "never run"), ("cut.safetensors", "cannot be read as weights")):
        extra = ["--trunk", "resnet18", "--trunk-weights", str(tmp_path / name)]
        assert call(train_cli, *words(tiny_path, tmp_path / "run"), *extra) == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()
    assert call(evaluate_cli, "--weights", str(tmp_path), "--shards", str(tiny_path)) == 2
    assert "no run folder" in capsys.readouterr().err
