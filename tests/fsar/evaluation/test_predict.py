"""Prediction from plain videos: the answers of training's own episodes, whatever else is asked, and every bad input."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from videos import moving_frames, write_video

from fsar.checkpoints import save_state
from fsar.cli.predict import cli, main
from fsar.episode import Episode
from fsar.evaluation.prediction import (
    Prediction,
    Viewing,
    find_examples,
    find_videos,
    open_run,
    predict,
    read_geometry,
    read_support,
)
from fsar.methods import FewShotMethod
from fsar.run.build import build_model
from fsar.run.config import build_config
from pipelines.augment.clips import render
from pipelines.episodes.stream import EpisodePlan, EpisodeStream
from pipelines.loader import create_executor
from preprocess.decode import Geometry
from shards_spec import FsarError, ShardSet
from shards_spec.errors import ConfigError


def make_run(folder: Path, **options: object) -> Path:
    """A run folder whose model has random weights."""
    table = {"method": "molo", "trunk": "tiny", "trunk_weights": "random", "num_classes": 3}
    table |= {"frames": 4, "resize": 64, "crop": 56, "device": "cpu"}
    config = build_config(table | options)
    save_state(folder / "checkpoints" / "last.safetensors", build_model(config), None, {"n": 0})
    (folder / "config.toml").write_text(config.to_toml())
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def support(tiny_videos: Path, tmp_path: Path) -> Path:
    """A CLASS/video tree of two classes with three and two examples."""
    top = tmp_path / "support"
    for label, count in (("ant", 3), ("bee", 2)):
        for path in sorted((tiny_videos / label).iterdir())[:count]:
            (top / label).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, top / label)
    return top


def ask(run: Path, examples: Mapping[str, Sequence[Path]], queries: Sequence[Path]) -> list[Prediction]:
    model, viewing = open_run(run)
    return list(predict(model, read_support(model, examples, viewing), queries, viewing))


def command(run: Path, support: Path, *queries: Path, options: Sequence[str] = ()) -> Result:
    call = ["--weights", run, "--support", support, "--workers", "2", *options, "--query", *queries]
    return CliRunner().invoke(cli, [str(word) for word in call])


def lines(output: str, first: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith(first)]


def episode_scores(model: FewShotMethod, shards: ShardSet, viewing: Viewing) -> tuple[EpisodePlan, torch.Tensor]:
    """Softmax of the logits [Q, way] that evaluation's own episodes give."""
    assert model.trunk is not None
    rules = replace(viewing.rules, way=2, shot=2, queries=2)
    plan = EpisodeStream(shards, "test", rules, seed=0).plan(0)
    executor = create_executor("portable", shards)
    frames = [executor.decode(reads) for reads in plan.reads]
    executor.close()
    constants = {"mean": model.trunk.mean, "std": model.trunk.std, "crop": rules.crop, "resize": rules.resize}
    clips = rules.parted(render(frames, plan.support + plan.query, **constants))
    ids = torch.from_numpy(plan.class_ids)
    support = clips[:4].unflatten(0, (2, 2))
    with torch.no_grad():
        output = model(Episode(support, clips[4:], torch.from_numpy(plan.query_labels), ids, -torch.ones_like(ids)))
    return plan, output.logits.double().softmax(dim=1)


CLIPS = {"frame_rule": "segment_clips", "clip_frames": 4, "clip_stride": 2}


@pytest.mark.parametrize(
    "options",
    [
        {"resize": 64, "crop": 56, "frame_rule": "segment"},
        {"resize": 48, "crop": 40, "frame_rule": "kinetics"},
        {"method": "otam", "trunk": "r2d18", "frames": 2} | CLIPS,
    ],
)
def test_answers_are_those_of_evaluation(
    tiny_shards: ShardSet, tiny_videos: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    folder = make_run(tmp_path, **options)
    (folder / "data.json").write_text('{"geometry": {"height": 64, "width": 64}}')
    model, viewing = open_run(folder, workers=2)
    plan, expected = episode_scores(model, tiny_shards, viewing)
    names = [tiny_shards.dataset.classes[i] for i in plan.class_ids]
    paths = [tiny_videos / tiny_shards.name(row) for row in plan.support_rows]
    found = read_support(model, {names[0]: paths[:2], names[1]: paths[2:]}, viewing)
    queries = [tiny_videos / tiny_shards.name(row) for row in plan.query_rows]
    answers = list(predict(model, found, queries, viewing))
    assert found.mask is None
    assert [answer.path for answer in answers] == queries
    assert [answer.frames for answer in answers] == tiny_shards.frames[plan.query_rows].tolist()
    got = torch.tensor([[answer.scores[name] for name in names] for answer in answers], dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(got[0], got[1], atol=1e-4)  # that the comparison could have failed


def test_together_as_alone(run: Path, tiny_videos: Path, support: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One answer each, in order: a video given twice, one that is an example, and one file name in two folders."""
    model, viewing = open_run(run)
    examples = find_examples(support)
    found = read_support(model, examples, viewing)
    other = Path(shutil.copy(tiny_videos / "cat" / "cat_g1_3.mp4", support.parent / "ant_g0_0.mp4"))
    dog = tiny_videos / "dog" / "dog_g0_1.mp4"
    queries = [dog, other, examples["ant"][0], dog]
    together = list(predict(model, found, queries, viewing))
    assert [answer.path for answer in together] == queries
    monkeypatch.setattr(
        "fsar.evaluation.prediction.VIDEOS_AT_ONCE", 2
    )  # several folders of shards for the examples too
    monkeypatch.setattr("fsar.evaluation.embeddings.BATCH", 1)
    found = read_support(model, examples, viewing)
    for ours, path in zip(together, queries, strict=True):
        (theirs,) = predict(model, found, [path], viewing)
        assert ours.scores == pytest.approx(theirs.scores, abs=1e-6)
        assert list(ours.scores.values()) == sorted(ours.scores.values(), reverse=True)
    assert together[1].scores != pytest.approx(together[2].scores, abs=1e-4)


def test_unequal_numbers_of_examples(run: Path, tiny_videos: Path, tmp_path: Path) -> None:
    """Padding changes no mean of a class: one example counts as much as that example twice."""
    one, *two = (tiny_videos / "ant" / "ant_g0_0.mp4", *sorted((tiny_videos / "bee").iterdir())[:2])
    again = Path(shutil.copy(one, tmp_path / "again.mp4"))
    query = [tiny_videos / "cat" / "cat_g0_0.mp4"]
    padded, doubled = ask(run, {"x": [one], "y": two}, query), ask(run, {"x": [one, again], "y": two}, query)
    assert padded[0].scores == pytest.approx(doubled[0].scores, abs=1e-6)


def test_command(run: Path, support: Path, tiny_videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad queries and a bad example are named, the others answered; nothing is left behind."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    bad = support / "ant" / "zero.avi"
    bad.touch()
    whole = tiny_videos / "cat" / "cat_g0_0.mp4"
    short = tmp_path / "short.mp4"
    short.write_bytes(whole.read_bytes()[:-900])
    result = command(run, support, short, whole, tmp_path / "missing.mp4", options=["--top", "1"])
    assert result.exit_code == 3
    (answer,) = lines(result.stdout, str(whole))
    assert answer.startswith((f"{whole}: ant (0.", f"{whole}: bee (0."))
    assert answer.count("(") == 1
    assert lines(result.stderr, "example") == [f"example left out: {bad}: not-a-video: the file is empty"]
    assert lines(result.stderr, f"failed: {short}: truncated: the container declares ")
    assert lines(result.stderr, f"failed: {tmp_path / 'missing.mp4'}: unreadable: No such file")
    assert lines(result.stderr, "2 of 3 videos could not be read")
    assert list((tmp_path / "tmp").iterdir()) == []


def test_json_of_a_folder(run: Path, support: Path, tiny_videos: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_videos / "dog", tmp_path / "q" / "deep")
    (tmp_path / "q" / "no.avi").write_text("no video")
    result = command(run, support, tmp_path / "q", options=["--json", "--examples", "1"])
    answers = {Path(entry["path"]).name: entry for entry in map(json.loads, result.stdout.splitlines())}
    assert result.exit_code == 3
    assert len(answers) == 6
    assert answers["no.avi"]["error"].startswith("not-a-video: ")
    good = answers["dog_g0_1.mp4"]
    assert good["frames"] == 15
    assert {entry["class"] for entry in good["classes"]} == {"ant", "bee"}
    assert sum(entry["score"] for entry in good["classes"]) == pytest.approx(1)
    first = {label: paths[:1] for label, paths in find_examples(support).items()}
    alone = ask(run, first, [Path(good["path"])])[0]
    assert {entry["class"]: entry["score"] for entry in good["classes"]} == pytest.approx(alone.scores, abs=1e-6)


def test_no_query_can_be_read(
    run: Path, support: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["--weights", run, "--support", support, "--query", tmp_path / "a.mp4", tmp_path / "b.mp4"]
    monkeypatch.setattr(sys, "argv", ["fsar-predict", *map(str, call)])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as end:
        main()
    errors = capsys.readouterr().err
    assert end.value.code == 2
    assert len(lines(errors, "failed: ")) == 2
    assert errors.splitlines()[-1] == "error: none of the 2 videos could be read"


def test_a_class_without_an_example(run: Path, support: Path) -> None:
    write_video(support / "gnu" / "still.mp4", moving_frames(0, 1))
    model, viewing = open_run(run)
    with pytest.raises(ConfigError, match=r'class "gnu" has no example that can be read \(.*still.mp4: one-frame: '):
        read_support(model, find_examples(support), viewing)
    (support / "gnu" / "still.mp4").unlink()
    with pytest.raises(ConfigError, match="gnu holds no video"):
        find_examples(support)


def test_bad_input_is_refused_before_any_decoding(run: Path, support: Path, tmp_path: Path) -> None:
    query = support / "ant" / "ant_g0_0.mp4"

    def refusal(run: Path, support: Path, *queries: Path, options: Sequence[str] = ()) -> str:
        error = command(run, support, *queries, options=options).exception
        assert isinstance(error, FsarError)
        return str(error)

    assert "is no run folder" in refusal(tmp_path, support, query)
    assert "best.safetensors is missing" in refusal(run, support, query, options=["--checkpoint", "best"])
    assert "is no folder; give one that holds" in refusal(run, tmp_path / "nowhere", query)
    assert "lies in no class folder" in refusal(run, support / "ant", query)
    (tmp_path / "empty").mkdir()
    assert "empty holds no video" in refusal(run, support, tmp_path / "empty")
    shutil.rmtree(support / "bee")
    assert "the examples are of 1 class (ant); give at least 2" in refusal(run, support, query)


def test_folders_as_queries(support: Path) -> None:
    ants = sorted((support / "ant").iterdir())
    (support / "ant" / "notes.txt").touch()
    assert find_videos([support / "ant", ants[1], Path("none.mp4")]) == [*ants, ants[1], Path("none.mp4")]


def test_geometry_of_a_run(run: Path, tmp_path: Path) -> None:
    assert read_geometry(run) == Geometry(64, 64)
    shutil.copy(run / "config.toml", tmp_path)
    for text, expected in (
        ('{"shards": "0"}', Geometry(64, 64)),
        ('{"geometry": {"short": 32}}', Geometry(short=32)),
        ('{"geometry": {"height": 48, "width": 64}}', Geometry(48, 64)),
    ):
        (tmp_path / "data.json").write_text(text)
        assert read_geometry(tmp_path) == expected
    for broken in ('{"height": 48}', '{"short": "32"}', '{"short": 0}', "48"):
        (tmp_path / "data.json").write_text(f'{{"geometry": {broken}}}')
        with pytest.raises(ConfigError, match=r"data.json is damaged: its geometry"):
            read_geometry(tmp_path)
