"""Chat templates that models come without: those of the paper's trainings, and one for PaliGemma."""

from __future__ import annotations

from pathlib import Path

# plain: projector training; vicuna_v1: LLaVA and MGM on Vicuna; gemma: MGM on Gemma; paligemma: several turns
TEMPLATES = {path.stem: path for path in sorted((Path(__file__).parent / "templates").glob("*.jinja"))}


def chat_template(name: str) -> str:
    """The Jinja text of one of :data:`TEMPLATES`. KeyError for another name."""
    return TEMPLATES[name].read_text("utf8")
