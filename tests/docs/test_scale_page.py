"""The figures of docs/scale.md are those that its own code computes from the measured rows."""

from __future__ import annotations

import re

from folders import ROOT


def test_the_figures_are_computed_from_the_results(monkeypatch, capsys) -> None:
    page = (ROOT / "docs" / "scale.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(ROOT)
    exec(compile(block, "docs/scale.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 13
    for line in printed:
        assert f"\n{line}\n" in page or f"\n* {line}\n" in page
