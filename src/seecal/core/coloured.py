"""Tokens in colour: HTML for notebooks, a Markdown table for where styles are not let through.

Without torch. Every text is data's, so nothing of it is read as HTML or Markdown.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..verbosity import written_out

# Orange against purple: told apart with every common colour blindness (ColorBrewer's PuOr)
_AGAINST, _FOR = "230,97,1", "94,60,153"
STRONGEST = 5.0  # |Δ| in logits from which the colour is full: the paper's β


@dataclass(frozen=True)
class ColouredToken:
    """A token's text, its Δ in logits, and whether the image could have mattered to it."""

    text: str
    delta: float
    has_contrast: bool


def coloured(tokens: Iterable[ColouredToken]) -> str:
    """The tokens in one line of HTML: purple where the image speaks for a token, orange where it speaks against it, plain
    where there was no image to look at. What speaks against is underlined too, and each token has its Δ as a title.
    """
    return "".join(_span(token) for token in tokens)


def legend() -> str:
    """What the colours mean, as HTML."""
    scale = [(-STRONGEST, f"Δ ≤ -{STRONGEST:g}: the image speaks against it"), (0.0, "0")]
    scale += [(STRONGEST, f"Δ ≥ {STRONGEST:g}: the image speaks for it")]
    return "<small>" + " ".join(_span(ColouredToken(text, delta, True)) for delta, text in scale) + "</small>"


def markdown_table(tokens: Iterable[ColouredToken]) -> str:
    """The tokens as a Markdown table, one row each: its text, Δ, and squares in the colours of :func:`coloured`, one a
    logit, five at most."""
    rows = ["| token | Δ | |", "| --- | ---: | --- |"]
    for token in tokens:
        size = 0 if math.isnan(token.delta) else round(min(abs(token.delta), STRONGEST))
        squares = ("🟪" if token.delta > 0 else "🟧") * size
        seen = (f"{token.delta:+.2f}", squares) if token.has_contrast else ("–", "no image before it")
        rows.append(f"| {in_markdown(token.text)} | {seen[0]} | {seen[1]} |")
    return "\n".join(rows)


def in_markdown(text: str) -> str:
    """``text`` in one line of Markdown as it is: punctuation as entities, line breaks and outer blanks as signs."""
    inner = written_out(text).replace("\n", "↵")
    blanks = len(inner) - len(inner.lstrip(" ")), len(inner) - len(inner.rstrip(" "))
    inner = "␣" * len(inner) if inner.isspace() else "␣" * blanks[0] + inner.strip(" ") + "␣" * blanks[1]
    return re.sub(r"[!-/:-@\[-`{-~]", lambda found: f"&#{ord(found[0])};", inner)


def visible(text: str) -> str:
    """``text`` escaped, with control characters and changes of direction written out."""
    return html.escape(written_out(text))


def _span(token: ColouredToken) -> str:
    words = visible(token.text).replace("\n", "↵<br>")
    if not token.has_contrast:
        return f'<bdi title="no image before it" style="white-space:pre-wrap">{words}</bdi>'
    strength = min(abs(token.delta) / STRONGEST, 1.0)
    style = f"white-space:pre-wrap;background:rgba({_FOR if token.delta > 0 else _AGAINST},{0.45 * strength:.2f})"
    if token.delta < -1:
        style += f";text-decoration:underline rgb({_AGAINST})"
    return f'<bdi title="Δ {token.delta:+.2f}" style="{style}">{words}</bdi>'
