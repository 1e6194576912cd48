"""`fsar-eval`: comparisons, files of episodes, what training saw, others' checkpoints."""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fsar.checkpoints import reference_names
from fsar.cli.compare import distinct_names
from fsar.cli.evaluate import cli
from fsar.cli.train import resolve
from fsar.data import open_episodes
from fsar.evaluation import evaluate
from fsar.methods import METHODS
from fsar.run_state import load_seen, load_state, save_state
from fsar.seen import UNKNOWN, find_overlap, seen_in
from fsar.training import build_model
from pipelines.given import read_episodes, write_episodes
from pipelines.plan import EpisodeRules, EpisodeStream
from shards_spec import ShardError, ShardSet
from shards_spec.console import run_command
from tests.fake_shards import FakeShards

SMALL = {
    "test_way": 2, "test_episodes": 12, "resize": 64, "crop": 32, "threads": 1, "executor": "portable",
    "num_classes": 3,
}  # fmt: skip


def call(*words: object) -> int:
    """Run fsar-eval in this process; its exit code."""
    argv, sys.argv = sys.argv, ["fsar-eval", *map(str, words)]
    try:
        with pytest.raises(SystemExit) as leave:
            run_command(cli)
        return int(leave.value.code or 0)
    finally:
        sys.argv = argv


def make_run(folder: Path, shards: ShardSet, *, method: str = "molo", remembers: bool = True, **changes) -> Path:
    """A run folder as fsar-train leaves it, its weights random."""
    style = changes.pop("recipe_style", None)
    config = resolve("synthetic", method, "demo", style, SMALL | changes)
    seen = seen_in(shards, shards.split_rows("train")) if remembers else None
    save_state(folder / "checkpoints" / "last.safetensors", build_model(config), None, {"n": 0}, seen=seen)
    (folder / "config.toml").write_text(config.to_toml())
    return folder


@pytest.fixture(scope="module")
def runs(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of two methods, one of other frames, one of the other style, one that does not say what it saw."""
    top = tmp_path_factory.mktemp("runs")
    with ShardSet.open(tiny_path) as shards:
        return {
            "molo": make_run(top / "molo", shards),
            "otam": make_run(top / "otam", shards, method="otam", seed=1, frames=4, crop=48, test_episodes=7),
            "reference": make_run(top / "reference", shards, recipe_style="reference"),
            "old": make_run(top / "old", shards, remembers=False),
        }


def result_of(out: Path, *words: object) -> dict:
    assert call(*words, "--out", out) == 0
    return json.loads(out.read_text())


def test_compared_runs_get_the_accuracies_they_have_alone(
    runs: dict[str, Path], tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, shared = tmp_path / "out.json", ["--shards", tiny_path, "--episodes", 12]
    files = ["--markdown", tmp_path / "t.md", "--csv", tmp_path / "t.csv", "--prototype-control"]
    table = result_of(out, "--compare", runs["molo"], runs["otam"], *shared, *files)
    printed = capsys.readouterr().out
    alone = [result_of(out, "--weights", runs[name], *shared)["test"] for name in ("molo", "otam")]
    assert [row["test"] for row in table["runs"][:2]] == alone
    assert [row["run"] for row in table["runs"]] == ["molo", "otam", "prototypes of tiny"]
    difference = table["runs"][1]["difference"]
    assert difference["value"] == pytest.approx(alone[1]["accuracy"] - alone[0]["accuracy"])
    assert table["runs"][0]["difference"] is None
    assert table["runs"][0]["overlap"] == {"status": "none", "classes": 0, "videos": 0}
    assert (tmp_path / "t.md").read_text() == printed
    rows = list(csv.DictReader((tmp_path / "t.csv").open()))
    assert {float(row["accuracy"]) for row in rows if row["scope"] == "overall"} == {
        row["test"]["accuracy"] for row in table["runs"]
    }
    again = result_of(out, "--compare", runs["molo"], "--compare", runs["otam"], *shared, "--baseline", "otam")
    assert again["runs"][0]["difference"]["value"] == -difference["value"]
    assert again["runs"][0]["difference"]["interval_videos"] == difference["interval_videos"]


def test_the_first_run_and_the_command_line_decide_the_episodes(
    runs: dict[str, Path], tiny_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    for words, episodes in (((), 7), (("--episodes", 3, "--shot", 2), 3)):
        table = result_of(out, "--compare", runs["otam"], runs["molo"], "--shards", tiny_path, *words)
        assert [row["test"]["episodes"] for row in table["runs"]] == [episodes, episodes]
    assert (table["shot"], table["runs"][0]["frames"], table["runs"][1]["frames"]) == (2, 4, 8)


def test_styles_are_mixed_on_purpose_alone_and_then_it_shows(
    runs: dict[str, Path], tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--compare", runs["molo"], runs["reference"], "--shards", tiny_path]
    assert call(*words) == 2
    assert "differ in recipe style (molo fixed, reference reference)" in capsys.readouterr().err
    table = result_of(tmp_path / "out.json", *words, "--allow-styles")  # one has random frames: the direct way
    assert table["styles"] == ["fixed", "reference"]
    assert "differ in recipe style" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--compare", "molo"], "needs two runs"),
        (["--compare", "molo", "molo"], "are one run"),
        (["--compare", "molo", "otam", "--baseline", "ottam"], 'did you mean "otam"'),
        (["--compare", "molo", "otam", "--method", "molo"], "--compare takes run folders"),
        (["--compare", "molo", "otam", "--csv", "nowhere/t.csv"], "there is no folder"),
        (["--weights", "molo", "otam"], "stands alone"),
        (["--weights", "molo", "--baseline", "molo"], "go with --compare"),
        (["--weights", "molo", "--option", "frames=4"], "say what a file of weights holds"),
    ],
)
def test_words_that_say_nothing_together(
    runs: dict[str, Path], tiny_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch, words: list, sentence: str
) -> None:
    monkeypatch.chdir(runs["molo"].parent)
    assert call(*words, "--shards", tiny_path) == 2
    assert sentence in capsys.readouterr().err


def test_runs_of_one_folder_name_are_told_apart() -> None:
    assert distinct_names([Path("/x/one/run"), Path("/x/two/run")]) == ["one/run", "two/run"]
    assert distinct_names([Path("/x/one"), Path("/y/two")]) == ["one", "two"]


@pytest.mark.parametrize("name", ["molo", "reference"])
def test_episodes_of_a_file_are_run_again(runs: dict[str, Path], tiny_path: Path, tmp_path: Path, name: str) -> None:
    """Both ways: embedded once (molo), and whole, with random frames (reference)."""
    words = ["--weights", runs[name], "--shards", tiny_path, "--episodes-file", tmp_path / "e.jsonl"]
    first = result_of(tmp_path / "a.json", *words, "--seed", 5, "--shot", 2)
    written = (tmp_path / "e.jsonl").read_bytes()
    again = result_of(tmp_path / "b.json", *words)
    assert again == first
    assert (tmp_path / "e.jsonl").read_bytes() == written
    assert (again["shot"], again["test"]["episodes"], again["eval_seed"]) == (2, 12, 5)
    assert result_of(tmp_path / "c.json", *words, "--episodes", 4)["test"]["episodes"] == 4
    if name == "molo":  # nothing but the videos is random: the file changes nothing
        assert result_of(tmp_path / "d.json", *words[:4], "--seed", 5, "--shot", 2)["test"] == first["test"]
        compared = result_of(tmp_path / "f.json", "--compare", runs["otam"], runs["molo"], *words[2:])
        assert compared["runs"][1]["test"] == first["test"]
        assert compared["episodes_sha256"] == first["episodes_sha256"]


def test_a_file_of_other_episodes_than_asked_for_is_refused(
    runs: dict[str, Path], tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--weights", runs["molo"], "--shards", tiny_path, "--episodes-file", tmp_path / "e.jsonl"]
    assert call(*words) == 0
    for extra, sentence in (
        (["--shot", 2], "test_shot = 1, asked for 2"),
        (["--seed", 2], "eval_seed = 0, asked for 2"),
        (["--episodes", 13], "holds 12 episodes, asked for 13"),
        (["--split", "val"], 'line 1: these episodes are of split "test"'),
    ):
        capsys.readouterr()
        assert call(*words, *extra) == 2
        assert sentence in capsys.readouterr().err


GOOD = {
    "n": 0,
    "classes": ["fox", "gnu"],
    "support": [["fox/fox_g0_0.mp4"], ["gnu/gnu_g0_0.mp4"]],
    "query": ["gnu/gnu_g1_2.mp4", "fox/fox_g1_2.mp4"],
    "query_classes": ["gnu", "fox"],
}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"n": 2}, "n is 2 and not 1"),
        ({"classes": ["fox", "ant"]}, 'split "test" has no class "ant"'),
        ({"classes": ["fox", "fox"]}, "each once"),
        ({"classes": 7}, '"classes" is no list'),
        ({"support": [["fox/fox_g0_0.mp4"]]}, "one list of videos for each class"),
        (
            {"support": [["gnu/gnu_g0_0.mp4"], ["fox/fox_g0_0.mp4"]]},
            'no stored video "gnu/gnu_g0_0.mp4" of class "fox"',
        ),
        ({"support": [["fox/fox_g0_0.mp4"], ["gnu/9.mp4"]]}, 'no stored video "gnu/9.mp4"'),
        ({"support": [["fox/fox_g0_0.mp4", "fox/fox_g0_1.mp4"], ["gnu/gnu_g0_0.mp4"]]}, "unequal numbers"),
        ({"query": ["gnu/gnu_g0_0.mp4", "fox/fox_g1_2.mp4"]}, "stands in two places"),
        ({"query_classes": ["gnu"]}, "not equally long"),
        ({"query": [None, {}]}, "no stored video null"),
        ({"query": GOOD["query"][:1], "query_classes": ["gnu"]}, "1 queries, where the first episode has"),
    ],
)
def test_a_broken_line_is_named(tiny_shards: ShardSet, tmp_path: Path, changes: dict, sentence: str) -> None:
    path = tmp_path / "e.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD | {"n": 1}) + "\n")
    assert read_episodes(path, tiny_shards, "test").queries == 2
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD | {"n": 1} | changes) + "\n")
    with pytest.raises(ShardError) as refused:
        read_episodes(path, tiny_shards, "test")
    assert f"{path}, line 2: " in str(refused.value)
    assert sentence in str(refused.value)


def test_no_json_a_wrong_header_and_a_cut_file_are_refused(tiny_shards: ShardSet, tmp_path: Path) -> None:
    path, good = tmp_path / "e.jsonl", json.dumps(GOOD).encode()
    for data, sentence in (
        (b"\xff\xfe", "line 1: no JSON"),
        (b"[1]", "line 1: no JSON object"),
        (b'{"episodes": "two"}\n' + good, 'line 1: "episodes" of the header is "two"'),
        (b'{"clips": 3}', "neither an episode"),
        (b'{"episodes": 2}\n' + good, "holds 1 of 2 episodes: it was cut short"),
        (b"", "holds 0 of its episodes"),
    ):
        path.write_bytes(data)
        with pytest.raises(ShardError) as refused:
            read_episodes(path, tiny_shards, "test")
        assert sentence in str(refused.value)


def test_many_episodes_are_written_and_read_in_seconds(tmp_path: Path) -> None:
    shards, path = FakeShards(100, classes=24), tmp_path / "e.jsonl"
    stream = EpisodeStream(shards, "all", EpisodeRules(shot=5, resize=64, crop=64), seed=0)
    began = time.perf_counter()
    write_episodes(path, shards, stream, 2000)
    given = read_episodes(path, shards, "all")
    assert time.perf_counter() - began < 10
    assert given.chosen[::999] == tuple(stream.choose(n) for n in range(0, 2000, 999))
    again = EpisodeStream(shards, "all", stream.rules, seed=0, given=given.chosen)
    assert np.array_equal(again.plan(77).support_rows, stream.plan(77).support_rows)
    assert np.array_equal(again.plan(77).query_labels, stream.plan(77).query_labels)


def test_a_test_on_what_training_saw_is_refused_or_stamped(
    runs: dict[str, Path], tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--weights", runs["molo"], "--shards", tiny_path, "--split", "train"]
    for several in (words, ["--compare", runs["old"], *words[1:]]):
        assert call(*several) == 2
        assert 'molo was trained on 3 classes (such as "ant") and 15 videos of these' in capsys.readouterr().err
        assert call(*several, "--allow-overlap", "--out", tmp_path / "out.json") == 0
        assert "3 classes, 15 videos" in capsys.readouterr().out
    stamps = [row["overlap"] for row in json.loads((tmp_path / "out.json").read_text())["runs"]]
    assert stamps[0] == {"status": "unknown", "classes": None, "videos": None}
    assert stamps[1] == {"status": "overlaps", "classes": 3, "videos": 15}


def test_what_was_seen_is_told_by_names_across_shard_sets(tiny_shards: ShardSet, tmp_path: Path) -> None:
    train, test = (tiny_shards.split_rows(name) for name in ("train", "test"))
    path, model = tmp_path / "one.safetensors", torch.nn.Linear(2, 2)
    save_state(path, model, None, {"n": 3}, seen=seen_in(tiny_shards, train[:7]))
    assert load_state(path, model) == {"n": 3}  # the record is none of the model's
    seen = load_seen(path)
    assert not find_overlap(seen, tiny_shards, test).found
    renamed = replace(tiny_shards.dataset, classes=tuple(f"{name[0].upper()}_{name[1:]}" for name in ("ant", "bee")))

    class Other:
        dataset, labels, names = renamed, tiny_shards.labels, staticmethod(tiny_shards.names)

    overlap = find_overlap(seen, Other, train[4:9])
    assert (overlap.classes, overlap.videos) == (("A_nt", "B_ee"), 3)
    assert str(overlap) == "overlaps training: 2 classes, 3 videos"
    assert find_overlap(None, tiny_shards, test) == UNKNOWN


def official_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    names = reference_names(model)
    return {f"module.head.{names[name]}": value for name, value in model.state_dict().items()}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_weights_with_official_names_give_the_accuracy_of_their_model(
    tiny_shards: ShardSet, tiny_path: Path, tmp_path: Path, method: str
) -> None:
    config = resolve("synthetic", method, "demo", None, SMALL | {"num_classes": 64, "seed": 9})
    model = build_model(config)
    content = {"epoch": 4, "model_state": official_state(model), "optimizer_state": {"state": {}}, "cfg": "A: 1\n"}
    torch.save(content, tmp_path / "official.pyth")
    with open_episodes(
        tiny_shards, "test", config, trunk=model.trunk, device=torch.device("cpu"), training=False
    ) as loader:
        direct = evaluate(model, loader, config.test_episodes)
    pairs = [word for key in SMALL if key != "num_classes" for word in ("--option", f"{key}={SMALL[key]}")]
    shared = ["--weights", tmp_path / "official.pyth", "--shards", tiny_path, "--trunk", "tiny", *pairs]
    table = result_of(tmp_path / "out.json", *shared, "--method", method, "--option", "groups=any")
    assert table["test"] == direct.to_json()
    assert table["overlap"]["status"] == "unknown"
    assert len(table["weights_file_sha256"]) == 64


def test_files_of_weights_that_are_refused(
    runs: dict[str, Path], tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Payload:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/executed",))

    torch.save({"model_state": {"a": Payload()}}, tmp_path / "evil.pyth")
    torch.save({"model_state": {"layer9.weight": torch.zeros(1)}}, tmp_path / "other.pyth")
    model = ["--method", "molo", "--trunk", "tiny", "--way", 2]
    for file, words, sentence in (
        (tmp_path / "evil.pyth", model, "holds pickled code, which is never run"),
        (tmp_path / "other.pyth", model, "unexpected: layer9.weight"),
        (tmp_path / "other.pyth", [], "give --method and --trunk, or --recipe"),
        (tmp_path / "other.pyth", [*model, "--option", "framse=4"], 'did you mean "frames"'),
        (runs["molo"] / "checkpoints" / "last.safetensors", model, "is a checkpoint of the run"),
        (tmp_path / "none.pyth", [], "no run folder"),
    ):
        assert call("--weights", file, "--shards", tiny_path, *words) == 2
        errors = capsys.readouterr().err
        assert sentence in errors
        assert "Traceback" not in errors
    assert not (tmp_path / "executed").exists()
