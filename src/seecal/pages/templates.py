"""How pages are made of templates: every text is data's, so it is escaped unless it is marked as HTML of ours."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

HERE = Path(__file__).parent


def templates() -> Environment:
    """The templates of this folder. What their ``tojson`` is given has to be JSON: NaN and infinity are errors."""
    made = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.policies["json.dumps_kwargs"] = {"sort_keys": True, "allow_nan": False}
    return made
