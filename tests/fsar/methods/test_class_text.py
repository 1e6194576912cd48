"""Texts of classes: the file, the command that makes it, and their way from training to prediction."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_runs import call, words

import fsar.cli.text
from fsar.cli.evaluate import cli as evaluate_cli
from fsar.cli.text import cli as text_cli
from fsar.cli.train import cli as train_cli
from fsar.evaluation.accuracy import collect, collect_embedded
from fsar.evaluation.prediction import find_examples, open_run, predict, read_support
from fsar.methods.class_text import ClassText, class_words, prompts, read_class_text, write_class_text
from fsar.run.build import build_model, open_episodes
from fsar.run.config import build_config
from fsar.training.trainer import Trainer
from fsar.trunks.clip_text import ClipText
from shards_spec import ShardSet
from shards_spec.errors import ConfigError

CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")


def write_random(path: Path, names: tuple[str, ...] = CLASSES, width: int = 128) -> Path:
    text = torch.randn(len(names), width, generator=torch.Generator().manual_seed(1))
    write_class_text(path, ClassText(names, text, "a photo of {}", "random"))
    return path


# The file


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("HandstandPushups", "handstand pushups"),
        ("shoot_ball", "shoot ball"),
        ("playing  ukulele", "playing ukulele"),
        ("CleanAndJerk", "clean and jerk"),
        ("watching_TV", "watching tv"),
        ("Pretending to put [something] into [something]", "pretending to put [something] into [something]"),
    ],
)
def test_words_of_a_class(name: str, expected: str) -> None:
    assert class_words(name) == class_words(expected) == expected


def test_templates() -> None:
    assert prompts(["shoot_ball"], "a {} in {0}") == ["a shoot ball in {0}"]
    assert prompts(["caf\udce9"], "a {}") == ["a caf?"]  # no tokenizer takes a lone surrogate
    for template in ("a photo", "{} {}"):
        with pytest.raises(ConfigError, match="must have one"):
            prompts(["a"], template)


def test_the_file_gives_back_what_was_written(tmp_path: Path) -> None:
    names = ("shoot_ball", "HandstandPushups", "日本", "caf\udce9")  # the last as of a folder that is no UTF-8
    read = read_class_text(write_random(tmp_path / "text.safetensors", names, 5))
    assert (read.names, read.template, read.source) == (names, "a photo of {}", "random")
    assert torch.equal(read.rows(["日本", "ShootBall", "shoot ball"]), read.text[[2, 0, 0]])
    with pytest.raises(ConfigError, match=r'1 of 2 classes \(shot_ball\), did you mean "shoot_ball".*fsar-text'):
        read.rows(["日本", "shot_ball"])


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"vectors": torch.zeros(1, 2)}, {"names": '["a"]', "template": "", "source": ""}),
        ({"text": torch.zeros(1, 2)}, None),
        ({"text": torch.zeros(1, 2)}, {"names": "a", "template": "", "source": ""}),
        ({"text": torch.zeros(2, 2)}, {"names": '["a"]', "template": "", "source": ""}),
        ({"text": torch.zeros(1, 2)}, {"names": "[1]", "template": "", "source": ""}),
        ({"text": torch.full((1, 2), torch.nan)}, {"names": '["a"]', "template": "", "source": ""}),
        ({"text": torch.zeros(1, 2).half()}, {"names": '["a"]', "template": "", "source": ""}),
    ],
)
def test_files_of_another_form_are_refused(tmp_path: Path, tensors: dict, metadata: dict | None) -> None:
    path = tmp_path / "text.safetensors"
    save_file(tensors, path, metadata)
    with pytest.raises(ConfigError, match='expected tensor "text"'):
        read_class_text(path)


@pytest.mark.parametrize("names", [("shoot_ball", "fox", "ShootBall"), ("fox", "fox")])
def test_two_texts_of_one_class_are_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    path = write_random(tmp_path / "text.safetensors", names)
    with pytest.raises(ConfigError, match=f'"{names[0]}" and "{names[-1]}"; keep one'):
        read_class_text(path)


def test_files_that_are_not_there_or_no_tensors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file; fsar-text makes it"):
        read_class_text(tmp_path / "nothing")
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(ConfigError, match="is no file of class texts"):
        read_class_text(tmp_path / "junk")


# The command


class Words:
    """A tokenizer of whole words, since the real one is an extra: start, a number a word, end."""

    size = 60

    def __init__(self, vocabulary: Path) -> None:
        self.vocabulary = vocabulary.read_text().split()

    def __call__(self, texts: list[str]) -> torch.Tensor:
        rows = torch.zeros(len(texts), 8, dtype=torch.int64)
        for row, text in zip(rows, texts, strict=True):
            numbers = [58, *map(self.vocabulary.index, text.split()), 59]
            row[: len(numbers)] = torch.tensor(numbers)
        return rows


@pytest.fixture
def clip_file(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setattr(fsar.cli.text, "ClipTokenizer", Words)
    torch.manual_seed(0)
    tower = ClipText(tokens=60, length=8, width=64, depth=1, channels=12)
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    torch.save(tower.state_dict(), tmp_path / "clip.pt")
    (tmp_path / "words").write_text("the a photo of shoot ball " + " ".join(CLASSES))
    return tmp_path / "clip.pt"


def test_the_command_writes_the_classes_of_shards(clip_file: Path, tiny_path: Path, tmp_path: Path) -> None:
    given = ["--clip", str(clip_file), "--vocabulary", str(tmp_path / "words"), "--out", str(tmp_path / "out")]
    assert call(text_cli, *given, "--shards", str(tiny_path)) == 0
    written = read_class_text(tmp_path / "out")
    assert sorted(written.names) == list(CLASSES)
    assert written.text.shape == (7, 12)
    assert len(written.text.unique(dim=0)) == 7
    assert written.source.startswith("clip.pt sha256:")
    (tmp_path / "list").write_text("fox\n\nShootBall\nfox\nshoot_ball\n")
    assert call(text_cli, *given, "--classes", str(tmp_path / "list"), "--template", "the {}") == 0
    other = read_class_text(tmp_path / "out")
    assert (other.names, other.template) == (("fox", "shoot_ball"), "the {}")
    assert not torch.allclose(other.rows(["fox"]), written.rows(["fox"]))


def test_bad_input_of_the_command(clip_file: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "list").write_text("fox")
    (tmp_path / "empty").write_text("\n")
    torch.save({"visual.proj": torch.zeros(2)}, tmp_path / "visual.pt")
    good = {"clip": clip_file, "vocabulary": tmp_path / "words", "classes": tmp_path / "list", "out": tmp_path / "o"}
    for change, sentence in (
        ({"classes": tmp_path / "empty"}, "names no class"),
        ({"classes": tmp_path / "nowhere"}, "cannot be read as text"),
        ({"shards": tmp_path}, "give --shards DIR, or --classes FILE"),
        ({"clip": tmp_path / "visual.pt"}, "no CLIP text tower"),
        ({"clip": tmp_path / "nowhere.pt"}, "there is no such file"),
        ({"out": tmp_path / "no" / "folder"}, "there is no folder"),
        ({"template": "photo"}, "must have one {}"),
    ):
        options = [word for key, value in (good | change).items() for word in (f"--{key}", str(value))]
        assert call(text_cli, *options) == 2, change
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


# The way through the toolkit

METHOD = {"method": "clip-fsar", "trunk": "tiny", "trunk_weights": "random"}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("texts") / "text.safetensors")


@pytest.fixture(scope="module")
def finished(tiny_path: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run from beginning to end: 1-shot training, 2-shot test, with the control that reads no texts."""
    run = tmp_path_factory.mktemp("runs") / "clip"
    changes = {"method": "clip-fsar", "test_shot": 2, "episodes": 8, "val_every": 8, "support_merge": "prototype"}
    given = words(tiny_path, run, **changes)
    assert call(train_cli, *given, "--class-text", str(texts), "--shuffle-control", "--prototype-control") == 0
    return run


def test_a_run_trains_on_texts(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    assert (result["method"], result["shot"]) == ("clip-fsar", 2)
    assert {"shuffled_frames", "frozen_prototypes"} <= result.keys()
    first = json.loads((finished / "log.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(first["ce"] + first["class"], rel=1e-3)


def test_without_texts_a_run_says_what_it_leaves_out(tiny_path: Path, tmp_path: Path, capsys) -> None:
    few = {"method": "clip-fsar", "episodes": 2, "val_every": 2, "val_episodes": 1, "test_episodes": 1}
    assert call(train_cli, *words(tiny_path, tmp_path / "run", **few, checkpoint_every=2)) == 0
    assert "no --class-text" in capsys.readouterr().out
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert "class" not in log[0]


def test_evaluation_reads_the_runs_texts_or_others(finished: Path, tiny_path: Path, tmp_path: Path, capsys) -> None:
    out, given = tmp_path / "again.json", ["--weights", str(finished), "--shards", str(tiny_path)]
    assert call(evaluate_cli, *given, "--out", str(out)) == 0
    assert json.loads(out.read_text())["test"] == json.loads((finished / "result.json").read_text())["test"]
    assert call(evaluate_cli, *given, "--inference", "text", "--out", str(out)) == 0
    capsys.readouterr()
    assert call(evaluate_cli, *given, "--inference", "text", "--class-text", "") == 2
    assert "needs texts: give --class-text FILE" in capsys.readouterr().err
    few = write_random(tmp_path / "few.safetensors", ("fox", "ant"))
    assert call(evaluate_cli, *given, "--class-text", str(few)) == 2
    assert "no text for 1 of 2 classes (gnu)" in capsys.readouterr().err
    narrow = write_random(tmp_path / "narrow.safetensors", width=64)
    assert call(evaluate_cli, *given, "--class-text", str(narrow)) == 2
    assert "the trunk's frames have 128 channels" in capsys.readouterr().err


def test_the_texts_belong_to_the_run(finished: Path, texts: Path, tiny_path: Path, tmp_path: Path, capsys) -> None:
    table = json.loads((finished / "result.json").read_text())
    assert table["class_text_sha256"] == hashlib.sha256(texts.read_bytes()).hexdigest()
    assert table["inference"] == "visual"
    run = shutil.copytree(finished, tmp_path / "run")
    other = json.loads((run / "data.json").read_text()) | {"class_text": "0"}  # as if another file was there then
    (run / "data.json").write_text(json.dumps(other))
    assert call(train_cli, "--shards", str(tiny_path), "--run", str(run), "--resume") == 2
    assert "or other texts" in capsys.readouterr().err


def test_prediction_reads_texts_too(finished: Path, tiny_videos: Path, tmp_path: Path) -> None:
    for label in ("fox", "gnu"):
        (tmp_path / "examples" / label).mkdir(parents=True)
        (tmp_path / "examples" / label / "1.mp4").symlink_to(tiny_videos / label / f"{label}_g0_0.mp4")
    scores = []
    for changes in ({}, {"class_text": ""}):
        model, viewing = open_run(finished, **changes)
        support = read_support(model, find_examples(tmp_path / "examples"), viewing)
        (answer,) = predict(model, support, [tiny_videos / "fox" / "fox_g2_4.mp4"], viewing)
        scores.append(answer.scores)
    assert scores[0].keys() == {"fox", "gnu"}
    assert scores[0] != scores[1]


def config(texts: Path | str, **changes):
    small = {"way": 2, "test_way": 2, "queries": 1, "resize": 64, "crop": 64, "threads": 1, "executor": "portable"}
    return build_config(METHOD | small | {"class_text": str(texts), "num_classes": 3} | changes)


@pytest.mark.parametrize("options", [{}, {"inference": "combined"}, {"inference": "text"}])
def test_both_ways_of_evaluation_give_the_same_answers(texts: Path, tiny_shards: ShardSet, options: dict) -> None:
    model = build_model(config(texts, **options)).eval()
    cpu = torch.device("cpu")
    with open_episodes(
        tiny_shards, "test", config(texts, **options), trunk=model.trunk, device=cpu, training=False
    ) as loader:
        episode = next(iter(loader))
        names = [tiny_shards.dataset.classes[i] for i in episode.class_ids.tolist()]
        assert torch.equal(episode.class_text, read_class_text(texts).rows(names))
        embedded = collect_embedded(model, loader, 5)
        direct = collect(model, ((plan, episode) for plan, episode, _ in loader.planned(0, 5)))
    np.testing.assert_array_equal(embedded.said, direct.said)


def test_texts_of_the_training_classes_are_in_the_order_of_their_numbers(
    texts: Path, tiny_shards: ShardSet, tmp_path: Path
) -> None:
    with Trainer(config(texts), tiny_shards, tmp_path, device=torch.device("cpu")) as trainer:
        episode = next(iter(trainer.train_episodes))
        assert torch.equal(trainer.model.base_text[episode.base_ids], episode.class_text)


def test_runs_that_do_not_fit_are_refused_at_once(texts: Path, tiny_shards: ShardSet, tmp_path: Path) -> None:
    narrow = write_random(tmp_path / "narrow.safetensors", width=64)
    few = write_random(tmp_path / "few.safetensors", ("ant", "bee"))
    for changes, sentence in (
        ({"method": "otam", "num_classes": 0}, "otam reads no texts of classes"),
        ({"class_text": ""} | {"inference": "text"}, "give --class-text FILE"),
        ({"class_text": str(narrow)}, r"\[3, 64\] but the trunk's frames have 128"),
        ({"class_text": str(few)}, r"1 of 3 classes \(cat\)"),
        ({"class_text": str(tmp_path / "none")}, "no such file"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            Trainer(config(texts, **changes), tiny_shards, tmp_path, device=torch.device("cpu"))
