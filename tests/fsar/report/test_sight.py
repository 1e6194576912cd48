"""What reports show: the queries and frames of the evaluation itself, any name escaped, pages that stand alone."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from browser import Browser, find_browser
from click.testing import CliRunner

from fsar.checkpoints import save_state
from fsar.cli.evaluate import cli as evaluate_cli
from fsar.cli.train import resolve
from fsar.evaluation.accuracy import Answers, answer, summarise
from fsar.evaluation.comparison import compare
from fsar.evaluation.embeddings import embed_rows, places_in_embedding
from fsar.evaluation.logits import EpisodeVideos, episode_logits
from fsar.evaluation.overlap import seen_in
from fsar.loader import EpisodeLoader
from fsar.matching import Pair
from fsar.methods import FewShotMethod
from fsar.report.comparison import comparison_page
from fsar.report.matches import Clip, Confused, Member, Shown, Sight, choose_queries, look
from fsar.report.matches_page import confused_section, episodes_section
from fsar.report.pictures import data_uri, motion_pictures, seeable
from fsar.report.run import html_bytes, page
from fsar.run.build import build_model, open_episodes
from shards_spec import ShardSet
from shards_spec.cli.peek import peek
from shards_spec.peek.sheet import Block, Row
from shards_spec.peek.sheet_page import write_page

SMALL = {
    "test_way": 2, "test_episodes": 6, "resize": 64, "crop": 32, "frames": 4, "threads": 1, "executor": "portable",
    "num_classes": 3,
}  # fmt: skip
EVIL = "<script>alert(1)</script>'\"&\udcff"


def random_answers(seed: int) -> Answers:
    """200 episodes of 3 of 5 classes, two queries each, of 20 videos a class; two of three right."""
    rng = np.random.default_rng(seed)
    classes = np.stack([rng.permutation(5)[:3] for _ in range(200)])
    truth = np.repeat(classes, 2, axis=1)
    other = np.stack([rng.choice(row, 6) for row in classes])
    said = np.where(rng.random(truth.shape) < 0.5, truth, other)
    return Answers(classes, 20 * classes, 20 * truth + rng.integers(1, 20, truth.shape), truth, said)


@pytest.mark.parametrize("accuracy", ["some", "all", "none"])
def test_half_of_the_queries_shown_are_wrong_where_there_are_as_many(accuracy: str) -> None:
    answers = random_answers(0)
    wrong = answers.classes[:, [1, 1, 2, 2, 0, 0]]
    answers = replace(answers, said={"some": answers.said, "all": answers.truth, "none": wrong}[accuracy])
    chosen = choose_queries(answers, 6, seed=1)
    assert chosen == choose_queries(answers, 6, seed=1) != choose_queries(answers, 6, seed=2)
    assert len(chosen) == 6
    right = [answers.truth[n, q] == answers.said[n, q] for n, q, _ in chosen]
    assert right == {"some": [False] * 3 + [True] * 3, "all": [True] * 6, "none": [False] * 6}[accuracy]
    assert all(answers.classes[n, said] == answers.said[n, q] for n, q, said in chosen)
    assert len({int(answers.query[n, q]) for n, q, _ in chosen[:3]}) == 3
    assert len({int(answers.truth[n, q]) for n, q, _ in chosen[:3]}) == 3  # a class each


@torch.no_grad()
def scores(model: FewShotMethod, loader: EpisodeLoader, *, shuffled: bool) -> torch.Tensor:
    """Logits [6, Q, way] as the evaluation has them: of videos embedded before, or of whole episodes."""
    model.eval()
    if loader.draws_each_time:
        return torch.stack([model(episode).logits for episode in loader.episodes(0, 6)])
    rows = EpisodeVideos.of([loader.stream.choose(n) for n in range(6)], unlabelled=model.reads_unlabelled)
    videos = rows.videos()
    embedding = embed_rows(loader, model, videos, shuffled=shuffled)
    return torch.cat(list(episode_logits(model, embedding, places_in_embedding(loader, rows, videos))))


@pytest.mark.parametrize(
    ("method", "changes", "shuffled"),
    [
        ("molo", {}, False),
        ("molo", {"test_frames": "random", "views": 3, "test_shot": 2}, True),
        ("otam", {"test_frames": "random", "test_shot": 2}, False),
        ("hyrsm", {"test_shot": 2}, True),
        ("hyrsm++", {"unlabelled_per_class": 1}, False),
        ("otam", {"trunk": "tiny3d", "frame_rule": "segment_clips", "clip_frames": 3, "clip_stride": 1}, False),
        ("ctx", {"test_shot": 2}, False),
        ("trx", {}, False),
    ],
)
def test_what_is_shown_is_what_the_evaluation_saw(
    tiny_shards: ShardSet, method: str, changes: dict, shuffled: bool
) -> None:
    config = replace(resolve("synthetic", method, "demo", None, SMALL | {"groups": "any"}), **changes)
    model = build_model(config)
    device = torch.device("cpu")
    with open_episodes(tiny_shards, "test", config, trunk=model.trunk, device=device, training=False) as loader:
        answers, expected = answer(model, loader, 6, shuffled=shuffled), scores(model, loader, shuffled=shuffled)
        model.train()
        sight = look(model, loader, answers, shuffled=shuffled, seed=3)
        again = look(model, loader, answers, shuffled=shuffled, seed=3)
    assert model.training
    assert sight == again
    assert 2 <= len(sight.shown) <= 6
    for one, (n, query, said) in zip(sight.shown, choose_queries(answers, len(sight.shown), seed=3), strict=True):
        assert one.said.score == pytest.approx(float(expected[n, query, said]), abs=1e-4)  # of the very same frames
        assert one.said.score >= one.other.score
        assert one.right == (one.query.label == one.said.clip.label)
        assert one.other.clip.label != one.said.clip.label
        assert one.right or one.other.clip.label == one.query.label
        assert (len(one.query.frames), len(one.query.motion)) == (4, 3)
        assert len(one.decoded) == (3 if method == "molo" else 0)
        assert one.said.of_mean == (config.test_shot > 1 and method in {"molo", "hyrsm"})
        lines = {"molo": {"frames", "motion"}, "trx": set()}.get(method, {"frames"})
        assert set(one.said.pairs) == lines
        assert all(one.said.pairs.values())
        assert one.unlabelled == (method == "hyrsm++")
        for pairs in one.said.pairs.values():
            assert {pair.query for pair in pairs} == set(range(max(p.query for p in pairs) + 1))
    result = summarise(answers, tiny_shards.dataset.classes)
    for pair in sight.confused:
        assert result.confusion[pair.truth][pair.said] == pair.count
        assert sum(result.confusion[pair.truth].values()) == pair.queries


def test_pictures_of_motion_and_of_the_dark() -> None:
    change = torch.tensor([0.0, 0.5, -0.5, 2.0]).view(1, 1, 1, 4).expand(1, 3, 1, 4)
    assert motion_pictures(change, 1.0)[0][0, :, 0].tolist() == [128, 191, 64, 255]
    dark = np.full((8, 8, 3), 20, np.uint8)
    assert seeable(dark).max() == 160  # at most 8 times
    assert np.array_equal(seeable(dark + 120), dark + 120)


def fake_sight(label: str) -> Sight:
    frame = data_uri(np.full((40, 40, 3), 90, np.uint8))
    clip = Clip(label, label, [frame] * 3, [frame] * 2, 1.0)
    pairs = [Pair(0, 1, 1.0, 0.0, 0.5), Pair(1, 1, 1.0, 1.0, 0.7), Pair(2, 2, 0.0, 0.3, 0.1)]
    member = Member(clip, -1.0, 1, {"frames": pairs, "motion": pairs[:2]}, of_mean=False)
    shown = Shown(3, clip, right=False, said=member, other=member, decoded=[frame] * 2, error=(0.1, 0.2))
    return Sight([shown], [Confused(label, label, 3, 9, frame, frame)])


def fake_result(label: str) -> dict:
    answers = random_answers(1)
    test = summarise(answers, [label, "b", "c", "d", "e"])
    return {
        "method": label, "dataset": label, "test": test.to_json(), "split": label, "checkpoint": label, "fsar": "1",
        "torch": "2", "device": label, "precision": "fp32", "weights_sha256": "a" * 64, "shards_sha256": "b" * 64,
        "splits_sha256": {label: "c" * 64}, "coverage": {label: [1, 2]}, "left_out": [label], "shuffled": True,
        "overlap": {"classes": 1, "videos": 2},
    }  # fmt: skip


def hostile_pages() -> dict[str, bytes]:
    """A page of each kind whose every name is markup."""
    answers, classes = random_answers(1), [EVIL, "b", "c", "d", "e"]
    config = {"test_way": 3, "test_shot": 1, "trunk": EVIL}
    log = [{"kind": "train", "n": 4 * n, "loss": 1 / n, "accuracy": n / 9, "episodes_per_s": 2, "data_wait": 0.1}
           for n in range(1, 9)]  # fmt: skip
    made = compare({EVIL: answers, "other": replace(random_answers(1), said=answers.truth)}, classes, baseline=EVIL)
    facts = {
        "dataset": EVIL, "split": EVIL, "way": 3, "shot": 1, "eval_seed": 0, "shuffled": True, "styles": [EVIL, "x"],
        "left_out": [EVIL], "shards_sha256": "a", "splits_sha256": {EVIL: "b"}, "episodes_sha256": None,
        "groups": "any", "fsar": "1", "torch": "2",
    }  # fmt: skip
    details = {EVIL: {"method": EVIL, "trunk": "t"}, "other": {"method": "m", "trunk": "t"}}
    row = Row((EVIL, EVIL), [np.zeros((40, 50, 3), np.uint8), None], [EVIL, "2"])
    return {
        "report": html_bytes(page(EVIL, fake_result(EVIL), config, log, sight=fake_sight(EVIL))),
        "comparison": html_bytes(comparison_page(made, details, {EVIL: "a"}, facts)),
        "peek": html_bytes(write_page(EVIL, [EVIL], [Block(EVIL, EVIL, (40, 50), [row])])),
    }


def test_no_name_becomes_markup() -> None:
    for name, data in hostile_pages().items():
        text = data.decode()
        assert "<script" not in text, name
        assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 3
        attributes = re.findall(r"<[^>]*alert[^>]*>", text)
        assert all("&#x27;&quot;&amp;" in each for each in attributes)  # quotes do not end an attribute
        assert not re.search(r'(?:src|href)=(?!"data:)', text)


def test_sections_say_what_was_matched() -> None:
    sight = fake_sight("jump")
    text = "".join(episodes_section(sight))
    assert text.count("<line ") == 2 * (3 + 2)
    assert "cosine 0.70" in text
    assert 'x1=3 y1=0 x2=1 y2=2 stroke="#1f6feb"' in text  # support frame 2 above, query frame 1 below
    assert 'x1=1 y1=0 x2=3 y2=2 stroke="#1f6feb"' in text  # and the other way round
    assert "mean squared error 0.1; of no motion at all 0.2" in text
    assert "3 of 9 queries (33%)" in "".join(confused_section(sight.confused))
    assert list(episodes_section(Sight([], []))) == []
    assert "unlabelled" not in text
    faint = replace(sight.shown[0].said, pairs={"frames": [Pair(0, 0, 0.02, 0, 0.5), Pair(1, 1, 0.01, 0, 0.5)]})
    told = "".join(episodes_section(Sight([replace(sight.shown[0], said=faint, unlabelled=True)], [])))
    assert 'opacity="1.00"><title>query 1, class 1' in told  # beside the largest
    assert 'opacity="0.50"><title>query 2, class 2' in told
    assert "unlabelled videos count in the scores, not in the lines" in told


def test_a_sheet_shows_a_picture_that_is_very_narrow() -> None:
    row = Row(("rgb",), [np.zeros((400, 1, 3), np.uint8)], ["1"])
    assert write_page("t", [], [Block("h", "f", (400, 1), [row])]).count("<img") == 1


@pytest.fixture(scope="module")
def pages(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages that the commands wrote, and hostile ones."""
    top = tmp_path_factory.mktemp("pages")
    with ShardSet.open(tiny_path) as shards:
        for name in ("molo", "otam"):
            config = resolve("synthetic", name, "demo", None, SMALL)
            seen = seen_in(shards, shards.split_rows("train"))
            weights = top / name / "checkpoints" / "last.safetensors"
            save_state(weights, build_model(config), None, {"n": 0}, seen=seen)
            (top / name / "config.toml").write_text(config.to_toml())
    made = {name: top / f"{name}.html" for name in ("evaluation", "several", "sheet")}
    shared = ["--shards", str(tiny_path)]
    for command, words in (
        (evaluate_cli, ["--weights", top / "molo", *shared, "--report", made["evaluation"], "--out", top / "r.json"]),
        (evaluate_cli, ["--compare", top / "molo", top / "otam", *shared, "--report", made["several"]]),
        (peek, [tiny_path, "--videos", 3, "--frames", 4, "--out", made["sheet"]]),
    ):
        CliRunner().invoke(command, [str(word) for word in words], catch_exceptions=False)
    for name, data in hostile_pages().items():
        made[f"hostile {name}"] = top / f"hostile-{name}.html"
        made[f"hostile {name}"].write_bytes(data)
    return made


def test_the_commands_write_pages_that_say_their_figures(pages: dict[str, Path]) -> None:
    result = json.loads((pages["evaluation"].parent / "r.json").read_text())
    text = pages["evaluation"].read_text()
    for figure in (f"{result['test']['accuracy']:.1%}", result["weights_sha256"], result["shards_sha256"], "fox"):
        assert figure in text
    assert text.count("<section class=shown>") >= 2
    assert "reconstructed" in text
    assert text.count(" queries (") == len(list(re.finditer("<figcaption><b>", text)))
    several = pages["several"].read_text()
    assert several.count("<svg") == 2 * 1 + 1  # accuracies of both, one difference
    sheet = pages["sheet"].read_text()
    assert sheet.count("<section>") == 3
    assert sheet.count("<img") == 3 * 3 * 4 + 1  # three series, four frames, the colour wheel
    assert all(path.stat().st_size < 3e6 for path in pages.values())


def test_pages_in_a_browser(pages: dict[str, Path], tmp_path: Path) -> None:
    program = find_browser()
    if program is None:
        pytest.skip("no chromium is installed: pages are not rendered")
    with Browser(program, tmp_path) as browser:
        for name, path in pages.items():
            for width in (1250, 390):
                seen = browser.look_at(path, width=width)
                facts = SimpleNamespace(**seen.facts)
                assert (seen.requests, seen.messages, facts.outside, facts.scripts) == ([], [], [], 0), name
                assert all(natural > 0 for natural in facts.widths), name
                assert len(facts.widths) > 0 or "several" in name or "comparison" in name
                assert facts.empty == 0, name
                assert facts.scroll <= width, f"{name} is wider than a window of {width}"
                assert facts.height < 15_000
                assert EVIL[:8] in facts.text or "hostile" not in name  # shown as text
