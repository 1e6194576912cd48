"""Pages as HTML from the templates of this room."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment

from fsar.report.drawings import match_lines
from shards_spec.peek.html import page_templates

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, **values: Any) -> str:  # noqa: ANN401 -- a template takes any value
    """Fill a template of this room; the page refers to nothing outside itself."""
    return templates().get_template(template).render(values)


@cache
def templates() -> Environment:
    """Open the templates of this room, with the filters that they use."""
    environment = page_templates(TEMPLATES)
    environment.filters |= {
        "percent": lambda share, digits=1: f"{share:.{digits}%}",
        "points": lambda share: f"{100 * share:+.1f}",
        "thousands": lambda count: f"{count:,}",
        "match_lines": match_lines,
    }
    return environment
