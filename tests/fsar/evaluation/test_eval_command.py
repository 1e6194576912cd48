"""`fsar-eval`: comparisons, one set of episodes for all, what training saw, others' checkpoints."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_shards import FakeShards

from fsar.checkpoints import load_state, load_training_record, reference_names, save_state
from fsar.cli.compare import distinct_names
from fsar.cli.evaluate import cli
from fsar.cli.train import resolve
from fsar.evaluation.accuracy import evaluate
from fsar.evaluation.overlap import UNKNOWN, find_overlap, training_record
from fsar.evaluation.shared_episodes import ModelUnderTest, open_shared_episodes
from fsar.methods import METHODS
from fsar.run.build import build_model, evaluation_rules, open_episodes, prototypes_of_trunk
from pipelines.episodes.stream import EpisodeStream
from shards_spec import ShardSet
from shards_spec.cli.console import run_command

SMALL = {
    "test_way": 2, "test_episodes": 12, "resize": 64, "crop": 32, "threads": 1, "executor": "portable",
    "num_classes": 3,
}  # fmt: skip
SEMI = {"test_way": 4, "groups": "any", "small_classes": "drop", "unlabelled_per_class": 2, "crop": 32, "resize": 32}


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
    seen = training_record(shards, shards.split_rows("train")) if remembers else None
    save_state(folder / "checkpoints" / "last.safetensors", build_model(config), None, {"n": 0}, trained_on=seen)
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
            "few": make_run(top / "few", shards, method="hyrsm++", groups="any"),
            "semi": make_run(top / "semi", shards, method="hyrsm++", groups="any", unlabelled_per_class=2),
            "more": make_run(top / "more", shards, method="hyrsm++", groups="any", unlabelled_per_class=1),
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
    results = [result_of(out, "--weights", runs[name], *shared) for name in ("molo", "otam")]
    alone = [result["test"] for result in results]
    assert [row["test"] for row in table["runs"]][:2] == alone
    names = ["molo", "otam", "prototypes of tiny", "stored motion without training"]
    assert [row["run"] for row in table["runs"]] == names
    assert table["runs"][3]["test"] == results[0]["stored_motion"]
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
        assert [row["test"]["episodes"] for row in table["runs"]] == [episodes] * 3  # with stored motion
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
        (["--weights", "molo", "--trunk-weights", "random"], "--trunk-weights go only with --method"),
        (["--weights", "molo/config.toml", "--checkpoint", "last"], "--checkpoint chooses one of a run's"),
        (["--method", "prototype", "--trunk", "tiny", "--checkpoint", "last"], "--checkpoint chooses one of a run's"),
        (["--compare", "molo", "otam", "--unlabelled-per-class", "5"], "nothing that molo or otam reads"),
        (["--weights", "semi", "--inference", "text"], "a method that does (clip-fsar)"),
        (["--weights", "semi", "--class-text", "x"], "a method that does (clip-fsar)"),
        (["--compare", "semi", "molo", "more"], "other unlabelled videos (semi: 2 a class; more: 1 a class)"),
        (["--weights", "few", "--distractor-classes", "1"], "give distractors_per_class or unlabelled_per_class"),
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


def test_embeddings_are_kept_for_the_next_evaluation(
    runs: dict[str, Path], tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of all views of the test's 10 videos, another seed and shot find every one; another run finds none."""
    path, out = tmp_path / "e.zarr", tmp_path / "out.json"
    shared = ["--shards", tiny_path, "--embeddings", path, "--episodes", 60]
    first = result_of(out, "--weights", runs["reference"], *shared, "--views", 3)
    assert first["views"] == 3
    printed = capsys.readouterr().out
    assert "0 of 30 embeddings were there" in printed
    assert "1-shot on test, each video in 3 random views (overlap with training: none)" in printed
    plain = result_of(out, "--weights", runs["reference"], "--shards", tiny_path, "--episodes", 60, "--views", 3)
    assert plain == first
    capsys.readouterr()
    for words, there in (
        (["--weights", runs["reference"], "--views", 3, "--seed", 7, "--shot", 2], 30),
        (["--weights", runs["reference"], "--views", 2], 20),
        (["--compare", runs["molo"], "--prototype-control"], 0),
        (["--compare", runs["molo"], "--prototype-control"], 10),
    ):
        assert call(*words, *shared) == 0
        assert f"{there} of {there or 10} embeddings were there" in capsys.readouterr().out
    assert call("--weights", runs["molo"], *shared, "--views", 2) == 2
    assert "views = 2, but test_frames is centre" in capsys.readouterr().err
    assert call("--weights", runs["molo"], "--shards", tiny_path, "--embeddings", runs["molo"]) == 2
    assert "is no store of embeddings" in capsys.readouterr().err


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


def test_runs_with_unlabelled_videos_and_others_are_asked_the_same(
    runs: dict[str, Path], tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A class that is too small for unlabelled videos is left out for all; a run trained without gets none."""
    out, shared = tmp_path / "out.json", ["--shards", tiny_path, "--split", "train", "--allow-overlap"]
    alone = [result_of(out, "--weights", runs[name], *shared)["test"] for name in ("few", "semi")]
    names = [runs[name] for name in ("otam", "few", "semi")]
    table = result_of(out, "--compare", *names, *shared, "--groups", "any", "--episodes", 12, "--prototype-control")
    assert [row["test"] for row in table["runs"][1:3]] == alone
    assert [row["unlabelled_per_class"] for row in table["runs"]] == [0, 0, 2, 0, 0]
    assert "| 2 a class " in capsys.readouterr().out
    all_of_them = ["--compare", *names[:2], *shared, "--groups", "any", "--unlabelled-per-class", 2]
    table = result_of(out, *all_of_them, "--distractor-classes", 1, "--distractors-per-class", 3)
    assert [row["distractors_per_class"] for row in table["runs"]] == [0, 3, 0]


def test_the_control_is_asked_the_same_where_unlabelled_videos_leave_classes_out() -> None:
    shards, chosen = FakeShards([8, 2, 8, 8, 3, 8], size=(32, 32)), {}
    semi = resolve("synthetic", "hyrsm++", "demo", None, SMALL | SEMI)
    for config in (semi, prototypes_of_trunk(semi)):
        shared = open_shared_episodes(shards, "all", [ModelUnderTest("semi", semi, lambda: None)], asked={})
        rules = evaluation_rules(shared.configured(config))
        stream = EpisodeStream(shards, "all", rules, seed=0, given=shared.videos_for(shared.configured(config)))
        chosen[rules.unlabelled_per_class] = [replace(stream.choose(n), unlabelled=()) for n in range(12)]
    assert shared.left_out == ["class1", "class4"]
    assert chosen[0] == chosen[2]


def test_a_file_decides_the_unlabelled_videos_and_the_result_says_so(
    runs: dict[str, Path], tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "e.jsonl", tmp_path / "out.json"
    shared = ["--shards", tiny_path, "--episodes-file", path]
    first = result_of(out, "--weights", runs["semi"], *shared)
    again = result_of(out, "--weights", runs["few"], *shared)
    assert [table["unlabelled_per_class"] for table in (first, again)] == [2, 2]
    assert result_of(out, "--weights", runs["molo"], *shared)["unlabelled_per_class"] == 0
    header, *lines = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(header) | {"labelled_fraction": 0.8}), *lines]))
    assert result_of(out, "--weights", runs["few"], *shared)["labelled_fraction"] == 0.8
    path.write_text("\n".join(lines))  # others' files may have no header
    assert result_of(out, "--weights", runs["few"], *shared)["unlabelled_per_class"] == 2
    for extra, sentence in (
        (["--unlabelled-per-class", 5], "unlabelled_per_class = 2, asked for 5"),
        (["--distractor-classes", 2], "distractor_classes = 0, asked for 2"),
    ):
        capsys.readouterr()
        assert call("--weights", runs["few"], *shared, *extra) == 2
        assert sentence in capsys.readouterr().err
    for changes, sentence in (
        ({"unlabelled_per_class": 1}, "the header says unlabelled_per_class = 1, and its episodes have 2"),
        ({"split_sha256": "0" * 64}, 'of another split "test" (SHA-256 000000000000'),
    ):
        path.write_text("\n".join([json.dumps(json.loads(header) | changes), *lines]))
        assert call("--weights", runs["few"], *shared) == 2
        assert sentence in capsys.readouterr().err


def test_a_checkpoint_chosen_on_the_split_of_the_test_says_so(
    tiny_path: Path, tiny_shards: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = make_run(tmp_path / "run", tiny_shards, select_on="test"), tmp_path / "out.json"
    shutil.copy(run / "checkpoints" / "last.safetensors", run / "checkpoints" / "best.safetensors")
    words = ["--weights", run, "--shards", tiny_path, "--episodes", 1]
    table = result_of(out, *words)
    assert (table["checkpoint"], table["selected_on"], table["queries"]) == ("best", "test", 1)
    assert 'run: its checkpoint was chosen on this split, "test"' in capsys.readouterr().out
    assert table["test"]["interval_episodes"] is None  # of one episode
    assert result_of(out, *words, "--checkpoint", "last")["selected_on"] == "last"
    assert "was chosen on" not in capsys.readouterr().out
    table = result_of(out, "--compare", run, "--prototype-control", "--no-motion-control", *words[2:])
    assert [row.get("selected_on") for row in table["runs"]] == ["test", None]
    assert "| best on test |" in capsys.readouterr().out


def test_what_is_missing_is_found_before_anything_is_computed(
    runs: dict[str, Path], tiny_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--compare", runs["molo"], runs["otam"], "--shards", tiny_path, "--prototype-control"]
    assert call(*words, "--trunk-weights", "nowhere.pth") == 2
    done = capsys.readouterr()
    assert "nowhere.pth: there is no such file" in done.err
    assert "episode" not in done.out + done.err.split("error: ")[0]


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
    save_state(path, model, None, {"n": 3}, trained_on=training_record(tiny_shards, train[:7]))
    assert load_state(path, model) == {"n": 3}  # the record is none of the model's
    seen = load_training_record(path)
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
        (tmp_path / "none.pyth", model, "there is no such file or folder"),
        (tmp_path, [], "no run folder"),
    ):
        assert call("--weights", file, "--shards", tiny_path, *words) == 2
        errors = capsys.readouterr().err
        assert sentence in errors
        assert "Traceback" not in errors
    assert not (tmp_path / "executed").exists()
