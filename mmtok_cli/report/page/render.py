"""Filling in the templates of the pages: one file that loads nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mmtok_cli.report.page.charts import FRAME

STYLES, SHAPES = 8, 5  # colours of the style sheet, shapes of the template


def render(template: str, **values: Any) -> str:
    """A page, which allows no script and no style but its own. Every text in `values` is escaped."""
    style, script = (Markup(_resource(name)) for name in ("page.css", "page.js"))
    pages = Environment(
        loader=PackageLoader("mmtok_cli.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return pages.get_template(template).render(
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
        styles=STYLES,
        shapes=SHAPES,
        **{"frame": FRAME, **values},
    )


def _resource(name: str) -> str:
    return resources.files("mmtok_cli.report.page").joinpath(name).read_text(encoding="utf-8").strip()


def _hash(text: str) -> str:
    """The source expression by which a content security policy allows this very text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
