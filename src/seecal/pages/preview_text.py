"""``seecal preview`` in a terminal: colours where it has them, else the same in characters alone.

Every text is data's: control characters and changes of direction are written out.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image
from rich.console import Console, Group
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from ..core.coloured import STRONGEST
from ..scoring.previewed import Piece, Preview, PreviewedRecord
from ..verbosity import written_out

_WIDE, _HIGH = 28, 24  # half blocks of a picture: a row of characters is two of them high
LATER = "·"  # in lists, for a token that is a later byte of a character
_PICTURES = 4  # of a record that are drawn
_GREY, _FOR, _AGAINST = (52, 52, 58), (117, 70, 200), (205, 84, 0)
_LABEL, _SPECIAL, _MASKED, _IMAGE, _CUT = "bold white on rgb(0,88,110)", "magenta", "dim", "black on cyan", "dim strike"
# Around labels where there are no colours; in a text of the data they are written out
_OPEN, _CLOSE = "⟦", "⟧"


def show(preview: Preview, console: Console) -> None:
    """Writes all of it."""
    for one in parts(preview, has_colours(console)):
        # A terminal gets lines broken at words; a file or a pipe whole ones
        console.print(one, soft_wrap=isinstance(one, Text) and not console.is_terminal, highlight=False)


def text_of(preview: Preview) -> str:
    """All of it without colours."""
    out = io.StringIO()
    show(preview, Console(file=out, color_system=None, no_color=True, force_terminal=False, width=100))
    return out.getvalue()


def has_colours(console: Console) -> bool:
    """Whether the terminal shows colours and NO_COLOR is not set; without them nothing but characters is written."""
    return console.color_system is not None and not console.no_color


def parts(preview: Preview, colours: bool) -> Iterator[Any]:
    """What is written, from top to bottom."""
    yield _rule(f"{preview.recipe}, {preview.stage}", colours)
    settings = ", ".join(f"{name}: {value}" for name, value in preview.settings.items())
    yield Text(written_out(f"model: {preview.model}, {settings}"))
    yield _legend(preview.measured, colours)
    for number, record in enumerate(preview.records, 1):
        where = f"{record.id} ({record.source}, row {record.row})"
        counts = f"{record.tokens} tokens, {record.labels} labels"
        yield _rule(f"{number} of {len(preview.records)}: {where}: {counts}", colours)
        if record.pictures and colours:
            yield _pictures(record)
        yield rendered(record.pieces, colours)
        sizes = [f"image {at}: {one.width} × {one.height} pixels" for at, one in enumerate(record.pictures, 1)]
        yield Text("; ".join(sizes) or "no image", style="dim" if colours else "")
        if record.measured:
            yield _numbers(record, colours)
    yield _rule("checks", colours)
    yield from _checks(preview, colours)


def rendered(pieces: Sequence[Piece], colours: bool) -> Text:
    """The tokens of a record in one text."""
    text, open_, cut = Text(), False, False
    for piece in pieces:
        if not colours and piece.cut and not cut:
            text.append((_CLOSE if open_ else "") + " ✂ ")
            open_, cut = False, True
        if not colours and piece.label != open_:
            text.append(_CLOSE if open_ else _OPEN)
            open_ = piece.label
        text.append(_words(piece), style=_style(piece) if colours else "")
    if open_:
        text.append(_CLOSE)
    text.rstrip()  # a line break at the end has its sign already
    return text


def _words(piece: Piece) -> str:
    if piece.images:
        numbers = ", ".join(map(str, piece.images))
        plural = "s" if len(piece.images) > 1 else ""
        return f"[image{plural} {numbers}: {piece.tokens} token{'s' if piece.tokens > 1 else ''}]"
    words = written_out(piece.text).replace(_OPEN, "⟨U+27E6⟩").replace(_CLOSE, "⟨U+27E7⟩")
    return words.replace("\t", "⇥").replace("\n", "↵\n")


def _style(piece: Piece) -> str:
    if piece.cut:
        return _CUT
    if piece.images:
        return _IMAGE
    if not piece.label:
        return _SPECIAL if piece.special else _MASKED
    if piece.delta is None:
        return _LABEL
    strength = min(abs(piece.delta) / STRONGEST, 1.0)
    towards = _FOR if piece.delta > 0 else _AGAINST
    red, green, blue = (round(grey + (full - grey) * strength) for grey, full in zip(_GREY, towards, strict=True))
    return f"bold white on rgb({red},{green},{blue})" + (" underline" if piece.delta < -1 else "")


def _legend(measured: bool, colours: bool) -> Text:
    if not colours:
        labels = f"Labels stand in {_OPEN}{_CLOSE}; the rest is masked. ↵ is a line break."
        return Text(labels + (" Δ in logits, in brackets the weight." if measured else ""))
    text = Text().append(" label ", style=_LABEL)
    text.append(" masked ", style=_MASKED).append(" special token ", style=_SPECIAL).append(" image ", style=_IMAGE)
    if measured:
        for delta, words in ((STRONGEST, " Δ ≥ 5, for "), (0.0, " 0 "), (-STRONGEST, " Δ ≤ -5, against ")):
            text.append(words, style=_style(Piece("", label=True, delta=delta)))
    return text


def _numbers(record: PreviewedRecord, colours: bool) -> Text:
    """Δ and weight of every label."""
    text = Text("Δ (weight): ")
    for number, piece in enumerate(piece for piece in record.pieces if piece.label):
        words = _words(piece).replace("↵\n", "↵").strip() or ("␣" if piece.text else LATER)
        text.append(", " if number else "").append(words, style=_style(piece) if colours else "")
        text.append(" –" if piece.delta is None else f" {piece.delta:+.2f}")
        text.append("" if piece.weight is None else f" ({piece.weight:.2f})")
    return text


def _checks(preview: Preview, colours: bool) -> Iterator[Text]:
    bad = bool(preview.checks)
    yield Text(written_out(preview.verdict()), style=("bold red" if bad else "bold green") if colours else "")
    for check in preview.checks:
        yield Text(f"  {check.count:,} × {check.text}: {check.consequence}", style="bold" if colours else "")
        yield Text(f"      the first: {written_out(check.first)}")
    for note in preview.notes:
        yield Text(f"  note: {written_out(note)}")


def _pictures(record: PreviewedRecord) -> Any:
    """The record's images side by side, two pixels a character; how many are not drawn."""
    grid = Table.grid(padding=(0, 2))
    drawn = record.pictures[:_PICTURES]
    grid.add_row(*(half_blocks(picture.image) for picture in drawn))
    more = len(record.pictures) - len(drawn)
    return Group(grid, Text(f"{more} more not drawn", style="dim")) if more else grid


def half_blocks(image: Image.Image) -> Text:
    """A picture of at most 28 × 12 characters; each is its upper pixel's colour on its lower one's."""
    scale = min(_WIDE / image.width, _HIGH / image.height)
    width, rows = max(round(image.width * scale), 1), max(round(image.height * scale / 2), 1)
    small = image.convert("RGB").resize((width, 2 * rows), Image.Resampling.BOX)
    text = Text(no_wrap=True)
    for row in range(rows):
        for column in range(width):
            upper, lower = (small.getpixel((column, 2 * row + half)) for half in (0, 1))
            text.append("▀", style=f"rgb{upper} on rgb{lower}".replace(" ", "").replace("on", " on "))
        if row + 1 < rows:
            text.append("\n")
    return text


def _rule(title: str, colours: bool) -> Any:
    words = written_out(" ".join(title.split()))
    if colours:
        return Padding(Rule(Text(words, style="bold", overflow="ellipsis"), style="cyan", align="left"), (1, 0, 0, 0))
    return Text(f"\n── {words}")
