"""Fills the templates in ``assets`` and puts styles, scripts and data into the page itself."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError

ASSETS = Path(__file__).parent / "assets"


def render_page(template: str, **values: Any) -> str:
    """The text of the page ``assets/<template>``. Raises ValueError if the values do not fit the template."""
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["asset"] = inline_asset
    environment.filters |= {"embed": embed_json, "number": format_number, "seconds": format_seconds}
    try:
        return environment.get_template(template).render(**values)
    except TemplateError as error:
        raise ValueError(f"{template}: {type(error).__name__}: {error}") from error


def inline_asset(name: str) -> str:
    """A style or script of ours or of a library. Raises ValueError if it would end its own element."""
    text = (ASSETS / name).read_text(encoding="utf-8")
    if "</script" in text.lower() or "</style" in text.lower():
        raise ValueError(f"{name} holds a closing tag; expected text that can stand inside its element")
    return text


def embed_json(value: Any) -> str:
    """JSON that can stand in a script element, whatever texts it holds. Raises ValueError on NaN."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def format_number(value: float | None) -> str:
    """As many digits as a reader can use, with separators of thousands; a dash for None and NaN."""
    if value is None or math.isnan(value):
        return "-"
    if math.isinf(value) or 0 < abs(value) < 1e-3:
        return f"{value:.3g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if value == int(value):
        return str(int(value))
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3f}"


def format_seconds(seconds: float) -> str:
    """12 s, 3 min 20 s, 4 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
