"""Pages: any name is escaped, each stands by itself, and a browser shows all of it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from browser import Browser, find_browser
from click.testing import CliRunner
from jinja2 import UndefinedError
from test_examples import SMALL, random_answers

from fsar.checkpoints import save_state
from fsar.cli.evaluate import cli as evaluate_cli
from fsar.cli.train import resolve
from fsar.evaluation.accuracy import summarise
from fsar.evaluation.comparison import compare
from fsar.evaluation.overlap import training_record
from fsar.matching import Pair
from fsar.report.comparison import comparison_page
from fsar.report.examples import Clip, ComparedClass, Confusion, DecodedMotion, Examples, QueryExample
from fsar.report.html import render, templates
from fsar.report.pictures import jpeg_uri
from fsar.report.pretraining import pretrain_page
from fsar.report.probe import Neighbours, Video
from fsar.report.probe import page as probe_page
from fsar.report.run import page
from fsar.run.build import build_model
from shards_spec import ShardSet
from shards_spec.cli.peek import peek
from shards_spec.peek.html import write_html
from shards_spec.peek.sheet import Block, Row
from shards_spec.peek.sheet_page import write_page

EVIL = "<script>alert(1)</script>'\"&\udcff"


def fake_examples(label: str) -> Examples:
    frame = jpeg_uri(np.full((40, 40, 3), 90, np.uint8))
    clip = Clip(label, label, [frame] * 3, [frame] * 2, 1.0)
    pairs = [Pair(0, 1, 1.0, 0.0, 0.5), Pair(1, 1, 1.0, 1.0, 0.7), Pair(2, 2, 0.0, 0.3, 0.1)]
    member = ComparedClass(clip, -1.0, 1, {"frames": pairs, "motion": pairs[:2]}, of_mean=False)
    decoded = DecodedMotion("difference", [frame] * 2, [frame] * 2, 0.1, 0.2)
    query = QueryExample(3, clip, right=False, predicted=member, other=member, decoded=decoded)
    return Examples([query], [Confusion(label, label, 3, 9, frame, frame)])


def fake_result(label: str) -> dict:
    answers = random_answers(1)
    test = summarise(answers, [label, "b", "c", "d", "e"])
    return {
        "method": label, "dataset": label, "test": test.to_json(), "split": label, "checkpoint": label, "fsar": "1",
        "torch": "2", "device": label, "precision": "fp32", "weights_sha256": "a" * 64, "shards_sha256": "b" * 64,
        "splits_sha256": {label: "c" * 64}, "coverage": {label: [1, 2]}, "left_out": [label], "shuffled": True,
        "overlap": {"classes": 1, "videos": 2},
    }  # fmt: skip


def hostile_probe() -> str:
    video = Video(EVIL, EVIL, jpeg_uri(np.full((40, 40, 3), 90, np.uint8)))
    other = video._replace(label="other")
    share = {"value": 0.5, "interval_wilson": [0.1, 0.9], "interval_groups": 0.1}
    probes = {EVIL: {"accuracy": share, "chance": 0.25, "videos": 4, "without_short": {"videos": 4}}}
    result = fake_result(EVIL) | {"probes": probes, "seed": 0, "weights": {"trunk": EVIL, "source": EVIL}}
    result |= {key: {EVIL: EVIL} for key in ("overlap", "division", "clips")}
    return probe_page(result, retrieval=[Neighbours(video, [video, *[other] * 4])])


def hostile_pretraining(log: list[dict]) -> str:
    records = [record | {"epoch": record["n"] / 8, "lr": 0.1, "samples_per_s": 1.0, EVIL: 0.1} for record in log]
    numbers = dict.fromkeys(("videos", "epochs", "steps", "batch", "seconds"), 4) | {"training": EVIL, "trunk": EVIL}
    sheets = {EVIL: jpeg_uri(np.full((40, 900, 3), 90, np.uint8), side=900)}
    return pretrain_page(EVIL, fake_result(EVIL) | numbers, {EVIL: EVIL}, records, sheets=sheets)


def hostile_pages() -> dict[str, str]:
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
        "report": page(EVIL, fake_result(EVIL), config, log, examples=fake_examples(EVIL)),
        "comparison": comparison_page(made, details, {EVIL: "a"}, facts),
        "probe": hostile_probe(),
        "pre-training": hostile_pretraining(log),
        "peek": write_page(EVIL, [EVIL], [Block(EVIL, EVIL, (40, 50), [row])]),
    }


def test_no_name_becomes_markup() -> None:
    for name, text in hostile_pages().items():
        assert "<script" not in text, name
        assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 3
        attributes = re.findall(r"<[^>]*alert[^>]*>", text)
        assert all("&#39;&#34;&amp;" in each for each in attributes)  # no quote ends one
        assert not re.search(r'(?:src|href)=(?!"data:)', text)


def test_a_variable_that_a_template_lacks_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="figures"):
        render("probe.html", heading="x")


def test_sections_say_what_was_matched() -> None:
    examples = fake_examples("jump")
    sections = templates().get_template("examples.html").module
    text = sections.queries(examples.queries)
    assert text.count("<line ") == 2 * (3 + 2)
    assert "cosine 0.70" in text
    assert "class=query x1=3 y1=0 x2=1 y2=2 " in text  # support frame 2 above, query frame 1 below
    assert "class=query x1=1 y1=0 x2=3 y2=2 " in text  # and the other way round
    assert text.count("error 0.50 of no motion") == 2  # of the query, and over all
    assert "as the wheel" not in text
    assert "3 of 9 queries (33%)" in sections.confusions(examples.confusions)
    assert sections.queries([]).strip() == sections.confusions([]).strip() == ""
    assert "unlabelled" not in text
    faint = replace(
        examples.queries[0].predicted, pairs={"frames": [Pair(0, 0, 0.02, 0, 0.5), Pair(1, 1, 0.01, 0, 0.5)]}
    )
    told = sections.queries([replace(examples.queries[0], predicted=faint, unlabelled=True)])
    assert 'opacity="1.00"><title>query 1, class 1' in told  # the largest
    assert 'opacity="0.50"><title>query 2, class 2' in told
    assert "unlabelled videos count in the scores, not in the lines" in told


def test_sections_say_what_motion_is_shown() -> None:
    (query,) = fake_examples("jump").queries
    sections = templates().get_template("examples.html").module
    colours, together, unseen = "red right, yellow down, cyan left, violet up", "both streams", "not seen by the model"
    said = {
        "of frames": sections.queries([query]),
        "of both": sections.queries([replace(query, motion="flow")]),
        "of motion": sections.queries([replace(query, motion="flow", sees_frames=False, decoded=None)]),
        "of differences": sections.queries([replace(query, motion="difference", sees_frames=False, decoded=None)]),
    }
    for text, names in ((colours, {"of both", "of motion"}), (together, {"of both"})):
        assert {name for name, section in said.items() if text in section} == names
    assert {name for name, section in said.items() if unseen in section} == {"of motion", "of differences"}


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
            seen = training_record(shards, shards.split_rows("train"))
            weights = top / name / "checkpoints" / "last.safetensors"
            save_state(weights, build_model(config), None, {"n": 0}, trained_on=seen)
            (top / name / "config.toml").write_text(config.to_toml())
    made = {name: top / f"{name}.html" for name in ("evaluation", "motion", "several", "sheet")}
    shared = ["--shards", str(tiny_path)]
    for command, words in (
        (evaluate_cli, ["--weights", top / "molo", *shared, "--report", made["evaluation"], "--out", top / "r.json"]),
        (evaluate_cli, ["--method", "motion", "--way", 2, "--groups", "any", *shared, "--report", made["motion"]]),
        (evaluate_cli, ["--compare", top / "molo", top / "otam", *shared, "--report", made["several"]]),
        (peek, [tiny_path, "--videos", 3, "--frames", 4, "--out", made["sheet"]]),
    ):
        CliRunner().invoke(command, [str(word) for word in words], catch_exceptions=False)
    for name, text in hostile_pages().items():
        made[f"hostile {name}"] = top / f"hostile-{name}.html"
        write_html(made[f"hostile {name}"], text)
    return made


def test_the_commands_write_pages_that_say_their_figures(pages: dict[str, Path]) -> None:
    result = json.loads((pages["evaluation"].parent / "r.json").read_text())
    text = pages["evaluation"].read_text()
    for figure in (f"{result['test']['accuracy']:.1%}", result["weights_sha256"], result["shards_sha256"], "fox"):
        assert figure in text
    assert text.count("<section class=example>") >= 2
    assert "reconstructed" in text
    assert text.count(" queries (") == len(list(re.finditer("<figcaption><b>", text)))
    motion = pages["motion"].read_text()
    assert motion.count("<section class=example>") >= 2
    assert motion.count("violet up") == 1
    several = pages["several"].read_text()
    assert several.count("<svg") == 3 + 2  # accuracies of both and of stored motion, differences from the first
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
