"""What preprocessing says of each series: its share, who reads it, and how to leave it out."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from folders import ROOT
from videos import moving_frames, write_video

from fsar.cli import cluster, pretrain, train
from fsar.methods import METHODS
from fsar.pretraining import PRETRAINING
from fsar.run.config import all_keys
from preprocess.cli import cli
from preprocess.report import READERS

COMMANDS = {"fsar-train": train.cli, "fsar-cluster": cluster.cli, "fsar-pretrain": pretrain.cli}
SAID = re.compile(r"  (\w+): (.*?); read by (.*?)(?:; without it: --motion (\S+)(.*))?")
# Options in the texts: the command where it is named, the option, a value
NAMED = re.compile(r"(fsar-[a-z]+ )?(--[a-z-]+) ([a-z0-9]+)")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    for n in range(2):
        write_video(folder / "ab"[n] / "v.mp4", moving_frames(n, 12, size=(48, 64)))
    return folder


def said(videos: Path, out: Path, motion: str, *options: str) -> dict[str, list[str]]:
    """Series -> share, readers, the --motion that leaves it out, and what else that takes."""
    args = ["folder", "--videos", videos, "--out", out, "--size", 64, "--workers", 1, "--motion", motion, *options]
    result = CliRunner().invoke(cli, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == 0
    lines = [SAID.fullmatch(line) for line in result.stdout.splitlines()]
    return {line[1]: list(line.groups()[1:]) for line in lines if line}


def test_the_dry_run_says_who_reads_what_before_it_is_made(videos: Path, tmp_path: Path) -> None:
    found = said(videos, tmp_path / "set", "diff,flow,flow8g2", "--dry-run")
    assert list(found) == ["rgb", "diff1", "flow1", "flow8g2"]
    assert found["rgb"][1:] == [READERS["rgb"], None, None]
    assert found["diff1"][1:] == [READERS["diff1"], "flow,flow8g2", ""]
    assert found["flow1"][1:] == [READERS["flow1"], "diff,flow8g2", ""]
    assert found["flow8g2"][1:] == [READERS["flowDgG"].format(series="flow8g2"), "diff,flow", ""]
    shares = [re.fullmatch(r"(\d+)% of the bytes, \d+% of the time", share) for share, *_ in found.values()]
    assert sum(int(share[1]) for share in shares) == pytest.approx(100, abs=2)


def test_the_end_of_a_run_says_it_of_all_that_the_folder_holds(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    assert list(said(videos, out, "none")) == ["rgb"]
    assert said(videos, out, "flow")["flow1"][2:] == ["none", " in another --out folder"]
    found = said(videos, out, "diff")  # the flow stays
    assert [row[1] for row in found.values()] == [READERS[name] for name in ("rgb", "diff1", "flow1")]
    for name, (share, *_) in found.items():
        size = sum(path.stat().st_size for path in out.glob(f"{name}-*.tar"))
        whole = sum(path.stat().st_size for path in out.glob("*.tar"))
        assert share == f"{size / 1e6:.1f} MB, {size / whole:.0%} of the bytes"


def test_the_page_on_the_format_says_the_same() -> None:
    page = (ROOT / "docs" / "format.md").read_text().replace("`", "")
    for name, readers in READERS.items():
        series = name.replace("flowDgG", "flow8g2")
        assert f"\n| {series} | {readers.format(series=series)} |\n" in page


def options() -> list[object]:
    """Each option that the texts name: its command, its name, its value."""
    found = sorted({(c.strip() or "fsar-train", o, v) for text in READERS.values() for c, o, v in NAMED.findall(text)})
    return [pytest.param(*each, id=" ".join(each)) for each in found]


@pytest.mark.parametrize(("command", "option", "value"), options())
def test_the_options_of_readers_exist(command: str, option: str, value: str) -> None:
    (found,) = [each for each in COMMANDS[command].params if option in each.opts]
    if option == "--method":
        assert value in {"fsar-train": METHODS, "fsar-pretrain": PRETRAINING}[command]
    elif isinstance(found.type, click.Choice):
        assert value in found.type.choices
    else:
        assert value in all_keys()[found.name].choices or not all_keys()[found.name].choices
