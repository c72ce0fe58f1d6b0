"""``seecal report --alignment``: what answers look at and what patches say, as one page with everything in it.

The numbers are :mod:`seecal.scoring.alignment`'s; here they are only drawn.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.paths import show
from ..verbosity import Progress, written_out
from .templates import templates

if TYPE_CHECKING:  # it loads torch, which drawing does not need
    from ..scoring.alignment import AlignedImage, AlignedModel, AlignedRecord

_SIDE = 512  # pixels of a picture's longer side in the page
_SMALL = 256  # up to which pictures stay exact (PNG)
_MOST = 3  # cells that the text equivalent names for a token


@dataclass
class AlignmentReport:
    """What was measured and where it is drawn.

    Attributes:
        out: the page.
        models: one, or two: the numbers themselves.
    """

    out: Path
    models: list[AlignedModel] = field(default_factory=list)

    def sentence(self) -> str:
        """One line for people."""
        names = " and ".join(f"{model.name} (layer {model.layer} of {model.layers})" for model in self.models)
        count = len(self.models[0].records)
        return f"{self.out}: {count} record{'s' if count != 1 else ''} with {names}"


def alignment(
    model: Any,
    data: Any,
    ids: str | Sequence[str],
    *,
    other: Any = None,
    out: str | Path = "alignment.html",
    layer: int | None = None,
    processor: Any = None,
    other_processor: Any = None,
    max_tokens: int = 64,
    format: str | None = None,
    image_root: str | Path | None = None,
    dtype: Any = "auto",
    console: Any = None,
) -> AlignmentReport:
    """Draws attention from answers to image patches and the nearest words to each patch (the paper's Figures 5 and 6).

    One HTML page that needs nothing beside it: for each record its image under a grid of cells, one for each image token
    of the language model, and the tokens of its answers to choose from. Attention is that of one decoder layer, a mean
    over its heads, from the position that predicts the token (where Δ is measured too). The words of a cell are those of
    the vocabulary whose input embeddings have the highest cosine with what the language model receives there.

    Args:
        model: the folder of a vision-language model, its hub id, or a loaded one with ``processor``.
        data: a file or folder that :func:`seecal.load_records` reads, or a set of records.
        ids: of the records to draw, a list or one.
        other: a second model, drawn beside it (with ``other_processor`` if it is a loaded one).
        out: the page to write; it is written over.
        layer: of the decoder, from 0; negative from the end. None: the one in the middle of those with attention, of each
            model.
        max_tokens: label tokens of a record that are drawn, its first; the page says how many are left out.
        format, image_root: of the data.
        dtype: to load models in; "auto": as they were saved.
        console: a rich console for the progress.

    Raises:
        ValueError: an id that no record has, a record without images, a family whose image tokens form no known grid, a
            layer without attention weights, attention or a Δ that is not finite; names it.
        FileNotFoundError: no such data.
    """
    from ..scoring.alignment import align, chosen

    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens}: expected 1 or more")
    names = [ids] if isinstance(ids, str) else [str(one) for one in ids]
    rows = chosen(
        data, names, format=format, image_root=image_root
    )  # a wrong id should not take a model's loading to show
    report = AlignmentReport(Path(out))
    with Progress(console) as progress, progress.task("align", total=1 if other is None else 2, unit="model") as task:
        for one, its_processor in ((model, processor), (other, other_processor)):
            if one is not None:
                options: dict[str, Any] = {"layer": layer, "max_tokens": max_tokens, "dtype": dtype}
                report.models.append(align(one, rows, processor=its_processor, **options))
                task.advance()
    report.out.parent.mkdir(parents=True, exist_ok=True)
    report.out.write_text(page_of(report.models), "utf8")
    return report


def page_of(models: Sequence[AlignedModel]) -> str:
    """The page of one or two models on the same records, as HTML. Every text is data's: it is escaped, and control
    characters and changes of direction are written out."""
    together = zip(*(model.records for model in models), strict=True)
    records = [
        {
            "id": written_out(sides[0].record),
            "place": written_out(f"{sides[0].source}, row {sides[0].row}"),
            "questions": [written_out(question) for question in sides[0].questions],
            "sides": [_side(side, model.name) for side, model in zip(sides, models, strict=True)],
        }
        for sides in together
    ]
    told = [
        {
            "name": written_out(model.name),
            "family": model.family,
            "layer": model.layer,
            "layers": model.layers,
            "words": model.words,
        }
        for model in models
    ]
    return templates().get_template("alignment.html.j2").render(models=told, records=records)


def _side(record: AlignedRecord, model: str) -> dict[str, Any]:
    """What the page shows of one record under one model."""
    numbers = [record.delta[record.has_contrast], *(image.attention for image in record.images)]
    if not all(np.isfinite(some).all() for some in numbers):
        raise ValueError(
            f"{model}: record {show(record.record)} has attention or a Δ that is not finite (NaN or infinite), so there is "
            "nothing to draw. Leave it out, or load the model in another dtype."
        )
    measured = zip(record.tokens, record.delta.tolist(), record.has_contrast.tolist(), strict=True)
    return {
        "tokens": [
            {"text": written_out(token.text or "∎"), "turn": token.turn, "delta": round(delta, 3) if seen else None}
            for token, delta, seen in measured
        ],
        "more": record.more,
        "images": [_image(image) for image in record.images],
    }


def _image(image: AlignedImage) -> dict[str, Any]:
    flat_NC = image.attention.reshape(len(image.attention), -1)
    return {
        "src": _data_uri(image.picture),
        "width": image.picture.width,
        "height": image.picture.height,
        "rows": image.rows,
        "columns": image.columns,
        "left_out": image.left_out,
        "attention": [[float(f"{share:.4g}") for share in cells] for cells in flat_NC.tolist()],
        "totals": [float(cells.sum()) for cells in flat_NC],
        "most": [_most(cells, image.columns) for cells in flat_NC],
        "words": [[[written_out(word), round(cosine, 3)] for word, cosine in cell] for cell in image.words],
    }


def _most(cells: Any, columns: int) -> list[tuple[int, int, float]]:
    """(row, column, share) of the cells that a token looks at most; rows and columns from 1."""
    return [(int(at) // columns + 1, int(at) % columns + 1, float(cells[at])) for at in (-cells).argsort()[:_MOST]]


def _data_uri(picture: Any) -> str:
    small = picture.convert("RGB")
    small.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    kind = "PNG" if max(small.size) <= _SMALL else "JPEG"
    small.save(buffer, kind, **({} if kind == "PNG" else {"quality": 88}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
