"""What the documentation shows runs as it stands."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
import torch
from click.testing import CliRunner

from fsar.cli.train import cli as train_cli
from fsar.episode import Episode
from fsar.methods import create_method
from tests.folders import ROOT

if TYPE_CHECKING:
    from pathlib import Path

DOCS = ROOT / "docs"


def test_every_block_of_the_library_page_runs(tiny_path: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / "api.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 11
    (tmp_path / "shards").symlink_to(tiny_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "docs"}
    for block in blocks:
        exec(compile(block, "docs/api.md", "exec"), names)
    assert "over 50 episodes" in capsys.readouterr().out
    names["shards"].close()


def test_the_method_of_ones_own_trains(tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    words = ["--shards", str(tiny_path), "--recipe", "demo", "--run", str(tmp_path / "run")]
    words += ["--method", "nearest_frames:NearestFrames", "--way", "2", "--test-way", "2", "--queries", "1"]
    words += ["--episodes", "4", "--val-every", "4", "--val-episodes", "2", "--test-episodes", "4"]
    done = CliRunner().invoke(train_cli, [*words, "--checkpoint-every", "4"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run" / "result.json").is_file()


def test_the_method_of_ones_own_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    model = create_method("nearest_frames:NearestFrames", trunk="tiny", frames=3).eval()
    support, query = torch.randn(2, 2, 3, 128), torch.randn(3, 3, 128)
    mask = torch.tensor([[True, True], [True, False]])
    numbers = torch.arange(2)
    episode = Episode(None, None, torch.tensor([0, 1, 1]), numbers, numbers, support_features=support,
                      query_features=query, support_mask=mask)  # fmt: skip
    logits = model(episode).logits
    for q in range(3):
        for c in range(2):
            frames = support[c][mask[c]].flatten(0, 1)
            wanted = torch.cosine_similarity(query[q][:, None], frames[None], dim=-1).amax(1).mean() * 10
            assert logits[q, c] == pytest.approx(wanted.item(), abs=1e-4)
