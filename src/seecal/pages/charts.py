"""Where Δ lies, as pictures for a page: SVG, once for light and once for dark paper."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..verbosity import written_out

# Okabe and Ito's colours, which all common colour blindnesses tell apart; dashes tell them apart without colours
_COLOURS = ["#5e3c99", "#e66101", "#0072b2", "#009e73", "#cc79a7", "#8c6d00", "#56b4e9"]
_DARK = ["#b39ddb", "#ff9d5c", "#6cb8e6", "#4fd1a5", "#f0a8d0", "#e0c050", "#9fd8ff"]
_MOST = len(_COLOURS)  # lines in one picture


def require_altair() -> Any:
    """altair, with what draws its pictures. ImportError in one line that says what to install."""
    try:
        importlib.import_module("vl_convert")
        return importlib.import_module("altair")
    except ImportError as error:
        raise ImportError(
            f"the charts of a report need {error.name}, which is not installed: pip install 'seecal[report]'"
        ) from None


def tallest(counts: Mapping[str, np.ndarray]) -> float:
    """The largest share that :func:`distribution` draws; 0 without any."""
    return max((float(counts[name].max() / max(counts[name].sum(), 1)) for name in _drawn(counts)), default=0.0)


def distribution(
    counts: Mapping[str, np.ndarray], edges: np.ndarray, alpha: float, beta: float, top: float
) -> dict[str, str]:
    """ "light" and "dark" → an SVG: for each name the share of its tokens over Δ in logits, with α and β drawn.

    Args:
        counts: name -> [bins]; of more than seven names those with most tokens are drawn.
        edges: [bins + 1], in logits.
        top: the share at the upper end of the axis, so that pictures can be compared.
    """
    names = _drawn(counts)
    centres = (edges[:-1] + edges[1:]) / 2
    rows = [
        {"name": _short(name), "delta": float(centre), "share": float(count / max(counts[name].sum(), 1))}
        for name in names
        for centre, count in zip(centres, counts[name], strict=True)
    ]
    shorts = [_short(name) for name in names]
    return {theme: _svg(rows, shorts, (alpha, beta), top, theme == "dark") for theme in ("light", "dark")}


def _drawn(counts: Mapping[str, np.ndarray]) -> list[str]:
    most = sorted(counts, key=lambda name: -int(counts[name].sum()))[:_MOST]
    return [name for name in counts if name in most]


def _svg(rows: list[dict[str, Any]], names: list[str], bounds: tuple[float, float], top: float, dark: bool) -> str:
    altair = require_altair()
    ink, line = ("#e9e7e1", "#3a4048") if dark else ("#1d2229", "#e2dfd8")
    colours = (_DARK if dark else _COLOURS)[: len(names)]
    lines = (
        altair.Chart(altair.Data(values=rows))
        .mark_line(interpolate="monotone", strokeWidth=2.2)
        .encode(
            x=altair.X("delta:Q", title="Δ in logits", scale=altair.Scale(domain=[-10, 15], nice=False)),
            y=altair.Y(
                "share:Q",
                title="share of tokens",
                axis=altair.Axis(format="%", tickCount=4),
                scale=altair.Scale(domain=[0, top]),
            ),
            color=altair.Color("name:N", title=None, sort=names, scale=altair.Scale(domain=names, range=colours)),
            strokeDash=altair.StrokeDash("name:N", title=None, sort=names, scale=altair.Scale(domain=names)),
        )
    )
    drawn = [{"delta": bound, "text": f"{letter} = {bound:g}"} for letter, bound in zip("αβ", bounds, strict=True)]
    base = altair.Chart(altair.Data(values=drawn))
    rule = base.mark_rule(color=ink, strokeDash=[2, 3], opacity=0.8).encode(x="delta:Q")
    text = base.mark_text(color=ink, align="left", dx=4, dy=6, baseline="top", fontSize=12).encode(
        x="delta:Q", y=altair.value(0), text="text:N"
    )
    chart = (
        altair.layer(lines, rule, text)
        .properties(width=560, height=220, background="transparent")
        .configure_view(stroke=None)
        .configure_axis(
            gridColor=line, domainColor=line, tickColor=line, labelColor=ink, titleColor=ink, labelFontSize=12
        )
        .configure_legend(labelColor=ink, orient="top", labelFontSize=12, labelLimit=240, columns=4)
    )
    import vl_convert

    return str(vl_convert.vegalite_to_svg(chart.to_json(), allowed_base_urls=[]))


def _short(name: str) -> str:
    printable = written_out(name)
    return printable if len(printable) <= 34 else f"{printable[:16]}…{printable[-16:]}"
