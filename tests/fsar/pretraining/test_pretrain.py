"""Pre-training from shards to a trunk: resumption, the optimiser, recipes, bad input."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from small_runs import SMALL_PRETRAINING, small_config

from fsar.checkpoints import TrainingRecord, load_state, load_training_record
from fsar.cli.evaluate import cli as eval_cli
from fsar.cli.pretrain import cli
from fsar.cli.train import cli as train_cli
from fsar.cli.weights import model_of_run
from fsar.evaluation.overlap import find_overlap
from fsar.pretraining import MotionViews, Output, PairedViews, PretrainingMethod, Views
from fsar.pretraining.batches import ViewLoader
from fsar.pretraining.trainer import Pretrainer, build_pretraining, pretraining_step
from fsar.training.optim import create_sgd
from fsar.trunks import create_trunk
from shards_spec import ShardSet
from shards_spec.cli.console import run_command
from shards_spec.errors import ConfigError, FsarError

NOTHING = TrainingRecord(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))


def random_batch(method: str, n: int):
    """A batch of four videos as the method reads it, of step n."""
    generator = torch.Generator().manual_seed(n)

    def clips(frames: int, size: int = 32) -> torch.Tensor:
        return torch.rand(4, 3, frames, size, size, generator=generator)

    if method == "moco":
        return Views(clips(4), clips(4))
    if method == "mscl":
        return PairedViews(*(clips(4, 16) for _ in range(4)))  # two fields of each half
    corners = torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 4)
    first, second = (tuple(clips(16) for _ in range(3)) for _ in range(2))
    return MotionViews((clips(16), clips(16)), (first, second), (corners, corners))


class RandomViews:
    """Three steps an epoch, killed before step `end`; steps `poisoned` hold no finite value."""

    epoch_steps = 3

    def __init__(self, method: str, *, end: int | None = None, poisoned: tuple[int, ...] = ()) -> None:
        self.method, self.end, self.poisoned = method, end, poisoned

    def batches(self, start: int, stop: int, *, trunk) -> Iterator[tuple[object, float]]:
        del trunk
        for n in range(start, stop):
            if n == self.end:
                raise KeyboardInterrupt
            batch = random_batch(self.method, n)
            if n in self.poisoned:
                (batch.rgb[0] if self.method == "fima" else batch.query).fill_(math.nan)
            yield batch, 0.0


def trainer_of(method: str, run: Path, *, resume: bool = False, config=None, **views) -> Pretrainer:
    config = config or small_config(method)
    model = build_pretraining(config, samples=config.epochs * 12)
    return Pretrainer(config, model, RandomViews(method, **views), run, trained_on=NOTHING, resume=resume)


def call(command, *words: str) -> int:
    """Run a command in this process; its exit code."""
    argv, sys.argv = sys.argv, ["command", *words]
    try:
        with pytest.raises(SystemExit) as leave:
            run_command(command)
        return int(leave.value.code or 0)
    finally:
        sys.argv = argv


def words(shards: Path, run: Path, method: str = "moco", **changes) -> list[str]:
    """The words after `fsar-pretrain` for a small run."""
    pairs = [(f"--{k.replace('_', '-')}", str(v).lower()) for k, v in (SMALL_PRETRAINING[method] | changes).items()]
    recipe = ["--recipe", f"{method}-tiny", "--method", method]
    return ["--shards", str(shards), *recipe, "--out", str(run), *(w for pair in pairs for w in pair)]


@pytest.fixture(scope="module")
def finished(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run from beginning to end."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert call(cli, *words(tiny_path, run)) == 0
    return run


def test_run_folder_holds_all_that_it_promises(finished: Path, tiny_path: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    with ShardSet.open(tiny_path) as shards:
        assert result["shards_sha256"] == shards.sha256
        rows = shards.split_rows("train")
        assert result["videos"] + result["videos_too_short"] == len(rows)
        seen = load_training_record(finished / "checkpoints" / "last.safetensors")
        assert find_overlap(seen, shards, rows).videos == result["videos"]
        assert not find_overlap(seen, shards, shards.split_rows("test")).found
    steps = result["steps"]
    assert steps == 2 * (result["videos"] // 4)
    log = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert [record["n"] for record in log] == list(range(2, steps + 1, 2))
    assert {"loss", "moco", "accuracy_moco", "lr", "samples_per_s", "data_wait", "epoch"} <= set(log[0])
    page = (finished / "report.html").read_text()
    assert "accuracy of moco" in page
    assert "http" not in page  # self-contained


@pytest.mark.parametrize("method", ["moco", "fima", "mscl"])
def test_a_killed_run_goes_on_bit_for_bit(method: str, tmp_path: Path) -> None:
    """Weights of both sides, queues, the momentum clock, statistics, and the optimiser's state."""
    trainer_of(method, tmp_path / "whole").train()
    with pytest.raises(KeyboardInterrupt):
        trainer_of(method, tmp_path / "killed", end=3).train()
    resumed = trainer_of(method, tmp_path / "killed", resume=True)
    assert resumed.progress.n == 2
    resumed.train()
    whole, again = (load_file(tmp_path / run / "checkpoints" / "last.safetensors") for run in ("whole", "killed"))
    assert whole.keys() == again.keys()
    assert {"model.queue", "model.recognizer.queue"} & whole.keys()
    assert any(name.startswith("optimizer.") for name in whole)
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    logs = [
        [{k: v for k, v in json.loads(line).items() if k in ("n", "loss", "lr")} for line in path.open()]
        for path in (tmp_path / run / "log.jsonl" for run in ("whole", "killed"))
    ]
    assert logs[0] == logs[1]
    if method == "mscl":  # its momentum has risen to 1 when the run ends
        learner = resumed.model.recognizer
        assert learner.iters.item() == learner.total == 2 * 3 * 4


def test_resuming_from_shards_gives_the_same_weights(finished: Path, tiny_path: Path, tmp_path: Path) -> None:
    """The views of step n are a function of (seed, n) too."""
    config = small_config("moco")
    with ShardSet.open(tiny_path) as shards, ViewLoader(config, shards, device=torch.device("cpu")) as views:
        for part in (False, True):
            model = build_pretraining(config, samples=1)
            trainer = Pretrainer(config, model, views, tmp_path, trained_on=NOTHING, resume=part)
            trainer.steps = trainer.steps if part else 2
            trainer.train()
    again = build_pretraining(config, samples=1)
    load_state(finished / "checkpoints" / "last.safetensors", again)
    expected = again.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


class Line(PretrainingMethod):
    """A loss whose gradient is large, with a weight that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.norm = torch.nn.Linear(6, 3), torch.nn.LayerNorm(3)
        self.frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, batch: torch.Tensor) -> Output:
        loss = (self.norm(self.line(batch)) + self.line(batch) - 9).square().mean()
        return Output(loss, {"line": loss})


def test_a_step_is_sgd_with_decay_on_all_and_clipping() -> None:
    """Against torch's plain SGD and its clipping."""
    models = []
    for ours in (True, False):
        torch.manual_seed(0)
        models.append(Line())
        trained = [p for p in models[-1].parameters() if p.requires_grad]
        options = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.1}
        optimizer = create_sgd(models[-1], **options) if ours else torch.optim.SGD(trained, **options)
        step = pretraining_step(models[-1])
        for n in range(4):
            batch = torch.randn(5, 6, generator=torch.Generator().manual_seed(n))
            if ours:
                step(batch, seed=n)
                step.update(optimizer, 0.3, clip_norm=0.5)
                continue
            optimizer.zero_grad()
            models[-1](batch).loss.backward()
            assert torch.nn.utils.clip_grad_norm_(trained, 0.5) > 0.5
            optimizer.step()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_the_rate_falls_once_an_epoch(tmp_path: Path) -> None:
    trainer = trainer_of("moco", tmp_path, config=small_config("moco", epochs=4, lr=0.2))
    expected = [0.1 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4) for _ in range(3)]
    assert [trainer.rate(n) for n in range(12)] == pytest.approx(expected)


@pytest.mark.parametrize("method", ["moco", "fima"])
def test_a_step_without_finite_loss_changes_no_weight_and_no_buffer(method: str, tmp_path: Path) -> None:
    """The very first one too, when the optimiser has no momentum yet."""
    trainer = trainer_of(method, tmp_path, poisoned=(0,))
    trainer.model.train()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    batches = trainer.views.batches(0, 2, trunk=None)
    trainer.train_step(0, next(batches)[0])
    after = trainer.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    trainer.train_step(1, next(batches)[0])
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert not torch.equal(before["encoder_q.layer4.0.weight"], trainer.model.encoder.layer4[0].weight)
    assert trainer.step.read().skipped == 1


def test_a_loss_that_is_never_finite_ends_the_run(tmp_path: Path) -> None:
    trainer = trainer_of("moco", tmp_path, config=small_config("moco", epochs=8), poisoned=tuple(range(24)))
    with pytest.raises(FsarError, match="not finite; lower --lr"):
        trainer.train()


def test_computing_inner_values_twice_changes_no_weight(tmp_path: Path) -> None:
    trained = []
    for twice in (False, True):
        config = small_config("moco", checkpoint_activations=twice, epochs=1)
        trainer = trainer_of("moco", tmp_path / str(twice), config=config)
        assert bool(trainer.model.encoder.recomputes) == twice
        trainer.train()
        trained.append(trainer.model.state_dict())
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())


def test_bf16_keeps_weights_and_loss_in_float32(tmp_path: Path) -> None:
    trainer = trainer_of("moco", tmp_path, config=small_config("moco", precision="bf16", epochs=1))
    trainer.train()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert all(p.isfinite().all() for p in trainer.model.parameters())


@pytest.mark.parametrize("method", ["fima", "mscl"])
def test_views_of_shards_train(method: str, tiny_path: Path) -> None:
    """A method reads the loader's batches; videos too short for a window are counted."""
    config = small_config(method)
    model = build_pretraining(config, samples=8).train()
    with ShardSet.open(tiny_path) as shards, ViewLoader(config, shards, device=torch.device("cpu")) as views:
        (batch, _), *_ = views.batches(0, 1, trunk=model.encoder)
        short = int((shards.frames[shards.split_rows("train")] < 20).sum())
    assert views.skipped == (short if method == "fima" else 0)
    assert short > 0
    output = model(batch)
    assert output.loss.isfinite()
    assert (output.accuracy.keys() | output.losses.keys()) > {"local" if method == "fima" else "loss_pos"}


def test_all_videos_are_seen_with_split_all(tiny_path: Path, tmp_path: Path) -> None:
    assert call(cli, *words(tiny_path, tmp_path / "run", split="all", epochs=1, clip_stride=1)) == 0
    with ShardSet.open(tiny_path) as shards:
        overlap = find_overlap(
            load_training_record(tmp_path / "run/checkpoints/last.safetensors"), shards, shards.split_rows("test")
        )
    assert overlap.videos == 10
    assert set(overlap.classes) == {"fox", "gnu"}


def test_training_starts_from_the_trunk_of_a_run_and_says_what_it_saw(
    finished: Path, tiny_path: Path, tmp_path: Path
) -> None:
    everything = tmp_path / "all"
    assert call(cli, *words(tiny_path, everything, split="all", epochs=1, clip_stride=1)) == 0
    few = "--way 2 --test-way 2 --queries 1 --episodes 4 --val-every 4 --val-episodes 2 --test-episodes 2 --frames 2"
    clips = "--frame-rule segment_clips --clip-frames 4 --resize 64 --crop 32 --threads 1 --device cpu --shot 1"
    base = ["--shards", str(tiny_path), "--recipe", "demo-prototype", "--trunk", "tiny3d", *few.split(), *clips.split()]
    for source, status in ((finished, "none"), (everything, "overlaps")):
        run = tmp_path / f"from-{source.name}"
        assert call(train_cli, *base, "--trunk-weights", str(source), "--run", str(run)) == 0
        assert json.loads((run / "result.json").read_text())["overlap"]["status"] == status
    assert call(train_cli, *base, "--trunk-weights", str(tmp_path), "--run", str(tmp_path / "none")) == 2


def test_prototypes_stand_on_the_trunk_of_a_run(finished: Path, tiny_path: Path, tmp_path: Path, capsys) -> None:
    asked = ["--way", "2", "--shot", "1", "--queries", "1", "--episodes", "3", "--device", "cpu", "--groups", "any"]
    out = tmp_path / "result.json"
    given = ["--shards", str(tiny_path), *asked, "--out", str(out)]
    assert call(eval_cli, "--weights", str(finished), "--method", "prototype", *given) == 0
    result = json.loads(out.read_text())
    assert result["overlap"]["status"] == "none"  # of the test's classes, which the run says it has not seen
    assert call(eval_cli, "--weights", str(finished), "--method", "otam", *given) == 2
    assert "those of the run" in capsys.readouterr().err
    assert call(eval_cli, "--weights", str(finished), "--checkpoint", "best", *given) == 2
    assert "keeps only the last" in capsys.readouterr().err
    for tested in ("--weights", "--compare"):
        assert call(eval_cli, tested, str(finished), "--prototype-control", *given) == 2
        assert "is a trunk alone; give --trunk-weights random" in capsys.readouterr().err
    untrained = ["--prototype-control", "--trunk-weights", "random"]
    assert call(eval_cli, "--weights", str(finished), *untrained, *given) == 0
    assert json.loads(out.read_text()).keys() - result.keys() == {"frozen_prototypes"}
    config = model_of_run(finished).config
    assert (config.method, config.trunk, config.frame_rule) == ("prototype", "tiny3d", "segment_clips")
    assert (config.clip_frames, config.clip_stride, config.crop, config.resize) == (4, 2, 32, 37)


@pytest.mark.parametrize(
    ("method", "off", "terms"),
    [
        ("fima", "dense", {"dense"}),
        ("fima", "local", {"local"}),
        ("mscl", "local", {"loss_pos"}),
        ("mscl", "cross", {f"loss_cls_mx{back}{turned}" for back in ("", "_r") for turned in ("", "_aug")}),
    ],
)
def test_a_term_that_weighs_nothing_is_left_out(method: str, off: str, terms: set[str]) -> None:
    weights = {"fima": {"dense_weight": 1.0, "local_weight": 1.0}, "mscl": {}}[method] | {f"{off}_weight": 0.0}
    model = build_pretraining(small_config(method, **weights), samples=8)
    output = model(random_batch(method, 0))
    assert terms < output.losses.keys()  # it is still told
    kept = sum(value for name, value in output.losses.items() if name not in terms)
    torch.testing.assert_close(output.loss, kept)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"queue": 100}, "longer than an epoch of"),
        ({"batch": 100}, "use a smaller batch"),
        ({"batch": 1}, "BatchNorm"),
        ({"clip_stride": 9}, "no video"),
        ({"split": "trian"}, 'did you mean "train"'),
        ({"trunk": "resnet50"}, "choose a video trunk"),
        ({"trunk": "tiny3"}, "there is no trunk"),
        ({"schedule": "step"}, "needs milestones"),
        ({"starts": "three"}, "starts"),
        ({"temperature": "warm"}, "expected a number"),
        ({"queue": 0}, "queue = 0: must be at least 1"),
        ({"dim": -1}, "dim = -1: must be at least 1"),
        ({"list": 2}, "list = 2 chooses one of the official lists"),
    ],
)
def test_bad_options_are_refused_in_a_sentence(changes, sentence, tiny_path, tmp_path, capsys) -> None:
    assert call(cli, *words(tiny_path, tmp_path / "run", **changes)) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "changes", "sentence"),
    [
        ("fima", {"dropout": 2.0}, r"fima cannot be made .*dropout"),
        ("mscl", {"weight_aug_flow": (1, 2, 3)}, "2 numbers"),
    ],
)
def test_values_that_a_method_refuses_are_a_sentence(method: str, changes: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        build_pretraining(small_config(method, **changes), samples=1)


def test_flow_that_the_shards_lack_is_refused_with_the_command(tiny_path, tmp_path, capsys) -> None:
    given = words(tiny_path, tmp_path / "run", "mscl", flow_series="flow8g2")
    assert call(cli, *given) == 2
    assert "fsar-preprocess" in capsys.readouterr().err


def test_resuming_another_run_is_refused(finished: Path, tiny_path: Path, tmp_path: Path, capsys) -> None:
    assert call(cli, *words(tiny_path, finished)) == 2
    assert "go on with --resume, or choose another folder with --out" in capsys.readouterr().err
    assert call(cli, *words(tiny_path, finished, lr=0.3), "--resume") == 2
    assert "lr was 0.02, asked for 0.3" in capsys.readouterr().err
    assert call(cli, *words(tiny_path, tmp_path / "none"), "--resume") == 2
    assert "holds no run" in capsys.readouterr().err
    other = build_pretraining(small_config("moco", trunk="r3d18"), samples=1)
    with pytest.raises(ConfigError, match="does not fit the model"):
        load_state(finished / "checkpoints" / "last.safetensors", other)


def test_resuming_a_finished_run_writes_its_report_again(finished: Path, tiny_path: Path) -> None:
    before = json.loads((finished / "result.json").read_text())
    assert call(cli, "--shards", str(tiny_path), "--out", str(finished), "--resume") == 0
    assert json.loads((finished / "result.json").read_text())["weights_sha256"] == before["weights_sha256"]


def test_recipes_and_configuration_are_printed(tiny_path: Path, tmp_path: Path) -> None:
    assert "mscl-r50" in CliRunner().invoke(cli, ["--recipes"]).output
    printed = CliRunner().invoke(cli, [*words(tiny_path, tmp_path / "run"), "--print-config"])
    assert 'trunk = "tiny3d"' in printed.stdout
    assert not (tmp_path / "run").exists()


def test_the_tiny_trunk_has_the_strides_of_r3d18() -> None:
    trunk = create_trunk("tiny3d")
    shapes = [tuple(level.shape[1:]) for level in trunk.levels(torch.rand(1, 3, 16, 64, 64))]
    assert shapes == [(16, 16, 32, 32), (24, 8, 16, 16), (48, 4, 8, 8), (64, 2, 4, 4)]
    assert sum(p.numel() for p in trunk.parameters()) == 130_656
