"""The page of ``seecal preview``: records as the model will see them, what the checks found; no script, nothing outside.

Every text is data's: it is escaped, and control characters and changes of direction are written out.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

from ..core.coloured import STRONGEST
from ..scoring.previewed import Piece, Preview, PreviewedRecord
from ..verbosity import written_out
from .preview_text import LATER
from .templates import templates
from .thumbnails import thumbnail


def page_of(preview: Preview) -> str:
    """All of it as HTML."""
    return (
        templates()
        .get_template("preview.html.j2")
        .render(
            recipe=written_out(preview.recipe),
            stage=written_out(preview.stage),
            model=written_out(preview.model),
            settings=[(name, written_out(str(value))) for name, value in preview.settings.items()],
            records=[_record(record) for record in preview.records],
            measured=preview.measured,
            verdict=preview.verdict(),
            checks=[
                {"count": one.count, "text": one.text, "fate": one.consequence, "first": written_out(one.first)}
                for one in preview.checks
            ],
            notes=[written_out(note) for note in preview.notes],
        )
    )


def _record(record: PreviewedRecord) -> dict[str, Any]:
    runs = groupby(record.pieces, key=lambda piece: (piece.label, piece.cut))
    return {
        "id": written_out(record.id),
        "place": written_out(f"{record.source}, row {record.row}"),
        "tokens": record.tokens,
        "labels": record.labels,
        "runs": [{"label": label, "cut": cut, "parts": _parts(list(pieces))} for (label, cut), pieces in runs],
        "rows": [{**_token(piece), "text": _words(piece) or LATER} for piece in record.pieces if piece.label],
        "pictures": [
            {"src": thumbnail(one.image, record.id), "width": one.width, "height": one.height}
            for one in record.pictures
        ],
    }


def _parts(pieces: list[Piece]) -> list[dict[str, Any]]:
    """Labels token by token; masked text in as few parts as show its special tokens and images."""
    if pieces[0].label:
        return [_token(piece) for piece in pieces]
    parts = []
    for (special, images), together in groupby(pieces, key=lambda piece: (piece.special, piece.images)):
        same = list(together)
        if images:
            parts += [{"kind": "image", "images": images, "tokens": piece.tokens} for piece in same]
        else:
            text = "".join(_words(piece) for piece in same)
            parts.append({"kind": "special" if special else "plain", "text": text})
    return parts


def _token(piece: Piece) -> dict[str, Any]:
    strength = 0.0 if piece.delta is None else min(abs(piece.delta) / STRONGEST, 1.0)
    return {
        "kind": "special" if piece.special else "token",
        "text": _words(piece),
        "token_id": piece.token_id,
        "delta": piece.delta,
        "weight": piece.weight,
        "strength": round(strength, 2),
        "side": "for" if (piece.delta or 0) > 0 else "against",
        "against": piece.delta is not None and piece.delta < -1,
    }


def _words(piece: Piece) -> str:
    return written_out(piece.text).replace("\n", "↵\n")
