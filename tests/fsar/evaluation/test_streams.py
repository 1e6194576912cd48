"""Answers of two streams: ties, how the share of motion is chosen, and what results record."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import call, words

from fsar import EpisodeLoader, EpisodeRules
from fsar.cli import evaluate, train
from fsar.evaluation.accuracy import answer
from fsar.evaluation.fusion import calibrated, middle_of_best, of_support
from fsar.evaluation.logits import decide
from fsar.evaluation.shared_episodes import fuse
from fsar.methods import Embedding, create_method
from fsar.methods.class_text import ClassText
from fsar.run.build import build_model
from fsar.run.config import build_config
from shards_spec import ShardSet
from shards_spec.cli.shards import cli as shards_cli
from shards_spec.errors import ConfigError
from shards_spec.files import read_json


def test_a_tie_counts_as_wrong_and_so_does_nan() -> None:
    logits = torch.tensor([[1.0, 1.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 0.0], [torch.nan, 0.0, 0.0]])
    assert decide(logits, torch.tensor([0, 0, 2, 0])).tolist() == [1, 0, 0, 1]


def streams(*, good: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [50, 4, 5] of both streams, of which one knows the labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (50, 4), generator=generator)
    noise = [torch.randn(50, 4, 5, generator=generator) for _ in range(2)]
    known = 6 * torch.nn.functional.one_hot(labels, 5) + noise[1]
    return (100 * known, noise[0], labels) if good == "frames" else (100 * noise[0], known, labels)


@pytest.mark.parametrize(("good", "low", "high"), [("frames", 0.0, 0.5), ("motion", 0.5, 1.0)])
def test_the_share_goes_to_the_stream_that_knows_whatever_its_scale(good: str, low: float, high: float) -> None:
    frames, motion, labels = streams(good=good)
    fusion, found = calibrated("train", frames, motion, labels)
    assert low <= fusion.weight <= high
    mixed = decide(fusion.logits(frames, motion), labels) == labels
    assert float(mixed.double().mean()) == max(found) >= 0.99


def test_a_number_is_taken_as_it_is() -> None:
    assert calibrated(0.3, *streams(good="frames"))[0].weight == 0.3


def test_of_tied_shares_the_middle_is_taken() -> None:
    assert middle_of_best([0.5] * 3 + [0.9] * 5 + [0.2] * 3) == 0.5
    assert middle_of_best([0.9] + [0.5] * 2 + [0.9] * 4 + [0.2] * 4) == 0.45


@pytest.mark.parametrize("good", ["frames", "motion"])
@pytest.mark.parametrize("method", ["prototype", "molo"])
def test_the_support_tells_which_stream_to_trust_and_groups_are_kept_apart(good: str, method: str) -> None:
    way, shot = 3, 4
    generator = torch.Generator().manual_seed(3)
    directions = torch.eye(3, 16).repeat_interleave(shot, dim=0)  # of the classes
    scenes = torch.eye(4, 16).roll(3, dims=1).repeat(way, 1)  # of the groups: the same in every class
    noise = torch.randn(way * shot, 16, generator=generator) / 20

    def embedding(vectors: torch.Tensor) -> Embedding:
        tokens = vectors.view(way, shot, 1, 16).repeat(1, 1, 2, 1)
        return Embedding(tokens, tokens) if method == "molo" else Embedding(tokens[:, :, 0])

    model = create_method(method, trunk=None, channels=16, **({} if method == "molo" else {"temperature": 1.0})).eval()
    other = {"frames": "motion", "motion": "frames"}[good]
    support = {good: embedding(directions + noise), other: embedding(scenes + noise)}
    groups = np.tile(np.arange(shot), (way, 1))
    fusion = of_support({"frames": model, "motion": model}, support, groups)
    assert fusion.weight < 0.5 if good == "frames" else fusion.weight > 0.5


def test_the_support_is_looked_at_as_queries_are() -> None:
    """Of the own class other groups alone, of other classes all: a scene that classes share misleads both alike."""
    model = create_method("prototype", trunk=None, channels=8, temperature=1.0).eval()
    scenes = torch.eye(8)[torch.tensor([[0, 1], [0, 1], [2, 2]])]  # of two classes the same two
    good = torch.eye(8)[torch.tensor([[0, 0], [1, 1], [2, 2]])] + 0.1 * scenes
    groups = np.array([[0, 1], [0, 1], [2, 2]])  # a video of the third class has nothing of its own to look at
    support = {"frames": Embedding(scenes), "motion": Embedding(good)}
    assert of_support({"frames": model, "motion": model}, support, groups).weight > 0.5
    unknown = of_support({"frames": model, "motion": model}, support, np.zeros((3, 2), np.int64))
    assert unknown.weight == 0.5
    assert unknown.frames == pytest.approx(unknown.motion, rel=0.5)  # the spreads are known all the same


def test_a_given_share_needs_no_class_of_training(tiny_path: Path, tmp_path: Path) -> None:
    """Each query's own spread would make every disagreement of two classes a tie."""
    shutil.copytree(tiny_path, tmp_path / "shards")
    dataset = read_json(tmp_path / "shards" / "dataset.json")
    dataset["splits"] = {"test": dataset["splits"]["test"]}
    (tmp_path / "shards" / "dataset.json").write_text(json.dumps(dataset))
    assert call(shards_cli, "reindex", str(tmp_path / "shards")) == 0
    table = {"method": "otam", "trunk": "tiny", "trunk_weights": "random", "streams": "both", "stream_weight": "0.5"}
    table |= {"test_way": 2, "groups": "any", "resize": 64, "crop": 64, "val_episodes": 3}
    config = build_config(table)
    model = build_model(config)
    with ShardSet.open(tmp_path / "shards") as shards:
        assert fuse(model, shards, config, device=torch.device("cpu")) is None
        assert model.fusion.weight == 0.5
        assert min(model.fusion.frames, model.fusion.motion) > 0
        model.set_rule("train")
        with pytest.raises(ConfigError, match="has no classes of training or validation"):
            fuse(model, shards, config, device=torch.device("cpu"))


@pytest.mark.parametrize("method", ["clip-fsar", "hyrsm"])
def test_texts_go_with_frames_and_the_support_decides_in_the_precision_of_the_test(
    tiny_shards: ShardSet, method: str
) -> None:
    torch.manual_seed(0)
    table = {"method": method, "trunk": "tiny", "trunk_weights": "random", "streams": "both", "num_classes": 3}
    model = build_model(build_config(table | {"frames": 4}))
    model.set_rule("support")
    names = tiny_shards.dataset.splits["train"].classes
    texts = {"class_text": ClassText(names, torch.randn(len(names), 128), "{}", "")} if method == "clip-fsar" else {}
    rules = EpisodeRules(way=3, shot=2, queries=2, frames=4, resize=72, crop=56, groups="any", streams="both")
    with EpisodeLoader(tiny_shards, "train", rules, executor="portable", **texts) as loader:
        found = answer(model, loader, 3, precision="bf16")
    assert found.said.shape == (3, 6)
    assert set(found.of_streams) == {"frames", "motion"}


def test_a_run_of_two_streams_is_tested_stream_by_stream(tiny_path: Path, tmp_path: Path) -> None:
    run, again = tmp_path / "run", tmp_path / "again.json"
    assert call(train.cli, *words(tiny_path, run, streams="both")) == 0
    table = read_json(run / "result.json")
    assert set(table["of_streams"]) == {"frames", "motion"}
    assert table["stored_motion"]["episodes"] == table["test"]["episodes"]
    assert call(evaluate.cli, "--shards", str(tiny_path), "--weights", str(run), "--out", str(again)) == 0
    for key in ("test", "of_streams", "share_of_motion", "stored_motion"):
        assert read_json(again)[key] == table[key]
    compared = ("--compare", str(run), "--prototype-control", "--out", str(again))
    assert call(evaluate.cli, "--shards", str(tiny_path), *compared) == 0
    tested = [row["test"] for row in read_json(again)["runs"]]  # both streams, prototypes of the frames, the control
    assert (tested[0], tested[2]) == (table["test"], table["stored_motion"])


def test_a_resumed_run_of_two_streams_ends_with_the_same_weights(tiny_path: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    assert call(train.cli, *words(tiny_path, one, streams="both")) == 0
    assert call(train.cli, *words(tiny_path, other, streams="both", episodes=8)) == 0
    config = (other / "config.toml").read_text().replace("episodes = 8\n", "episodes = 16\n", 1)
    (other / "config.toml").write_text(config)
    assert call(train.cli, *words(tiny_path, other, streams="both"), "--resume") == 0
    assert read_json(other / "result.json")["weights_sha256"] == read_json(one / "result.json")["weights_sha256"]


def test_motion_by_itself_needs_neither_weights_nor_frames(tiny_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    asked = ("--way", "2", "--groups", "any", "--episodes", "4", "--out", str(out))
    assert call(evaluate.cli, "--shards", str(tiny_path), "--method", "motion", *asked) == 0
    table = read_json(out)
    assert (table["streams"], table["method"]) == ("motion", "motion")
    assert "stored_motion" not in table


def test_two_streams_need_no_training_where_the_trunk_has_weights(tiny_path: Path, tmp_path: Path) -> None:
    out, weights = tmp_path / "result.json", ("--method", "prototype", "--trunk", "tiny", "--trunk-weights", "random")
    asked = ("--way", "2", "--shot", "2", "--groups", "any", "--episodes", "4", "--option", "resize=64")
    given = ("--option", "crop=64", "--streams", "both", "--stream-weight", "support", "--out", str(out))
    assert call(evaluate.cli, "--shards", str(tiny_path), *weights, *asked, *given) == 0
    table = read_json(out)
    assert table["of_streams"]["motion"]["episodes"] == 4
    assert 0 <= table["share_of_motion"] <= 1


@pytest.mark.parametrize("streams", ["motion", "both"])
def test_a_frozen_trunk_leaves_the_motion_of_both_streams_to_be_learned(
    tiny_path: Path, tmp_path: Path, streams: str
) -> None:
    run = tmp_path / "run"
    options = {
        "streams": streams,
        "freeze_trunk": True,
        "method": "hyrsm",
        "recipe": "demo-hyrsm",
        "query_jitter": False,
    }
    assert call(train.cli, *words(tiny_path, run, **options)) == 0
    assert read_json(run / "result.json")["freeze_trunk"] is True
