"""The documents: what their code blocks show runs, exists, or is what our commands print.

A shell block has one of two levels:
* run, on tutorial.md, format.md and adding-a-method.md: its lines are executed in order in a temporary folder, our
  commands in this process, the rest by bash. SMALL is appended to the long ones, which then take about a second. A
  text block below must be what they printed, numbers aside. Python blocks run too.
* checked, on all other pages and README.md: every line goes through its command's own parser; the
  configuration of fsar-train and fsar-pretrain is made as they make it for a shard set of that name, which checks
  recipes and values. Python blocks are compiled (those of api.md run in tests/docs/test_docs.py).
Messages in troubleshooting.md are compared with the texts of the sources.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from doc_blocks import (
    SHELL,
    blocks_of,
    check_setup_line,
    find_command,
    lines_of,
    parsed,
    run_command_line,
    shape_of,
    words_of,
)
from folders import ROOT

from fsar.cli import pretrain, train
from fsar.cli.options import overrides
from fsar.methods import METHODS
from fsar.pretraining import config as pretrain_config
from fsar.run import config
from fsar.trunks import create_trunk
from shards_spec.errors import FsarError

DOCS, RESULTS = ROOT / "docs", ROOT / "benchmarks" / "results"
ROOMS, HOLE = ("preprocess", "pipelines", "shards_spec", "fsar"), "\0"
FIGURES = ("accuracy-synthetic", "evaluate", "methods-cpu")
PAGES = sorted(DOCS.glob("*.md"))
DATASETS = ("ucf101", "hmdb51", "kinetics100", "kinetics400", "ssv2-full", "ssv2-small", "epic")
TRAIN_KINDS = config.all_keys()
PRETRAIN_KINDS = pretrain_config.all_keys()
TRUNK = ["--trunk", "tiny", "--trunk-weights", "trunk.pth"]
LOOP = {"episodes": 2, "val_every": 2, "checkpoint_every": 2, "log_every": 2, "val_episodes": 2, "test_episodes": 6}
LOOP |= {"frames": 4, "resize": 40, "crop": 32, "threads": 1, "executor": "portable", "queries": 1}
TRAIN = [word for key, value in LOOP.items() for word in (f"--{key.replace('_', '-')}", str(value))]
TWO = ["--way", "2", "--test-way", "2"]  # the stand-in for the demo's shards has no more classes
SMALL = {"fsar-train": [*TRAIN, *TRUNK], "fsar-eval": ["--episodes", "6", "--executor", "portable"]}
SMALL |= {"fsar-predict": ["--workers", "1"], "fsar-preprocess": ["--size", "64", "--workers", "1"]}
CLASSES = {"Drink": 2, "Jump": 3, "Pick": 2, "Pour": 2, "Push": 2, "Run": 4, "Stand": 2, "Walk": 4, "Wave": 2}
NAMES = {"Run": ("1_1", "11_1", "1_13", "11_2"), "Walk": ("10_1", "10_4", "14_1", "14_2")}


def make_folder(top: Path, videos: Path) -> None:
    """What a page's commands find where they stand: videos by class, and the weights of a small trunk."""
    files = sorted(videos.rglob("*.mp4"))
    for label, count in CLASSES.items():
        for n in range(count):
            name = NAMES.get(label, [f"1_{i}" for i in range(count)])[n]
            target = top / "videos" / label / f"{label}_{name}.mp4"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(files.pop(), target)
    torch.save(create_trunk("tiny").state_dict(), top / "trunk.pth")


def run_line(line: str) -> str:
    """Run one line of a page; what it printed."""
    words = words_of(line)
    check_setup_line(words)
    if words[0] == "pip":
        return ""
    if words[0] == "cd":
        os.chdir(words[1])
        return ""
    if find_command(words) is None:
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        return done.stdout
    words, into = (words[: words.index(">")], words[-1]) if ">" in words else (words, None)
    code, printed = run_command_line([*words, *small(words)])
    assert code == 0, f"{line}\n{printed}"
    if into:
        Path(into).write_text(printed)
    return printed


def small(words: list[str]) -> list[str]:
    """What is appended to a line so that it takes a second."""
    added = SMALL.get(words[0], [])
    if "../demo/shards" in words and words[0] == "fsar-train":
        return [*added, *TWO, "--trunk-weights", "random"]
    return [*added, *TRUNK] if words[0] == "fsar-eval" and "--trunk" in words else added


def run_page(page: str) -> dict[str, object]:
    """Run every block of a page, in order; the names that its Python leaves behind."""
    printed, names = "", {"__name__": "page"}
    for block in blocks_of(DOCS / page):
        if block.language in SHELL:
            printed = "\n".join(run_line(line) for line in lines_of(block))
        elif block.language == "python":
            exec(compile(block.text, f"{page}:{block.line}", "exec"), names)
        elif printed:
            seen = [shape_of(line) for line in printed.splitlines()]
            for line in block.text.splitlines():
                assert shape_of(line) in [[], *seen], f"{page}:{block.line} shows {line!r}, printed was\n{printed}"
    return names


def test_the_tutorial_runs_from_its_first_line_to_its_last(
    tiny_videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(tmp_path, tiny_videos)
    monkeypatch.chdir(tmp_path)
    run_page("tutorial.md")
    assert (tmp_path / "sheet.png").is_file()
    assert "<html" in (tmp_path / "runs" / "trx-folder-1shot" / "report.html").read_text()


def test_the_page_on_the_format_runs(tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(tiny_path, tmp_path / "shards")
    monkeypatch.chdir(tmp_path)
    assert run_page("format.md")["sample"]["label"] == "ant"
    text = (DOCS / "format.md").read_text()
    for name in {path.name for path in tiny_path.iterdir() if path.suffix not in {".tar", ".idx"}}:
        assert name in text or name.endswith(".json"), f"{name} of a shard set is not in format.md"


def test_the_page_on_a_method_of_ones_own_runs(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "shards").symlink_to(tiny_path)
    shutil.copy(DOCS / "nearest_frames.py", tmp_path / "docs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    run_page("adding-a-method.md")
    assert "'steady'" in capsys.readouterr().out
    assert "scale = 20.0" in (tmp_path / "runs" / "nearest-20" / "config.toml").read_text()
    shown = blocks_of(DOCS / "adding-a-method.md")[0].text
    assert (DOCS / "nearest_frames.py").read_text().endswith(shown)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_every_command_that_is_shown_exists(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("SHARDS", "demo/shards"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.syspath_prepend(str(DOCS))
    for block in blocks_of(page):
        if block.language == "python":
            compile(block.text, f"{page.name}:{block.line}", "exec")
        for line in lines_of(block) if block.language in SHELL else []:
            check_line(line, f"{page.name}:{block.line}: {line}")


@pytest.mark.parametrize(
    ("page", "start", "command"),
    [("ranks.md", "torchrun", "fsar.cli.train"), ("scale.md", "sbatch", "fsar-preprocess")],
)
def test_commands_inside_others_are_found(page: str, start: str, command: str) -> None:
    lines = [line for block in blocks_of(DOCS / page) if block.language in SHELL for line in lines_of(block)]
    found = [find_command(words_of(line)) for line in lines if line.startswith(start)]
    assert all(found)
    assert found[0][1] == command


def check_line(line: str, where: str) -> None:
    """One line of a shell block, without running it."""
    words = words_of(line.partition(" > ")[0])
    check_setup_line(words)
    assert find_command(words) or not words[0].startswith("fsar"), f"{where}: there is no such command"
    if find_command(words) is None or {"--help", "--recipes"} & set(words):
        return
    try:
        given = parsed(words)
        if words[0] in {"fsar-train", "fsar-pretrain"} and not str(given["recipe"]).endswith(".toml"):
            check_configuration(words[0], given)
    except (click.ClickException, FsarError) as error:
        pytest.fail(f"{where}: {error}")


def check_configuration(command: str, given: dict[str, Any]) -> None:
    """Make the configuration that a line of fsar-train or fsar-pretrain asks for."""
    folder = Path(str(given["folder"])).name
    name = folder if folder in DATASETS else "synthetic"
    module, kinds = (train, TRAIN_KINDS) if command == "fsar-train" else (pretrain, PRETRAIN_KINDS)
    styles = [given["recipe_style"]] if module is train else []
    keys = {key: value for key, value in given.items() if key in kinds.keys() - {"method", "recipe_style"}}
    module.resolve(name, given["method"], given["recipe"], *styles, overrides(keys, kinds))


def test_every_message_that_is_shown_is_one_of_ours() -> None:
    texts = texts_of_the_sources()
    blocks = [block for block in blocks_of(DOCS / "troubleshooting.md") if block.language == "text"]
    assert len(blocks) > 20
    for block in blocks:
        for line in block.text.splitlines():
            message = line.removeprefix("error: ")
            near = [text for text in texts if all(part in message for part in text.split(HOLE))]
            found = [re.search(".*".join(map(re.escape, text.split(HOLE))), message) for text in near]
            covered = max((len(hit[0]) for hit in found if hit), default=0)
            assert covered > 0.7 * len(message), f"troubleshooting.md:{block.line}: nothing prints {message!r}"


def texts_of_the_sources() -> set[str]:
    """Every line of text that is long enough to be a sentence, with a HOLE for each value."""
    found = set()
    for path in (path for room in ROOMS for path in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [part.value if isinstance(part, ast.Constant) else HOLE for part in parts]
            lines = "".join(text for text in texts if isinstance(text, str)).splitlines()
            found |= {line for line in lines if len(line) > 20 + line.count(HOLE)}
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
        assert link.startswith("https:") or (page.parent / link).exists(), f"{page.name} links to {link}"


def test_the_first_page_leads_to_all_others() -> None:
    links = set(re.findall(r"\]\(([\w-]+\.md)\)", (DOCS / "index.md").read_text()))
    assert {page.name for page in PAGES} - {"index.md"} <= links


def test_figures_of_methods_are_those_of_the_benchmarks() -> None:
    rows = {name: json.loads((RESULTS / f"{name}.json").read_text())["rows"] for name in FIGURES}
    accuracy = {row.get("run"): row["test"] for row in rows["accuracy-synthetic"] if row.get("run")}
    seconds = {(row["method"], row["shot"]): row["seconds_10000"] for row in rows["evaluate"]}
    cost = {(row["method"], row["scope"]): row["ours_ms"] for row in rows["methods-cpu"] if "backward" in row["pass"]}
    table = (DOCS / "choosing.md").read_text().split("## What each needs and costs")[1]
    cells = [
        [cell.strip(" `") for cell in line.split("|")[1:-1]] for line in table.splitlines() if re.match(r"\| `\w", line)
    ]
    assert {row[0] for row in cells} == set(METHODS) - {"motion"}  # which is a control, with a section of its own
    for method, _, correct, milliseconds, test in cells:
        about = accuracy[method]
        assert correct.startswith(f"{100 * about['accuracy']:.1f} ({100 * about['interval_videos']:.1f})")
        assert test == f"{seconds[method, 1]:.1f} / {seconds[method, 5]:.1f}"
        whole = cost.get((method, "head"), cost.get((method, "match")) if method in {"otam", "prototype"} else None)
        assert milliseconds == (f"{whole:.1f}" if whole else "")
