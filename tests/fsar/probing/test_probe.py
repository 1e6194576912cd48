"""Probes: votes, intervals, classifiers, stored features, the command."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from small_runs import call
from torch import nn

from fsar.checkpoints import save_state
from fsar.cli.probe import cli
from fsar.evaluation.overlap import training_record
from fsar.probing.classifier import Classifier, Fit, Training
from fsar.probing.features import video_features
from fsar.probing.loader import ProbeLoader
from fsar.probing.neighbours import vote
from fsar.probing.prober import chance_recall
from fsar.probing.scores import average_clips, group_interval, wilson
from fsar.probing.weights import open_probed
from fsar.trunks import create_trunk
from pipelines.clips.labelled import ProbeRules
from shards_spec.errors import ConfigError, FsarError

RULES = ProbeRules(frames=2, stride=2, size=32, clips=2)
FIT = Fit(lr=0.1, weight_decay=1e-4, batch=4, epochs=3, milestones=(2,), dropout=0.3)
LOOK = {"frames": 2, "stride": 2, "size": 32, "clips": 2, "executor": "portable", "device": "cpu"}


def test_votes_by_hand():
    gallery = torch.tensor([[1.0, 0], [0.9, 0.1], [0.6, 0.4], [-1, 0]])
    labels, query = torch.tensor([0, 1, 1, 2]), torch.tensor([[2.0, 0]])
    assert vote(gallery, query, labels, classes=3, k=3, temperature=0).argmax(dim=1).tolist() == [1]
    assert vote(gallery, query, labels, classes=3, k=2, temperature=0).argmax(dim=1).tolist() == [0]  # a tie
    weighted = vote(gallery, query, labels, classes=3, k=4, temperature=0.5)
    cosines = [0.9 / math.hypot(0.9, 0.1), 0.6 / math.hypot(0.6, 0.4)]
    expected = [1, sum(math.exp((c - 1) / 0.5) for c in cosines), math.exp(-2 / 0.5)]
    assert weighted[0].tolist() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ConfigError, match="k=0"):
        vote(gallery, query, labels, classes=3, k=0)


def test_intervals():
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    values = np.array([1.0, 0, 0, 1, 1, 0, 1, 1])
    plain = group_interval(values, np.full(8, -1))
    assert plain == pytest.approx(1.96 * values.std(ddof=1) / math.sqrt(8))
    # Each video three times in its own group says no more than the video once.
    assert group_interval(values.repeat(3), np.arange(8).repeat(3)) == pytest.approx(plain)
    assert group_interval(values, np.zeros(8, int)) is None
    assert group_interval(np.ones(8), np.full(8, -1)) is None


def test_averages_over_clips():
    logits = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(0))
    ranks = {how: average_clips(logits, how).argsort(dim=1) for how in ("logit", "logprob")}
    assert torch.equal(ranks["logit"], ranks["logprob"])
    assert torch.allclose(average_clips(logits, "prob").sum(dim=1), torch.ones(6))
    with pytest.raises(ConfigError, match='clip_average="mean" is not known'):
        average_clips(logits, "mean")


def test_chance_of_recall_against_all_draws():
    gallery, queries = np.array([0, 0, 1, 2, 2, 2]), np.array([0, 1, 1, 3])
    draws = list(combinations(gallery.tolist(), 2))
    expected = np.mean([np.mean([query in draw for draw in draws]) for query in queries.tolist()])
    assert chance_recall(gallery, queries, 2) == pytest.approx(expected)


def probe(capsys, *given: str, code: int = 0, **options) -> str:
    """Run the command; what it printed."""
    pairs = [(f"--{key.replace('_', '-')}", str(value)) for key, value in options.items()]
    assert call(cli, *given, *(word for pair in pairs for word in pair)) == code
    printed = capsys.readouterr()
    return printed.err if code else printed.out


def features(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(4) % 2
    return torch.rand(4, 2, 3, 32, 32, generator=generator) + labels[:, None, None, None, None], labels


def batches(start: int, stop: int):
    yield from (features(n) for n in range(start, stop))


def training(run, *, frozen: bool = False, fit: Fit = FIT) -> Training:
    torch.manual_seed(0)
    model = Classifier(create_trunk("tiny"), 2, dropout=fit.dropout, l2norm=frozen, frozen=frozen, seed=0)
    return Training(model, fit, source=batches, steps=2, forward=model, run=run, facts={"lr": fit.lr})


class KilledError(Exception):
    pass


def kill(epoch: int) -> dict[str, float]:
    if epoch == 2:
        raise KilledError
    return {}


def test_a_killed_fine_tuning_goes_on_bit_for_bit(tmp_path):
    whole, killed = training(tmp_path / "a"), training(tmp_path / "b")
    whole.train()
    with pytest.raises(KilledError):
        killed.train(after=kill)
    resumed = training(tmp_path / "b")
    resumed.train(resume=True)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    logs = [[json.loads(line) for line in (tmp_path / run / "log.jsonl").open()] for run in "ab"]
    assert [line["loss"] for line in logs[0]] == [line["loss"] for line in logs[1]]
    assert [line["lr"] for line in logs[0]] == pytest.approx([0.1, 0.1, 0.01])
    other = Training(resumed.model, FIT, source=batches, steps=2, forward=resumed.model, run=tmp_path / "b",
                     facts={"lr": 7})  # fmt: skip
    with pytest.raises(ConfigError, match="trained with another lr"):
        other.train(resume=True)


def test_a_linear_probe_leaves_the_trunk_and_its_statistics_alone(tmp_path):
    probe = training(None, frozen=True)
    before = {name: value.clone() for name, value in probe.model.state_dict().items()}
    probe.train()
    changed = {name for name, value in probe.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"fc.weight", "fc.bias"}
    model = probe.model.eval()
    vectors = torch.randn(3, model.trunk.channels)
    assert torch.allclose(model.head(vectors), model.head(9 * vectors), atol=1e-6)  # l2norm


def test_a_loss_that_is_not_finite_is_refused():
    wild = training(None, fit=Fit(lr=1e30, weight_decay=0, batch=4, epochs=2, milestones=(), dropout=0))
    with pytest.raises(FsarError, match="not finite; lower --lr"):
        wild.train()


def test_features_are_computed_once(tiny_shards, tmp_path, monkeypatch):
    probed = open_probed(None, "tiny")
    with ProbeLoader(tiny_shards, RULES, probed.trunk, device=torch.device("cpu"), executor="portable") as loader:
        monkeypatch.setattr("fsar.probing.features.PART", 3)
        fresh = list(video_features(probed, loader, range(8)))
        stored = list(video_features(probed, loader, range(8), cache=tmp_path))
        assert [len(part) for part in stored] == [3, 3, 2]
        assert torch.equal(torch.cat(fresh), torch.cat(stored))
        (folder,) = tmp_path.glob("*/")
        shutil.rmtree(folder / "part-000001")  # as of a run that was killed
        seen = []
        monkeypatch.setattr(loader, "uniform", lambda rows: seen.extend(rows) or ProbeLoader.uniform(loader, rows))
        again = list(video_features(probed, loader, range(8), cache=tmp_path))
        assert torch.equal(torch.cat(again), torch.cat(stored))
        assert seen == [3, 4, 5]
        chunk = folder / "part-000000" / "features" / "c" / "0" / "0" / "0"
        content = chunk.read_bytes()
        for broken, what in (
            (b"broken", r"c/0/0/0 is damaged .*part-000000"),
            (content[::-1], r"features is damaged; .*part-000000"),
        ):
            chunk.write_bytes(broken)
            with pytest.raises(FsarError, match=what):
                list(video_features(probed, loader, range(8), cache=tmp_path))


def test_the_command_probes_an_untrained_trunk(tiny_path, tmp_path, capsys):
    out = tmp_path / "run"
    modes = [word for mode in ("knn", "retrieval", "linear") for word in ("--mode", mode)]
    given = LOOK | {"shards": tiny_path, "trunk": "tiny", "out": out, "epochs": 2, "lr": 0.1, "views": "cached"}
    assert "retrieval R@1, untrained" in probe(capsys, "--untrained", *modes, **given)
    result = json.loads((out / "result.json").read_bytes())
    probes = result["probes"]
    assert list(probes["retrieval"]["recall"]) == ["R@1", "R@10", "R@5"]  # no 20 of 14
    assert probes["knn"]["vote"] == "weighted by exp(cosine / temperature)"
    assert probes["linear"]["videos"] == result["division"]["test"] == 21
    assert result["overlap"] == {"classes": 0, "status": "none", "videos": 0}
    page = (out / "report.html").read_text()
    assert page.count("<figure class=query") == 12
    assert page.count("<figure class=right") + page.count("<figure class=wrong") == 60
    again = probe(capsys, "--untrained", "--mode", "linear", **given, code=2)
    assert "holds a classifier already" in again


class Pretrained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder_q, self.encoder_k = create_trunk("tiny"), create_trunk("tiny")
        self.register_buffer("queue", torch.zeros(4, 8))


def test_the_command_probes_a_pretrained_run_but_not_on_videos_that_it_saw(tiny_path, tiny_shards, tmp_path, capsys):
    run, method = tmp_path / "run", Pretrained()
    run.mkdir()
    (run / "config.toml").write_text('method = "moco"\ntrunk = "tiny"\nclip_frames = 2\ncrop = 32\n')
    checkpoint = run / "checkpoints" / "last.safetensors"
    save_state(checkpoint, method, None, {}, trained_on=training_record(tiny_shards, np.arange(35)))
    probed = open_probed(str(run), None)
    assert (probed.name, probed.method, probed.clips) == ("tiny", "moco", {"frames": 2, "size": 32})
    assert torch.equal(
        probed.trunk.state_dict()["stages.0.0.weight"], method.encoder_q.state_dict()["stages.0.0.weight"]
    )
    given = {"shards": tiny_path, "weights": run, "mode": "knn", "executor": "portable", "clips": 2, "stride": 3}
    assert "was trained on 21 of the 21 test videos" in probe(capsys, **given, code=2)
    out = tmp_path / "out"
    printed = probe(capsys, "--untrained", "--allow-overlap", **given, out=out)
    assert "knn, weights less untrained: " in printed
    result = json.loads((out / "result.json").read_bytes())
    assert result["overlap"]["videos"] == 21
    assert result["clips"].items() >= {"frames": 2, "stride": 3, "size": 32, "clips": 2}.items()
    own, control = (table["knn"]["accuracy"] for table in (result["probes"], result["untrained"]))
    assert result["difference"]["knn"]["value"] == pytest.approx(own["value"] - control["value"])
    assert own["right"].count("1") / 21 == own["value"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--trunk", "tiny"], "give --weights RUN or FILE, or --untrained"),
        (["--untrained"], "give --trunk NAME"),
        (["--untrained", "--trunk", "tinny"], 'no trunk "tinny"; did you mean "tiny"'),
        (["--weights", "nowhere"], "no such file or folder"),
        (["--untrained", "--trunk", "tiny", "--resume"], "give --out RUN"),
        (["--untrained", "--trunk", "tiny", "--lists", "nowhere"], "no such file or folder"),
        (["--untrained", "--trunk", "tiny", "--milestones", "9,3"], "epochs that rise from 1"),
        (["--untrained", "--trunk", "tiny", "--list", "2"], "give --lists, or leave it out"),
        (["--weights", "fetch", "--trunk", "tiny"], "give --weights FILE"),
    ],
)
def test_bad_input_is_one_sentence(tiny_path, arguments, sentence, capsys):
    assert sentence in probe(capsys, *arguments, shards=tiny_path, mode="knn", code=2)


@pytest.mark.parametrize(
    "line", ["frames = [16]", "frames = 16.7", "frames = 0", "milestones = [14, 18]", 'flip = "x"']
)
def test_values_of_a_recipe_are_checked_like_options(tiny_path, tmp_path, line, capsys):
    (tmp_path / "own.toml").write_text(line)
    given = {"shards": tiny_path, "trunk": "tiny", "mode": "knn", "recipe": tmp_path / "own.toml"}
    (said,) = probe(capsys, "--untrained", **given, code=2).strip().splitlines()
    assert f"--{line.partition(' ')[0]}" in said


def test_a_file_in_place_of_the_folder_is_refused(tiny_path, tmp_path, capsys):
    (tmp_path / "out").touch()
    given = {"shards": tiny_path, "trunk": "tiny", "mode": "knn", "out": tmp_path / "out"}
    (said,) = probe(capsys, "--untrained", **given, code=2).strip().splitlines()
    assert "cannot write" in said


def test_mscls_recipe_for_ssv2_is_that_of_its_code_and_trains(tiny_path, tmp_path, capsys):
    """Parts of a video in place of windows, other clips in the test, clipped gradients."""
    out = tmp_path / "run"
    given = {"shards": tiny_path, "trunk": "tiny3d", "mode": "finetune", "recipe": "mscl-ssv2", "executor": "portable"}
    small = {"epochs": 1, "size": 32, "test_size": 40, "batch": 7, "frames": 8, "test_frames": 4}
    printed = probe(capsys, "--untrained", **given, **small, out=out)
    result = json.loads((out / "result.json").read_bytes())
    fit = {"lr": 0.12, "weight_decay": 1e-6, "clip_norm": 40, "milestones": [14, 18], "dropout": 0.5}
    assert result["probes"]["finetune"]["fit"].items() >= (fit | {"epochs": 1, "batch": 7}).items()
    cut = {"sampling": "segments", "area": 0.08, "flip": False, "jitter": False, "centre": 1, "clips": 1}
    assert result["clips"].items() >= (cut | {"frames": 4, "size": 40}).items()
    assert result["training_clips"].items() >= (cut | {"frames": 8, "size": 32}).items()
    assert "as published code counts" not in printed  # no video is too short
    (tmp_path / "own.toml").write_text("rate = 1\n")
    assert 'unknown key "rate"' in probe(capsys, **(given | {"recipe": tmp_path / "own.toml"}), code=2)


def test_gradients_are_clipped():
    free, clipped = training(None), training(None, fit=replace(FIT, clip_norm=1e-6, weight_decay=0.0))
    before = {name: value.clone() for name, value in clipped.model.named_parameters()}
    for one in (free, clipped):
        one.model.train()
        for n, batch in enumerate(batches(0, one.steps)):
            one.train_step(n, batch)
    moved = [(value - before[name]).abs().max().item() for name, value in clipped.model.named_parameters()]
    assert 0 < max(moved) < 1e-6
    assert max((v - before[n]).abs().max().item() for n, v in free.model.named_parameters()) > 1e-3
