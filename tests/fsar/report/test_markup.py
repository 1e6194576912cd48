"""No name becomes markup: pages have the same tags and attributes whatever names they hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from fake_shards import FakeShards
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fsar.evaluation.accuracy import Result
from fsar.evaluation.comparison import Comparison
from fsar.report.pretraining import write_pretrain_report
from fsar.report.probe import page as probe_page
from fsar.report.probe import retrieval_examples
from fsar.report.run import write_report
from shards_spec.schema import Dataset
from shards_spec.splits.divisions import Division

PARTS = (
    "<script>alert(1)</script>", "</title>", "</style>", "</svg><img src=x onerror=alert(1)>", '" onload="x',
    "' onload='x", "<!--", "-->", "<![CDATA[", "&lt;", "&#60;b&#62;", "&", "<", ">", "=", "`", "|",
    "javascript:x", "\udce9", "é漢", " ",
)  # fmt: skip
texts = st.lists(st.sampled_from(PARTS), min_size=1, max_size=4).map("".join)
SPOKEN = {"title", "alt", "aria-label"}  # attributes that hold words


class Structure(HTMLParser):
    """Tags of a page with the names of their attributes, its words, and values of attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.words: list[str] = []
        self.values: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        self.words += [value or "" for name, value in attrs if name in SPOKEN]
        self.values += [value or "" for name, value in attrs if name not in SPOKEN]

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def handle_comment(self, data: str) -> None:
        self.tags.append(("comment", (data,)))

    def handle_endtag(self, tag: str) -> None:
        self.tags.append((f"/{tag}", ()))


def check(make: Callable[[str], str], text: str) -> None:
    """`make` turns a text that every name holds into a page."""
    plain, given_page = Structure(make("x" * len(text))), Structure(make(text))
    assert given_page.tags == plain.tags
    shown = text.encode(errors="backslashreplace").decode()
    assert any(shown in words for words in given_page.words)
    assert given_page.values == plain.values


def fake_accuracy(text: str) -> dict[str, Any]:
    names = [f"{n}{text}" for n in range(3)]
    confusion = {name: {other: 1 + (other == name) for other in names} for name in names}
    figures = {"accuracy": 0.5, "chance": 0.2, "queries": 9, "interval_episodes": 0.1, "interval_videos": 0.2}
    figures |= {"episodes": 9, "videos": 9}
    return figures | {"per_class": dict.fromkeys(names, 0.5), "confusion": confusion}


def provenance(text: str) -> dict[str, Any]:
    keys = (
        "fsar",
        "torch",
        "device",
        "precision",
        "weights_sha256",
        "shards_sha256",
        "method",
        "dataset",
        "trunk",
        "split",
    )
    splits = {f"train{text}": text}
    return dict.fromkeys(keys, text) | {"splits_sha256": splits, "coverage": {f"train{text}": [1, 2]}}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=texts)
def test_page_of_a_run(tmp_path: Path, text: str) -> None:
    log = [{"kind": "train", "n": 4, "loss": 1.0, "accuracy": 0.5, "episodes_per_s": 1.0, "data_wait": 0.1}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))

    def make(text: str) -> str:
        result = provenance(text) | {"test": fake_accuracy(text), "selected_on": text, "selected_after": 4}
        result |= {"shuffled_frames": fake_accuracy(text), "frozen_prototypes": fake_accuracy(text)}
        config = {"test_way": 5, "test_shot": 1, "trunk_weights": text, f"option {text}": [text]}
        return write_report(tmp_path, result, config).read_text()

    check(make, text)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=texts)
def test_page_of_pre_training(tmp_path: Path, text: str) -> None:
    def make(text: str) -> str:
        log = {"kind": "train", "n": 4, "epoch": 1.0, "loss": 1.0, "lr": 0.1, "samples_per_s": 1.0, "data_wait": 0.1}
        log |= {f"term {text}": 0.5, f"other {text}": 0.5, f"accuracy_{text}": 0.5}
        (tmp_path / "log.jsonl").write_text(json.dumps(log) + "\n")
        numbers = dict.fromkeys(("videos", "epochs", "steps", "batch", "seconds"), 4) | {"training": text}
        return write_pretrain_report(tmp_path, provenance(text) | numbers, {"trunk": text, text: text}).read_text()

    check(make, text)


@settings(max_examples=25, deadline=None)
@given(text=texts)
def test_page_of_a_probe(text: str) -> None:
    def make(text: str) -> str:
        shards = FakeShards(4, classes=4, size=(16, 16))
        shards.dataset = Dataset("fake", tuple(f"{n}{text}" for n in range(4)))
        shards.name = lambda row: f"{text}/{row}.avi"
        division = Division(text, np.arange(8), np.arange(8, 10), {})
        found = SimpleNamespace(found=torch.arange(10).reshape(2, 5) % 8)
        examples = retrieval_examples(shards, division, found)
        share = {"value": 0.5, "interval_wilson": [0.1, 0.9], "interval_groups": 0.1}
        probes = {text: {"accuracy": share, "chance": 0.25, "videos": 4, "without_short": {"videos": 4}}}
        result = provenance(text) | {"probes": probes, "seed": 0}
        result |= {key: {f"{key} {text}": text} for key in ("overlap", "division", "clips")}
        result["weights"] = {"trunk": text, "source": text}
        return probe_page(result, retrieval=examples).encode(errors="backslashreplace").decode()

    check(make, text)


def test_tables_of_a_comparison() -> None:
    """Viewers of Markdown take tags as they are, and a bar ends a cell."""
    figures = {key: value for key, value in fake_accuracy("").items() if key in Result.__annotations__}
    result = Result(**figures | {"per_class": {"<script>|": 0.5}, "confusion": {}})
    text = Comparison("a|<b>", {"a|<b>": result}, {}).to_markdown({"a|<b>": {"trunk": "<img>"}})
    assert "\\<script>\\|" in text
    assert all(text[place - 1] == "\\" for place, letter in enumerate(text) if letter == "<")
