"""The library page runs as it stands, and the example of a method is right (other pages: test_doc_pages.py)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from folders import ROOT

from fsar.episode import Episode
from fsar.methods import create_method

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
